// The arithmetic of EdgeSegPyramidRoiAlign: boxes pooled from the level of a feature pyramid that
// fits their size (RoIAlign of He et al., Mask R-CNN, 2017; levels as in Lin et al., FPN, 2017).
//
// Everything that decides a result is here, once: the CPU library and the CUDA kernels both include
// this file and add only loops. Build both without fused multiply-add (-ffp-contract=off, nvcc
// -fmad=false) and keep the order of sums below, and they agree bit for bit.
//
// Definition, for a box (x1, y1, x2, y2) float32:
//   level   = floor(canonical_level + log2(sqrt(area) / canonical_size) + 1e-6), kept within the
//             levels that there are; area = (x2 - x1) * (y2 - y1) in float32. No area, a negative
//             one too, means the first level. This is torchvision's rule; see LevelRule.
//   start   = x1 * scale - (aligned ? 0.5 : 0), and the same for the end; size = end - start, at
//             least 1 unless aligned. ONNX calls aligned half_pixel, otherwise output_half_pixel.
//   bins    : the size is cut into equal ones, each sampled at `grid` evenly spaced points inside;
//             grid = sampling_ratio, or ceil(size / bins) where that is 0.
//   sample  : 0 below -1 and above the map's size; else the position is moved into the map, and
//             interpolated linearly between two pixels.
//   output  = mean over the samples of a bin, each bilinear: linear in y times linear in x. ONNX's
//             mode "max" is not here.
//
// What the definition leaves open, or other implementations leave to chance:
// - NaN or infinity in a box, or a size that overflows float32: zeros.
// - An image index outside the batch: zeros.
// - x2 < x1 or y2 < y1 (inverted): where not aligned, the size is 1. Where aligned, sampling_ratio
//   0 gives an empty grid and so zeros; otherwise the samples walk backwards and the output is
//   mirrored. A box of size 0 is no special case: size 1 where not aligned; where aligned, zeros
//   for sampling_ratio 0, and otherwise all samples in one place.
// - Adaptive sampling has at most 2^22 samples a bin each way, as float32 cannot number more. A bin
//   of more pixels is sampled more sparsely; the map is then at most a 2^-22th of it for each of
//   the map's pixels, so that what comes out is next to nothing either way. Samples outside the
//   map are skipped, not visited: an enormous box costs no more than the map.
//
// Order of sums. A sample's weight for a pixel is a product of one weight for y and one for x, so
// the mean is separable: the samples of a bin are first merged, along each axis, into weights of
// pixels (Taps), and then
//   output = sum over x taps of weight_x * (sum over y taps of weight_y * feature),
// both from 0 and in the order of the taps.

#ifndef EDGESEG_PYRAMID_ROI_ALIGN_H_
#define EDGESEG_PYRAMID_ROI_ALIGN_H_

#include <math.h>
#include <stdint.h>

#include "edgeseg/host_device.h"
#include "edgeseg/launchers.h"

namespace edgeseg {

constexpr int32_t kAligned = 1;  // flag of the entry points: half-pixel centres

constexpr int32_t kMaxRoiBins = 1024;          // of the output, each way
constexpr int32_t kMaxSamplingRatio = 1024;    // each way
constexpr int32_t kMaxAdaptiveGrid = 1 << 22;  // i + 0.5 is exact in float32 below 2^23
constexpr int32_t kMaxMapSide = 1 << 22;

// Which level a box belongs to. log2f differs between machines, so areas are compared with the
// smallest float32 areas of each level: equal to the definition in exact arithmetic.
struct LevelRule {
  int32_t last;
  float least_area[kMaxLevels - 1] = {};  // of levels 1 to last

  // Host only. Levels and sizes of `pyramid` must have been checked.
  explicit LevelRule(const Pyramid& pyramid) : last(pyramid.level_count - 1) {
    // level >= L where area >= (canonical_size * 2^(L - canonical_level - 1e-6))^2.
    constexpr double kNudge = 0.9999986137065998;  // 2^-2e-6
    const double size = pyramid.canonical_size;
    for (int32_t i = 0; i < last; ++i) {
      const int64_t steps = int64_t{pyramid.first_level} + i + 1 - pyramid.canonical_level;
      const int exponent = static_cast<int>(steps < -500 ? -1000 : steps > 500 ? 1000 : 2 * steps);
      const double least = ldexp(size * size * kNudge, exponent);
      least_area[i] = static_cast<float>(least);
      if (least_area[i] < least) least_area[i] = nextafterf(least_area[i], HUGE_VALF);
    }
  }

