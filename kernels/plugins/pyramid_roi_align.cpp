// EdgeSegPyramidRoiAlign: boxes (rois, 4) xyxy, image_of (rois), then one to eight feature maps
// (images, channels, h, w), one for each of the attribute's scales -> (rois, channels,
// output_height, output_width), the type of the features.

#include "edgeseg/pyramid_roi_align.h"

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

constexpr int32_t kBoxes = 0;
constexpr int32_t kImageOf = 1;
constexpr int32_t kFirstLevel = 2;

constexpr Attribute kAttributes[] = {
    {"output_height", Attribute::Kind::kInteger, 1, kMaxRoiBins},
    {"output_width", Attribute::Kind::kInteger, 1, kMaxRoiBins},
    {"sampling_ratio", Attribute::Kind::kInteger, 0, kMaxSamplingRatio},
    {"aligned", Attribute::Kind::kInteger, 0, 1},
    {"scales", Attribute::Kind::kNumbers, 0x1p-20, 0x1p20, std::nullopt, kMaxLevels},
    // Of Feature Pyramid Networks (Lin et al., 2017, equation 1); one level ignores them.
    {"canonical_size", Attribute::Kind::kNumber, 0x1p-20, 0x1p20, 224},
    {"canonical_level", Attribute::Kind::kInteger, -64, 64, 4},
    {"first_level", Attribute::Kind::kInteger, -64, 64, 2},
};

class PyramidRoiAlignPlugin final : public Plugin {
 public:
  explicit PyramidRoiAlignPlugin(const Attributes& attributes)
      : Plugin(kPyramidRoiAlign, attributes,
               kFirstLevel + static_cast<int32_t>(attributes.numbers("scales").size()), 1),
        scales_(attributes.numbers("scales")),
        canonical_size_(attributes.number("canonical_size")),
        canonical_level_(attributes.integer("canonical_level")),
        first_level_(attributes.integer("first_level")),
        pooling_{attributes.integer("output_height"), attributes.integer("output_width"),
                 attributes.integer("sampling_ratio"),
                 attributes.integer("aligned") != 0 ? kAligned : 0} {}

 private:
  void check_shapes(const Dims* inputs) const override {
    const Dims& boxes = inputs[kBoxes];
    const Dims& image_of = inputs[kImageOf];
    const Dims& first = inputs[kFirstLevel];
    require(boxes.nbDims == 2 && is_extent(boxes.d[0], 0, INT32_MAX) && may_be_equal(boxes.d[1], 4),
            "boxes must be (rois, 4)", boxes);
    require(image_of.nbDims == 1 && may_be_equal(image_of.d[0], boxes.d[0]),
            "image_of must be (rois) for boxes " + written(boxes), image_of);
    for (int32_t i = kFirstLevel; i < this->inputs(); ++i) {
      const Dims& level = inputs[i];
      require(level.nbDims == 4 && is_extent(level.d[0], 0, INT32_MAX) &&
                  is_extent(level.d[1], 1, INT32_MAX) && is_extent(level.d[2], 1, kMaxMapSide) &&
                  is_extent(level.d[3], 1, kMaxMapSide),
              "each level must be (images, channels, height, width), the last three at least 1",
              level);
      require(may_be_equal(level.d[0], first.d[0]) && may_be_equal(level.d[1], first.d[1]),
              "all levels must have the images and channels of the first, " + written(first),
              level);
    }
  }

  void choose_types(const DataType* inputs, DataType* outputs) const override {
    if (inputs[kBoxes] != DataType::kFLOAT || inputs[kImageOf] != DataType::kINT32) {
      throw std::invalid_argument(
          "boxes must be float32 and image_of int32; cast them in the graph.");
    }
    for (int32_t i = kFirstLevel; i < this->inputs(); ++i) {
      if (!is_feature_type(inputs[i]) || inputs[i] != inputs[kFirstLevel]) {
        throw std::invalid_argument(
            "levels must all be float32 or all be half; cast them in the graph.");
      }
    }
    outputs[0] = inputs[kFirstLevel];
  }

  void choose_shapes(const DimsExprs* inputs, DimsExprs* outputs,
                     nvinfer1::IExprBuilder& expressions) const override {
    outputs[0].nbDims = 4;
    outputs[0].d[0] = inputs[kBoxes].d[0];
    outputs[0].d[1] = inputs[kFirstLevel].d[1];
    outputs[0].d[2] = expressions.constant(pooling_.height);
    outputs[0].d[3] = expressions.constant(pooling_.width);
  }

  // One layout for all levels: they come from alike convolutions, and each further combination
  // would have to be timed.
  bool supports(int32_t position, const DynamicPluginTensorDesc* tensors) const override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    const PluginTensorDesc& first = tensors[kFirstLevel].desc;
    if (position == kBoxes) return is_linear(tensor, DataType::kFLOAT);
    if (position == kImageOf) return is_linear(tensor, DataType::kINT32);
    if (position == kFirstLevel) return is_features(tensor);
    if (position < inputs()) return tensor.type == first.type && tensor.format == first.format;
    return is_linear(tensor, first.type);
  }

  int32_t queue(const PluginTensorDesc* input_desc, const void* const* inputs, void* const* outputs,
                void* stream) const override {
    const int64_t rois = input_desc[kBoxes].dims.d[0];
    if (rois == 0) return 0;
    Pyramid pyramid = {};
    pyramid.level_count = static_cast<int32_t>(scales_.size());
    for (int32_t i = 0; i < pyramid.level_count; ++i) {
      const FeatureBatch level(input_desc[kFirstLevel + i], inputs[kFirstLevel + i]);
      pyramid.levels[i] = level.first;
      pyramid.image_strides[i] = level.image_stride;
      pyramid.scales[i] = scales_[i];
      pyramid.images = static_cast<int32_t>(level.images);
    }
    if (pyramid.images == 0) {
      throw std::invalid_argument("there are " + std::to_string(rois) +
                                  " boxes, but no image in the levels.");
    }
    pyramid.canonical_size = canonical_size_;
    pyramid.canonical_level = canonical_level_;
    pyramid.first_level = first_level_;
    return edgeseg_cuda_pyramid_roi_align(&pyramid, static_cast<const float*>(inputs[kBoxes]),
                                          static_cast<const int32_t*>(inputs[kImageOf]),
                                          static_cast<int32_t>(rois), &pooling_, outputs[0],
                                          stream);
  }

  const std::vector<float> scales_;
  const float canonical_size_;
  const int32_t canonical_level_;
  const int32_t first_level_;
  const RoiPooling pooling_;
};

}  // namespace

const Operator kPyramidRoiAlign = {
    "EdgeSegPyramidRoiAlign",
    {kAttributes, sizeof kAttributes / sizeof kAttributes[0]},
    [](const Attributes& attributes) -> Plugin* { return new PyramidRoiAlignPlugin(attributes); }};

}  // namespace edgeseg::plugins
