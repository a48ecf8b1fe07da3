// EdgeSegUpsampleArgmax: logits (images, classes, h, w) -> class_map (images, height, width) and,
// with attribute confidence 1, confidence (images, height, width).
//
// The results are integers from 0 to 255 and come as half, which has them exactly: a plugin cannot
// give uint8, and TensorRT casts to uint8 from floating types only.

#include "edgeseg/upsample_argmax.h"

#include <stdexcept>

#include "plugin.h"
#include "tensors.h"

namespace edgeseg::plugins {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr Attribute kAttributes[] = {
    {"height", Attribute::Kind::kInteger, 1, kMaxSide},
    {"width", Attribute::Kind::kInteger, 1, kMaxSide},
    {"align_corners", Attribute::Kind::kInteger, 0, 1},
    // The number of outputs has to be known before the graph is.
    {"confidence", Attribute::Kind::kInteger, 0, 1, 0},
};

class UpsampleArgmaxPlugin final : public Plugin {
 public:
  explicit UpsampleArgmaxPlugin(const Attributes& attributes)
      : Plugin(kUpsampleArgmax, attributes, 1, 1 + attributes.integer("confidence")),
        height_(attributes.integer("height")),
        width_(attributes.integer("width")),
        flags_(attributes.integer("align_corners") != 0 ? kAlignCorners : 0) {}

 private:
  void check_shapes(const Dims* inputs) const override {
    const Dims& logits = inputs[0];
    require(logits.nbDims == 4 && is_extent(logits.d[0], 0, INT32_MAX) &&
                is_extent(logits.d[1], 1, kMaxClasses) && is_extent(logits.d[2], 1, kMaxSide) &&
                is_extent(logits.d[3], 1, kMaxSide),
            "logits must be (images, classes, height, width) with 1 to 255 classes, 1 to 4194304 "
            "high and wide",
            logits);
  }

  void choose_types(const DataType* inputs, DataType* outputs) const override {
    if (!is_feature_type(inputs[0])) {
      throw std::invalid_argument("logits must be float32 or half; cast them in the graph.");
    }
    for (int32_t i = 0; i < getNbOutputs(); ++i) outputs[i] = DataType::kHALF;
  }

  void choose_shapes(const DimsExprs* inputs, DimsExprs* outputs,
                     nvinfer1::IExprBuilder& expressions) const override {
    for (int32_t i = 0; i < getNbOutputs(); ++i) {
      outputs[i].nbDims = 3;
      outputs[i].d[0] = inputs[0].d[0];
      outputs[i].d[1] = expressions.constant(height_);
      outputs[i].d[2] = expressions.constant(width_);
    }
  }

  bool supports(int32_t position, const DynamicPluginTensorDesc* tensors) const override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    return position == 0 ? is_features(tensor) : is_linear(tensor, DataType::kHALF);
  }

  int32_t queue(const PluginTensorDesc* input_desc, const void* const* inputs, void* const* outputs,
                void* stream) const override {
    const FeatureBatch logits(input_desc[0], inputs[0]);
    const int64_t pixels = static_cast<int64_t>(height_) * width_;
    Half* const class_map = static_cast<Half*>(outputs[0]);
    Half* const confidence = getNbOutputs() == 2 ? static_cast<Half*>(outputs[1]) : nullptr;
    for (int64_t n = 0; n < logits.images; ++n) {
      const Features image = logits.image(n);
      const int32_t error = edgeseg_cuda_upsample_argmax(
          &image, class_map + n * pixels, confidence == nullptr ? nullptr : confidence + n * pixels,
          kFloat16, height_, width_, flags_, stream);
      if (error != 0) return error;
    }
    return 0;
  }

  const int32_t height_;
  const int32_t width_;
  const int32_t flags_;
};

}  // namespace

const Operator kUpsampleArgmax = {
    "EdgeSegUpsampleArgmax",
    {kAttributes, sizeof kAttributes / sizeof kAttributes[0]},
    [](const Attributes& attributes) -> Plugin* { return new UpsampleArgmaxPlugin(attributes); }};

}  // namespace edgeseg::plugins
