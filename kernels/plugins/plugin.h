// What the plugins have in common: one class that is core, build and runtime capability in one, and
// one creator. An operator adds its table of attributes, its checks, and the call of its launcher.
//
// Written for TensorRT 10.0 to 11.x, whose IPluginV3 interfaces are the same. TensorRT calls
// through virtual functions only, so nothing here needs libnvinfer to link; nothing throws across
// the boundary: errors go to the logger as one sentence, and the call returns a code that is not 0.

#ifndef EDGESEG_PLUGINS_PLUGIN_H_
#define EDGESEG_PLUGINS_PLUGIN_H_

#include <NvInferRuntime.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "attributes.h"

namespace edgeseg::plugins {

constexpr const char* kNamespace = "edgeseg";
constexpr const char* kVersion = "1";

class Plugin;

struct Operator {
  const char* name;  // the node's type in ONNX
  AttributeTable attributes;
  Plugin* (*make)(const Attributes& attributes);  // the caller owns it; may throw
};

// The operators, each in the file of its name.
extern const Operator kUpsampleArgmax;
extern const Operator kMaskAssembly;
extern const Operator kPyramidRoiAlign;

// Says it to the logger that TensorRT names, or to standard error where it has named none.
void log_error(const char* operator_name, const char* message) noexcept;
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// "(1, 19, -1, -1)"
std::string written(const nvinfer1::Dims& dims);

// Throws std::invalid_argument with the text unless `fits`.
void require(bool fits, const std::string& expected, const nvinfer1::Dims& came);

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  ~Plugin() noexcept override = default;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept final;
  nvinfer1::IPluginV3* clone() noexcept final;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept final { return operator_.name; }
  const char* getPluginVersion() const noexcept final { return kVersion; }
  const char* getPluginNamespace() const noexcept final { return kNamespace; }

  // IPluginV3OneBuild
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept final;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                             const nvinfer1::DataType* input_types,
                             int32_t input_count) const noexcept final;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& expressions) noexcept final;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept final;
  int32_t getNbOutputs() const noexcept final { return outputs_; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept final;
  const char* getTimingCacheID() noexcept final { return text_.c_str(); }
  const char* getMetadataString() noexcept final { return text_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t output_count) noexcept final;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc,
                  const nvinfer1::PluginTensorDesc* output_desc, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final;

 protected:
  Plugin(const Operator& its_operator, const Attributes& attributes, int32_t inputs,
         int32_t outputs);

  int32_t inputs() const { return inputs_; }

 private:
  // The hooks get as many tensors as the constructor was told; those that return nothing throw
  // std::invalid_argument with a sentence.

  // Extents are -1 where only the run decides.
  virtual void check_shapes(const nvinfer1::Dims* inputs) const = 0;
  virtual void choose_types(const nvinfer1::DataType* inputs,
                            nvinfer1::DataType* outputs) const = 0;
  virtual void choose_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                             nvinfer1::IExprBuilder& expressions) const = 0;
  // May look at the tensors up to `position`.
  virtual bool supports(int32_t position,
                        const nvinfer1::DynamicPluginTensorDesc* tensors) const = 0;
  // Queues the work, if there is any; returns a cudaError_t.
  virtual int32_t queue(const nvinfer1::PluginTensorDesc* input_desc, const void* const* inputs,
                        void* const* outputs, void* stream) const = 0;

  void check_counts(int32_t inputs, int32_t outputs) const;
  template <class Work>
  int32_t guarded(Work&& work) const noexcept;

  const Operator& operator_;
  const Attributes attributes_;
  const int32_t inputs_;
  const int32_t outputs_;
  std::string text_;
  std::vector<nvinfer1::PluginField> fields_;  // they point into attributes_
  nvinfer1::PluginFieldCollection collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const Operator& its_operator);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return operator_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Operator& operator_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace edgeseg::plugins

#endif  // EDGESEG_PLUGINS_PLUGIN_H_
