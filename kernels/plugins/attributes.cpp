#include "attributes.h"

#include <string.h>

#include <locale>
#include <sstream>
#include <stdexcept>

namespace edgeseg::plugins {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int64_t kExactInDouble = int64_t{1} << 53;

// With a point, whatever the locale; 9 digits tell any two float32 apart.
std::string written(double value, int32_t digits = 15) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.precision(digits);
  text << value;
  return text.str();
}

std::string name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case PluginFieldType::kINT8:
      return "INT8";
    case PluginFieldType::kINT16:
      return "INT16";
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kINT64:
      return "INT64";
    case PluginFieldType::kCHAR:
      return "CHAR";
    default:
      return "type " + std::to_string(static_cast<int32_t>(type));
  }
}

std::string expectation(const Attribute& attribute) {
  std::string text;
  switch (attribute.kind) {
    case Attribute::Kind::kInteger:
      text = "one INT32 or INT64";
      break;
    case Attribute::Kind::kNumber:
      text = "one FLOAT32 or FLOAT64";
      break;
    case Attribute::Kind::kNumbers:
      text = "1 to " + std::to_string(attribute.longest) + " FLOAT32 or FLOAT64, each";
      break;
  }
  return text + " from " + written(attribute.least) + " to " + written(attribute.most);
}

[[noreturn]] void refuse(const Attribute& attribute, const std::string& came) {
  throw std::invalid_argument("attribute " + std::string(attribute.name) + " " + came +
                              "; expected " + expectation(attribute) + ".");
}

// Fields need not be aligned for their type.
template <class Element>
Element element(const PluginField& field, int32_t index) {
  Element value;
  memcpy(&value, static_cast<const char*>(field.data) + index * sizeof value, sizeof value);
  return value;
}

double element_of(const Attribute& attribute, const PluginField& field, int32_t index) {
  const bool wants_integer = attribute.kind == Attribute::Kind::kInteger;
  if (wants_integer && field.type == PluginFieldType::kINT32) return element<int32_t>(field, index);
  if (wants_integer && field.type == PluginFieldType::kINT64) {
    const int64_t value = element<int64_t>(field, index);
    if (value > kExactInDouble || value < -kExactInDouble) {
      refuse(attribute, "is " + std::to_string(value));
    }
    return static_cast<double>(value);
  }
  if (!wants_integer && field.type == PluginFieldType::kFLOAT32) {
    return static_cast<double>(element<float>(field, index));
  }
  if (!wants_integer && field.type == PluginFieldType::kFLOAT64) {
    return element<double>(field, index);
  }
  refuse(attribute, "came as " + name_of(field.type));
}

const PluginField* find(const nvinfer1::PluginFieldCollection& fields, const char* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.name != nullptr && strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

}  // namespace

Attributes::Attributes(const AttributeTable& table, const nvinfer1::PluginFieldCollection& fields) {
  for (const Attribute& attribute : table) {
    Value& value = values_.emplace_back(Value{&attribute, {}, {}});
    const auto keep = [&](double number) {
      // Written as !(in range) so that NaN is refused.
      if (!(number >= attribute.least && number <= attribute.most)) {
        refuse(attribute, "is " + written(number));
      }
      if (attribute.kind == Attribute::Kind::kInteger) {
        value.integers.push_back(static_cast<int32_t>(number));
      } else {
        value.numbers.push_back(static_cast<float>(number));
      }
    };
    const PluginField* field = find(fields, attribute.name);
    if (field == nullptr) {
      if (!attribute.fallback) refuse(attribute, "is missing");
      keep(*attribute.fallback);
      continue;
    }
    if (field->length < 1 || field->length > attribute.longest || field->data == nullptr) {
      refuse(attribute,
             "came with " + std::to_string(field->data == nullptr ? 0 : field->length) + " values");
    }
    for (int32_t i = 0; i < field->length; ++i) keep(element_of(attribute, *field, i));
  }
}

const Attributes::Value& Attributes::value(const char* name) const {
  for (const Value& value : values_) {
    if (strcmp(value.attribute->name, name) == 0) return value;
  }
  throw std::logic_error(std::string("the table has no attribute ") + name);
}

int32_t Attributes::integer(const char* name) const { return value(name).integers.at(0); }

float Attributes::number(const char* name) const { return value(name).numbers.at(0); }

const std::vector<float>& Attributes::numbers(const char* name) const {
  return value(name).numbers;
}

std::string Attributes::text() const {
  std::string text;
  for (const Value& value : values_) {
    std::string list;
    for (const int32_t integer : value.integers) list += "," + std::to_string(integer);
    for (const float number : value.numbers) list += "," + written(number, 9);
    text += (text.empty() ? "" : ";") + std::string(value.attribute->name) + "=" + list.substr(1);
  }
  return text;
}

void Attributes::append_to(std::vector<nvinfer1::PluginField>* fields) const {
  for (const Value& value : values_) {
    if (value.attribute->kind == Attribute::Kind::kInteger) {
      fields->emplace_back(value.attribute->name, value.integers.data(), PluginFieldType::kINT32,
                           static_cast<int32_t>(value.integers.size()));
    } else {
      fields->emplace_back(value.attribute->name, value.numbers.data(), PluginFieldType::kFLOAT32,
                           static_cast<int32_t>(value.numbers.size()));
    }
  }
}

}  // namespace edgeseg::plugins
