// The arithmetic of EdgeSegMaskAssembly: prototypes and coefficients to one mask per instance
// (YOLACT, arXiv:1904.02689, section 3).
//
// Everything that decides a result is here, once: the CPU library and the CUDA kernels both include
// this file and add only loops. Build both without fused multiply-add (-ffp-contract=off, nvcc
// -fmad=false) and they agree bit for bit.
//
// Definition, for prototypes (channels, height, width), instance k with its coefficients and box:
//   logit(y, x) = sum over c, in rising order, of prototypes[c, y, x] * coefficients[k, c]
//   p(y, x)     = sigmoid(logit(y, x)) inside the box, 0 outside; NaN logits give 0
//   level(y, x) = round(255 * p(y, x))
//   bit(i, j)   = whether p, interpolated bilinearly at the place where the centre of the frame's
//                 pixel (i, j) lands, is above the threshold
// Inside: the box's sides, scaled from network pixels to prototypes, ordered and widened by 1 each
// way, are low and high, and a sample x is inside if low <= x < high. A box of no size thus keeps
// the samples around it; one outside of the map, or with a NaN, has none.
//
// Exact short cut. Bilinear interpolation is a convex combination, so a cell whose four corners are
// above the threshold, or all not, needs no arithmetic, provided that they are further from it than
// rounding can bridge: see Limits.

#ifndef EDGESEG_MASK_ASSEMBLY_H_
#define EDGESEG_MASK_ASSEMBLY_H_

#include <stdint.h>

#include <numeric>

#include "edgeseg/host_device.h"
#include "edgeseg/upsample_argmax.h"

namespace edgeseg {

// Sides of prototypes, network input and frame: keeps every product in FrameAxis below 2^63.
constexpr int32_t kMaxMaskSide = 1 << 20;

// More than any prototype network has; keeps offsets of one sample small.
constexpr int32_t kMaxPrototypes = 4096;

// Samples begin to end - 1 of one axis.
struct Span {
  int32_t begin, end;

  EDGESEG_HD bool is_empty() const { return begin >= end; }
  EDGESEG_HD bool contains(int32_t sample) const { return begin <= sample && sample < end; }
};

// The samples of an axis of `samples`, stretched over `network` pixels, that a box from `a` to `b`
// in network pixels keeps.
EDGESEG_HD Span crop_span(float a, float b, int32_t samples, int32_t network) {
  const float size = static_cast<float>(samples);
  const float from = a * size / static_cast<float>(network);
  const float to = b * size / static_cast<float>(network);
  // Written so that a NaN keeps nothing.
  if (!(from <= to) && !(to < from)) return {0, 0};
  const float least = (from < to ? from : to) - 1.0f;
  const float most = (from < to ? to : from) + 1.0f;
  const float low = least > 0.0f ? least : 0.0f;
  const float high = most < size ? most : size;
  if (!(low < high)) return {0, 0};
  // low <= i < high for whole i is ceil(low) <= i < ceil(high).
  int32_t begin = static_cast<int32_t>(low);
  int32_t end = static_cast<int32_t>(high);
  begin += static_cast<float>(begin) < low;
  end += static_cast<float>(end) < high;
  return {begin, end};
}

// The samples that a mask may have.
struct Crop {
  Span y, x;

