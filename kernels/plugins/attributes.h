// The attributes of an operator: read from the fields that TensorRT hands over, checked, kept, and
// handed back for the plan.
//
// An operator lists its attributes in one table, and everything else follows from it: the names
// that the ONNX parser looks for, the checks and their messages, what goes into a plan, the
// timing-cache identifier.

#ifndef EDGESEG_PLUGINS_ATTRIBUTES_H_
#define EDGESEG_PLUGINS_ATTRIBUTES_H_

#include <NvInferRuntime.h>
#include <stdint.h>

#include <optional>
#include <string>
#include <vector>

namespace edgeseg::plugins {

struct Attribute {
  enum class Kind {
    kInteger,  // one INT32 or INT64
    kNumber,   // one FLOAT32 or FLOAT64
    kNumbers,  // one or more of them
  };

  const char* name;
  Kind kind;
  double least;  // bounds of each value, both allowed
  double most;
  std::optional<double> fallback = std::nullopt;  // none: the attribute has to be there
  int32_t longest = 1;                            // values, for kNumbers
};

struct AttributeTable {
  const Attribute* first;
  int32_t count;

  const Attribute* begin() const { return first; }
  const Attribute* end() const { return first + count; }
};

class Attributes {
 public:
  // Fields that the table does not have are passed over. Throws std::invalid_argument whose text
  // says which attribute, what came, and what was expected.
  Attributes(const AttributeTable& table, const nvinfer1::PluginFieldCollection& fields);

  int32_t integer(const char* name) const;
  float number(const char* name) const;
  const std::vector<float>& numbers(const char* name) const;

  // "height=512;width=1024": the same for equal attributes, different for others.
  std::string text() const;

  // Appends a field for each attribute; they point into this object.
  void append_to(std::vector<nvinfer1::PluginField>* fields) const;

 private:
  struct Value {
    const Attribute* attribute;
    std::vector<int32_t> integers;
    std::vector<float> numbers;
  };

  const Value& value(const char* name) const;

  std::vector<Value> values_;
};

}  // namespace edgeseg::plugins

#endif  // EDGESEG_PLUGINS_ATTRIBUTES_H_
