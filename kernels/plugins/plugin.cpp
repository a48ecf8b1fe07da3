#include "plugin.h"

#include <stdio.h>

#include <array>
#include <atomic>
#include <exception>
#include <stdexcept>

namespace edgeseg::plugins {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kMaxInputs = 16;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(const char* operator_name, const char* message) noexcept {
  try {
    const std::string text = std::string(operator_name) + ": " + message;
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } else {
      fprintf(stderr, "%s\n", text.c_str());
    }
  } catch (...) {
    fprintf(stderr, "%s: an error occurred, and saying which failed too\n", operator_name);
  }
}

std::string written(const Dims& dims) {
  std::string text = "(";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  }
  return text + ")";
}

void require(bool fits, const std::string& expected, const Dims& came) {
  if (!fits) throw std::invalid_argument(expected + ", got " + written(came) + ".");
}

Plugin::Plugin(const Operator& its_operator, const Attributes& attributes, int32_t inputs,
               int32_t outputs)
    : operator_(its_operator),
      attributes_(attributes),
      inputs_(inputs),
      outputs_(outputs),
      text_(attributes_.text()) {
  attributes_.append_to(&fields_);
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

// Runs what may throw; 0, or 1 after saying why.
template <class Work>
int32_t Plugin::guarded(Work&& work) const noexcept {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    log_error(operator_.name, error.what());
  } catch (...) {
    log_error(operator_.name, "unknown error.");
  }
  return 1;
}

void Plugin::check_counts(int32_t inputs, int32_t outputs) const {
  if (inputs != inputs_ || outputs != outputs_) {
    throw std::invalid_argument("expected " + std::to_string(inputs_) + " inputs and " +
                                std::to_string(outputs_) + " outputs with these attributes, got " +
                                std::to_string(inputs) + " and " + std::to_string(outputs) + ".");
  }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

// The attributes are all that a plugin is.
IPluginV3* Plugin::clone() noexcept {
  IPluginV3* copy = nullptr;
  guarded([&] { copy = operator_.make(attributes_); });
  return copy;
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const DynamicPluginTensorDesc*, int32_t output_count) noexcept {
  return guarded([&] {
    check_counts(input_count, output_count);
    const auto check = [&](const auto& dims_of) {
      std::array<Dims, kMaxInputs> dims;
      for (int32_t i = 0; i < inputs_; ++i) {
        dims[i] = dims_of(inputs[i]);
        // Bounds are there only for what the run decides.
        if (dims[i].nbDims != inputs[i].desc.dims.nbDims) dims[i] = inputs[i].desc.dims;
      }
      check_shapes(dims.data());
    };
    check([](const DynamicPluginTensorDesc& input) { return input.desc.dims; });
    check([](const DynamicPluginTensorDesc& input) { return input.min; });
    check([](const DynamicPluginTensorDesc& input) { return input.max; });
  });
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t output_count,
                                   const DataType* input_types,
                                   int32_t input_count) const noexcept {
  return guarded([&] {
    check_counts(input_count, output_count);
    choose_types(input_types, output_types);
  });
}

int32_t Plugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*,
                                int32_t, DimsExprs* outputs, int32_t output_count,
                                nvinfer1::IExprBuilder& expressions) noexcept {
  return guarded([&] {
    check_counts(input_count, output_count);
    std::array<Dims, kMaxInputs> dims;
    for (int32_t i = 0; i < inputs_; ++i) {
      dims[i].nbDims = inputs[i].nbDims;
      for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
        const nvinfer1::IDimensionExpr& extent = *inputs[i].d[axis];
        dims[i].d[axis] = extent.isConstant() ? extent.getConstantValue() : -1;
      }
    }
    check_shapes(dims.data());
    choose_shapes(inputs, outputs, expressions);
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t input_count, int32_t output_count) noexcept {
  if (input_count != inputs_ || output_count != outputs_) return false;
  if (position < 0 || position >= inputs_ + outputs_) return false;
  return supports(position, tensors);
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t,
                                const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return 0;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                              const PluginTensorDesc*, int32_t output_count) noexcept {
  return guarded([&] {
    check_counts(input_count, output_count);
    std::array<Dims, kMaxInputs> dims;
    for (int32_t i = 0; i < inputs_; ++i) dims[i] = inputs[i].dims;
    check_shapes(dims.data());
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void*,
                        cudaStream_t stream) noexcept {
  return guarded([&] {
    const int32_t error = queue(input_desc, inputs, outputs, stream);
    if (error != 0) {
      throw std::runtime_error("the kernel could not be queued, CUDA error " +
                               std::to_string(error) + ".");
    }
  });
}

IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept { return &collection_; }

Creator::Creator(const Operator& its_operator) : operator_(its_operator) {
  for (const Attribute& attribute : operator_.attributes) {
    const bool is_integer = attribute.kind == Attribute::Kind::kInteger;
    fields_.emplace_back(attribute.name, nullptr,
                         is_integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32,
                         attribute.longest);
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

IPluginV3* Creator::createPlugin(const char* name, const PluginFieldCollection* fields,
                                 nvinfer1::TensorRTPhase) noexcept {
  try {
    const PluginFieldCollection none{};
    const Attributes attributes(operator_.attributes, fields == nullptr ? none : *fields);
    return operator_.make(attributes);
  } catch (const std::exception& error) {
    try {
      const std::string layer = name == nullptr ? "" : " " + std::string(name);
      log_error((operator_.name + layer).c_str(), error.what());
    } catch (...) {
      log_error(operator_.name, error.what());
    }
  } catch (...) {
    log_error(operator_.name, "unknown error.");
  }
  return nullptr;
}

}  // namespace edgeseg::plugins