  EDGESEG_HD bool is_empty() const { return y.is_empty() || x.is_empty(); }
};

// `box`: xyxy in network pixels.
EDGESEG_HD Crop crop_of(const float* box, int32_t height, int32_t width, int32_t network_height,
                        int32_t network_width) {
  return {crop_span(box[1], box[3], height, network_height),
          crop_span(box[0], box[2], width, network_width)};
}

// 1 / (1 + e^-logit), 0 for NaN; within 4 units in the last place.
template <class F>
EDGESEG_HD F sigmoid(F logit) {
  const F zero = splat<F>(0.0f);
  const F one = splat<F>(1.0f);
  const auto positive = logit > zero;
  const F e = exp_nonpositive(positive ? zero - logit : logit);
  return (positive ? one : e) / (one + e);
}

// round(255 * p), 0 to 255.
template <class F>
EDGESEG_HD typename Lanes<F>::Int mask_level(F probability) {
  return Lanes<F>::truncate(probability * 255.0f + 0.5f);
}

// Corners beyond a limit decide a cell without arithmetic. Interpolation weighs the four corners by
// numbers that add up to 1 + e, |e| <= 10 * 2^-24, or loses a denormal; the room here is 33 *
// 2^-24.
struct Limits {
  float above;  // a larger probability stays above the threshold
  float below;  // a smaller one stays at or below it
};

EDGESEG_HD Limits limits_of(float threshold) {
  const float room = 2e-6f * threshold + 1e-30f;
  return {threshold + room, threshold - room};
}

// One axis on the way from the frame's pixels to the prototypes: `positions` pixels of the frame
// land on a part of the network's input, over all of which `samples` prototypes are stretched. The
// place of a pixel's centre among the samples is (position * step + offset) / denominator, a
// fraction of integers, so it is exact for any size and the same on every machine. It is clamped to
// the first and the last sample.
//
// Cell i is what lies between samples i and far(i); the last cell has both at the last sample.
struct FrameAxis {
  int32_t samples;
  int32_t positions;
  int64_t step, offset, denominator;

  EDGESEG_HD int64_t numerator(int32_t position) const {
    const int64_t exact = position * step + offset;
    const int64_t last = (samples - 1) * denominator;
    return exact < 0 ? 0 : (exact > last ? last : exact);
  }

  EDGESEG_HD int32_t cell(int32_t position) const {
    return static_cast<int32_t>(quotient(numerator(position), denominator));
  }

  // The first position that is in `cell` or after it, for cell 0 to samples: the positions of a
  // cell are begin(cell) to begin(cell + 1) - 1, which may be none.
  EDGESEG_HD int32_t begin(int32_t cell) const {
    if (cell <= 0) return 0;
    if (cell >= samples) return positions;
    const int64_t up = cell * denominator - offset;
    if (up <= 0) return 0;
    const int64_t first = quotient(up + step - 1, step);
    return first < positions ? static_cast<int32_t>(first) : positions;
  }

  // The positions whose interpolation sees a sample of `span`, which is not empty.
  EDGESEG_HD Span positions_of(Span span) const { return {begin(span.begin - 1), begin(span.end)}; }

  EDGESEG_HD int32_t far(int32_t cell) const { return cell + 1 < samples ? cell + 1 : samples - 1; }

  // Weights, in [0, 1], of the two samples of the cell that `position` is in.
  EDGESEG_HD float near_weight(int32_t position, int32_t cell) const {
    return static_cast<float>((cell + 1) * denominator - numerator(position)) /
           static_cast<float>(denominator);
  }
  EDGESEG_HD float far_weight(int32_t position, int32_t cell) const {
    return static_cast<float>(numerator(position) - cell * denominator) /
           static_cast<float>(denominator);
  }
};

// `frame` pixels land on `inner` pixels, from `start` on, of `network` ones.
inline FrameAxis frame_axis(int32_t samples, int32_t network, int32_t start, int32_t inner,
                            int32_t frame) {
  // With half-pixel centres everywhere:
  //   ((position + 1/2) * inner / frame + start) * samples / network - 1/2.
  const int64_t denominator = 2 * static_cast<int64_t>(frame) * network;
  const int64_t step = 2 * static_cast<int64_t>(inner) * samples;
  const int64_t offset = static_cast<int64_t>(inner) * samples +
                         2 * static_cast<int64_t>(start) * frame * samples -
                         static_cast<int64_t>(frame) * network;
  // Smaller numbers are exact in float32 where large ones would be rounded.
  const int64_t common = std::gcd(std::gcd(step, denominator), offset);
  return {samples, frame, step / common, offset / common, denominator / common};
}

// Whether a bilinear value can be computed at all: thresholds of 0 and 1 leave no room for Limits,
// and a mask of "above 0" would be the box.
EDGESEG_HD bool is_threshold(float threshold) { return threshold > 0.0f && threshold < 1.0f; }

}  // namespace edgeseg

#endif  // EDGESEG_MASK_ASSEMBLY_H_
