// TensorRT's tensors as the launchers see them.

#ifndef EDGESEG_PLUGINS_TENSORS_H_
#define EDGESEG_PLUGINS_TENSORS_H_

#include <NvInferRuntime.h>
#include <stdint.h>

#include "edgeseg/half.h"
#include "edgeseg/launchers.h"

namespace edgeseg::plugins {

inline bool is_linear(const nvinfer1::PluginTensorDesc& tensor, nvinfer1::DataType type) {
  return tensor.format == nvinfer1::TensorFormat::kLINEAR && tensor.type == type;
}

inline bool is_feature_type(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF;
}

// Whether the kernels read feature maps so: channels first, or, for half, channels last as
// TensorRT's convolutions write them, whose channels are padded to a multiple of eight. The other
// vector formats are for INT8, for DLA, or no layout that a convolution prefers.
inline bool is_features(const nvinfer1::PluginTensorDesc& tensor) {
  using nvinfer1::TensorFormat;
  return is_feature_type(tensor.type) &&
         (tensor.format == TensorFormat::kLINEAR ||
          (tensor.format == TensorFormat::kHWC8 && tensor.type == nvinfer1::DataType::kHALF));
}

// A batch of feature maps, (images, channels, height, width).
struct FeatureBatch {
  Features first;
  int64_t image_stride;  // elements
  int64_t images;

  // The layout has to be one of is_features().
  FeatureBatch(const nvinfer1::PluginTensorDesc& tensor, const void* data) {
    const auto extent = [&](int32_t axis) { return static_cast<int32_t>(tensor.dims.d[axis]); };
    const bool is_half = tensor.type == nvinfer1::DataType::kHALF;
    first = {data, is_half ? kFloat16 : kFloat32, extent(1), extent(2), extent(3), 0, 0};
    const int64_t pixels = static_cast<int64_t>(first.height) * first.width;
    if (tensor.format == nvinfer1::TensorFormat::kHWC8) {
      first.channel_stride = 1;
      first.pixel_stride = (static_cast<int64_t>(first.channels) + 7) / 8 * 8;
      image_stride = pixels * first.pixel_stride;
    } else {
      first.channel_stride = pixels;
      first.pixel_stride = 1;
      image_stride = pixels * first.channels;
    }
    images = tensor.dims.d[0];
  }

  int64_t element_size() const { return first.type == kFloat16 ? sizeof(Half) : sizeof(float); }

  Features image(int64_t index) const {
    Features features = first;
    features.data = static_cast<const char*>(first.data) + index * image_stride * element_size();
    return features;
  }
};

// Every extent that is known is from `least` to `most`; -1 is not known.
inline bool is_extent(int64_t extent, int64_t least, int64_t most) {
  return extent == -1 || (extent >= least && extent <= most);
}

inline bool may_be_equal(int64_t extent, int64_t other) {
  return extent == -1 || other == -1 || extent == other;
}

}  // namespace edgeseg::plugins

#endif  // EDGESEG_PLUGINS_TENSORS_H_
