// EdgeSegMaskAssembly: prototypes (images, channels, h, w), coefficients (images, instances,
// channels), boxes (images, instances, 4) xyxy in network pixels, count (images) -> masks (images,
// instances, h, w): round(255 * probability) inside the box, 0 outside and for instances after the
// count. As half, for the reasons in upsample_argmax.cpp.

#include "edgeseg/mask_assembly.h"

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
    {"network_height", Attribute::Kind::kInteger, 1, kMaxMaskSide},
    {"network_width", Attribute::Kind::kInteger, 1, kMaxMaskSide},
};

class MaskAssemblyPlugin final : public Plugin {
 public:
  explicit MaskAssemblyPlugin(const Attributes& attributes)
      : Plugin(kMaskAssembly, attributes, 4, 1),
        network_height_(attributes.integer("network_height")),
        network_width_(attributes.integer("network_width")) {}

 private:
  void check_shapes(const Dims* inputs) const override {
    const Dims& prototypes = inputs[0];
    const Dims& coefficients = inputs[1];
    const Dims& boxes = inputs[2];
    const Dims& count = inputs[3];
    require(prototypes.nbDims == 4 && is_extent(prototypes.d[0], 0, INT32_MAX) &&
                is_extent(prototypes.d[1], 1, kMaxPrototypes) &&
                is_extent(prototypes.d[2], 1, kMaxMaskSide) &&
                is_extent(prototypes.d[3], 1, kMaxMaskSide),
            "prototypes must be (images, channels, height, width), the last three at least 1",
            prototypes);
    const std::string of = " for prototypes " + written(prototypes);
    require(coefficients.nbDims == 3 && may_be_equal(coefficients.d[0], prototypes.d[0]) &&
                is_extent(coefficients.d[1], 0, INT32_MAX) &&
                may_be_equal(coefficients.d[2], prototypes.d[1]),
            "coefficients must be (images, instances, channels)" + of, coefficients);
    require(
        boxes.nbDims == 3 && may_be_equal(boxes.d[0], prototypes.d[0]) &&
            may_be_equal(boxes.d[1], coefficients.d[1]) && may_be_equal(boxes.d[2], 4),
        "boxes must be (images, instances, 4)" + of + " and coefficients " + written(coefficients),
        boxes);
    require(count.nbDims == 1 && may_be_equal(count.d[0], prototypes.d[0]),
            "count must be (images)" + of, count);
  }

  void choose_types(const DataType* inputs, DataType* outputs) const override {
    if (!is_feature_type(inputs[0]) || inputs[1] != inputs[0]) {
      throw std::invalid_argument(
          "prototypes and coefficients must both be float32 or both half; cast them in the graph.");
    }
    if (inputs[2] != DataType::kFLOAT || inputs[3] != DataType::kINT32) {
      throw std::invalid_argument("boxes must be float32 and count int32; cast them in the graph.");
    }
    outputs[0] = DataType::kHALF;
  }

  void choose_shapes(const DimsExprs* inputs, DimsExprs* outputs,
                     nvinfer1::IExprBuilder&) const override {
    outputs[0].nbDims = 4;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = inputs[1].d[1];
    outputs[0].d[2] = inputs[0].d[2];
    outputs[0].d[3] = inputs[0].d[3];
  }

  bool supports(int32_t position, const DynamicPluginTensorDesc* tensors) const override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    switch (position) {
      case 0:
        return is_features(tensor);
      case 1:
        return is_linear(tensor, tensors[0].desc.type);
      case 2:
        return is_linear(tensor, DataType::kFLOAT);
      case 3:
        return is_linear(tensor, DataType::kINT32);
      default:
        return is_linear(tensor, DataType::kHALF);
    }
  }

  int32_t queue(const PluginTensorDesc* input_desc, const void* const* inputs, void* const* outputs,
                void* stream) const override {
    const FeatureBatch prototypes(input_desc[0], inputs[0]);
    const int64_t capacity = input_desc[1].dims.d[1];
    if (capacity == 0) return 0;
    const char* const coefficients = static_cast<const char*>(inputs[1]);
    const int64_t coefficients_size =
        capacity * prototypes.first.channels * prototypes.element_size();
    const float* const boxes = static_cast<const float*>(inputs[2]);
    const int32_t* const count = static_cast<const int32_t*>(inputs[3]);
    const int64_t pixels = static_cast<int64_t>(prototypes.first.height) * prototypes.first.width;
    Half* const masks = static_cast<Half*>(outputs[0]);
    for (int64_t n = 0; n < prototypes.images; ++n) {
      const Features image = prototypes.image(n);
      const Instances instances = {
          coefficients + n * coefficients_size, boxes + n * capacity * 4, count + n,
          static_cast<int32_t>(capacity),       network_height_,          network_width_};
      const int32_t error = edgeseg_cuda_mask_assembly(
          &image, &instances, masks + n * capacity * pixels, kFloat16, stream);
      if (error != 0) return error;
    }
    return 0;
  }

  const int32_t network_height_;
  const int32_t network_width_;
};

}  // namespace

const Operator kMaskAssembly = {
    "EdgeSegMaskAssembly",
    {kAttributes, sizeof kAttributes / sizeof kAttributes[0]},
    [](const Attributes& attributes) -> Plugin* { return new MaskAssemblyPlugin(attributes); }};

}  // namespace edgeseg::plugins