  EDGESEG_HD int32_t level(float x1, float y1, float x2, float y2) const {
    const float area = (x2 - x1) * (y2 - y1);
    int32_t level = 0;
    for (int32_t i = 0; i < kMaxLevels - 1; ++i) level += i < last && area >= least_area[i];
    return level;
  }
};

EDGESEG_HD bool is_finite_number(float value) {
  constexpr float kMost = 3.402823466e38f;
  return value >= -kMost && value <= kMost;
}

// One axis of a box in the coordinates of its level.
struct RoiAxis {
  float start;
  float size;
  float bin;
  int32_t grid;  // samples a bin; 0 or less: none

  EDGESEG_HD bool is_finite() const { return is_finite_number(start) && is_finite_number(size); }

  // The reference's expression, so that rounding puts samples on the same side of the map's edge.
  EDGESEG_HD float position(int32_t bin_index, int32_t sample) const {
    return start + static_cast<float>(bin_index) * bin +
           (static_cast<float>(sample) + 0.5f) * bin / static_cast<float>(grid);
  }

  // The first sample of the bin whose position is at least `limit`, or above it; bin > 0.
  EDGESEG_HD int32_t first_sample(int32_t bin_index, float limit, bool above) const {
    int32_t low = 0;
    int32_t high = grid;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      const float at = position(bin_index, middle);
      if (above ? at > limit : at >= limit) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

EDGESEG_HD RoiAxis make_roi_axis(float low, float high, float scale, int32_t bins,
                                 int32_t sampling_ratio, bool aligned) {
  const float offset = aligned ? 0.5f : 0.0f;
  RoiAxis axis;
  axis.start = low * scale - offset;
  axis.size = (high * scale - offset) - axis.start;
  // Only a finite size, or a box that ends at minus infinity would become one.
  if (!aligned && is_finite_number(axis.size) && axis.size < 1.0f) axis.size = 1.0f;
  axis.bin = axis.size / static_cast<float>(bins);
  axis.grid = sampling_ratio;
  if (sampling_ratio == 0 && axis.is_finite()) {
    if (axis.bin < static_cast<float>(kMaxAdaptiveGrid)) {
      const float least = axis.bin < 0.0f ? 0.0f : axis.bin;
      axis.grid = static_cast<int32_t>(least);
      axis.grid += static_cast<float>(axis.grid) < least;
    } else {
      axis.grid = kMaxAdaptiveGrid;
    }
  }
  return axis;
}

// The two pixels around a position, and their weights; one pixel twice at the far border.
struct PixelPair {
  int32_t near, far;
  float near_weight, far_weight;

  // False where a sample counts as 0.
  EDGESEG_HD bool find(float position, int32_t size) {
    // Written so that NaN is outside.
    if (!(position >= -1.0f && position <= static_cast<float>(size))) return false;
    if (position < 0.0f) position = 0.0f;
    near = static_cast<int32_t>(position);
    if (near >= size - 1) {
      near = far = size - 1;
      far_weight = 0.0f;
    } else {
      far = near + 1;
      far_weight = position - static_cast<float>(near);
    }
    near_weight = 1.0f - far_weight;
    return true;
  }
};

// The pixels that a bin reads along one axis, with their share of its mean. Neighbouring samples
// share pixels, so there are fewer taps than twice the samples.
class Taps {
 public:
  EDGESEG_HD Taps(const RoiAxis& axis, int32_t bin, int32_t size)
      : axis_(axis), bin_(bin), size_(size), sample_(0), end_(axis.grid < 0 ? 0 : axis.grid) {
    constexpr int32_t kManySamples = 64;
    if (axis.bin > 0.0f && axis.grid > kManySamples) {
      sample_ = axis.first_sample(bin, -1.0f, false);
      end_ = axis.first_sample(bin, static_cast<float>(size), true);
    }
  }

  // The next tap; false after the last one.
  EDGESEG_HD bool next(int32_t* pixel, float* weight) {
    for (; sample_ < end_; ++sample_) {
      PixelPair pair;
      if (!pair.find(axis_.position(bin_, sample_), size_)) continue;
      if (pending_ != 0 && pair.near != near_) break;
      near_ = pair.near;
      near_weight_ = pending_ != 0 ? near_weight_ + pair.near_weight : pair.near_weight;
      if (pair.far != pair.near) {
        far_ = pair.far;
        far_weight_ = pending_ == 2 ? far_weight_ + pair.far_weight : pair.far_weight;
        pending_ = 2;
      } else if (pending_ == 0) {
        pending_ = 1;
      }
    }
    if (pending_ == 0) return false;
    *pixel = near_;
    *weight = near_weight_ / static_cast<float>(axis_.grid);
    near_ = far_;
    near_weight_ = far_weight_;
    --pending_;
    return true;
  }

 private:
  RoiAxis axis_;
  int32_t bin_, size_;
  int32_t sample_, end_;
  int32_t pending_ = 0;  // taps that the next sample may add to: none, near, or near and far
  int32_t near_ = 0, far_ = 0;
  float near_weight_ = 0.0f, far_weight_ = 0.0f;
};

// A box on its level.
struct Roi {
  int32_t level;
  int32_t image;
  bool is_empty;  // all zeros
  RoiAxis x, y;
};

EDGESEG_HD Roi make_roi(const Pyramid& pyramid, const LevelRule& rule, const RoiPooling& pooling,
                        const float box[4], int32_t image) {
  const float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  const bool aligned = (pooling.flags & kAligned) != 0;
  const int32_t ratio = pooling.sampling_ratio;
  Roi roi;
  roi.level = rule.level(x1, y1, x2, y2);
  roi.image = image;
  const float scale = pyramid.scales[roi.level];
  roi.x = make_roi_axis(x1, x2, scale, pooling.width, ratio, aligned);
  roi.y = make_roi_axis(y1, y2, scale, pooling.height, ratio, aligned);
  roi.is_empty = image < 0 || image >= pyramid.images || !roi.x.is_finite() || !roi.y.is_finite() ||
                 roi.x.grid <= 0 || roi.y.grid <= 0;
  return roi;
}

// Whether the entry points take it; host only. All levels of one type with `channels` the same,
// and each image of a level within 2^31 elements, so that offsets in it fit 32 bits.
inline bool is_valid(const Pyramid& pyramid, const RoiPooling& pooling, int32_t known_flags) {
  constexpr int64_t kMaxElements = INT32_MAX;
  if (pyramid.level_count < 1 || pyramid.level_count > kMaxLevels || pyramid.images < 1) {
    return false;
  }
  for (int32_t i = 0; i < pyramid.level_count; ++i) {
    const Features& level = pyramid.levels[i];
    if (level.data == nullptr || level.type != pyramid.levels[0].type ||
        level.channels != pyramid.levels[0].channels || level.channels < 1 || level.height < 1 ||
        level.width < 1 || level.height > kMaxMapSide || level.width > kMaxMapSide ||
        level.channel_stride < 1 || level.channel_stride > kMaxElements || level.pixel_stride < 1 ||
        level.pixel_stride > kMaxElements || pyramid.image_strides[i] < 0) {
      return false;
    }
    const int64_t pixels = static_cast<int64_t>(level.height) * level.width;
    // Each side is at most 2^31 before it is multiplied: no product below overflows.
    if (pixels > kMaxElements) return false;
    const int64_t last =
        (level.channels - 1) * level.channel_stride + (pixels - 1) * level.pixel_stride;
    if (last >= kMaxElements) return false;
    if (!(pyramid.scales[i] > 0.0f && pyramid.scales[i] < HUGE_VALF)) return false;
  }
  if (pyramid.level_count > 1 &&
      !(pyramid.canonical_size > 0.0f && pyramid.canonical_size < HUGE_VALF)) {
    return false;
  }
  return pooling.height >= 1 && pooling.height <= kMaxRoiBins && pooling.width >= 1 &&
         pooling.width <= kMaxRoiBins && pooling.sampling_ratio >= 0 &&
         pooling.sampling_ratio <= kMaxSamplingRatio && (pooling.flags & ~known_flags) == 0;
}

}  // namespace edgeseg

#endif  // EDGESEG_PYRAMID_ROI_ALIGN_H_
