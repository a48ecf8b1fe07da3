// The arithmetic of EdgeSegUpsampleArgmax: bilinear upsampling of class logits, then the argmax.
//
// Everything that decides a result is here, once: the CPU library and the CUDA kernel both include
// this file and add only loops. Build both without fused multiply-add (-ffp-contract=off, nvcc
// -fmad=false) and they agree bit for bit.
//
// Definition, for logits (classes, height, width) float32:
//   value(c, y, x)  = bilinear interpolation of logits[c] at the source position of (y, x)
//   class_map(y, x) = the lowest c among those whose value is the largest
//   confidence(y, x) = round(255 * softmax(value)[class_map(y, x)])
// NaN never wins and adds nothing to the softmax; where no value is above minus infinity the class
// is 0 and the confidence is 0.
//
// Exact short cuts. For weights >= 0, lerp() below is monotone in both ends even after rounding, so
// a class that is below another one at the four corners of a low-resolution cell is not above it
// anywhere inside. Rounding can still make two values equal, and then the lower index must win, so
// a class counts as beaten only when it is below by more than rounding can bridge: see
// beaten_below().

#ifndef EDGESEG_UPSAMPLE_ARGMAX_H_
#define EDGESEG_UPSAMPLE_ARGMAX_H_

#include <stdint.h>
#include <string.h>

#include "edgeseg/host_device.h"

namespace edgeseg {

// Results are uint8, and 255 stays free for "no class".
constexpr int32_t kMaxClasses = 255;

// A side of 2^22 keeps every numerator below 2^63 and every denominator exact in float32.
constexpr int32_t kMaxSide = 1 << 22;

// Below every float32 that can win.
constexpr float kMinusInfinity = -__builtin_huge_valf();

// Flags of the extern "C" entry points.
constexpr int32_t kAlignCorners = 1;  // else half-pixel centres
constexpr int32_t kNoShortCut = 2;    // every class at every pixel: the reference for tests

// Rounded down, for a >= 0 and b > 0. A GPU divides 32 bits in a quarter of the time of 64.
EDGESEG_HD int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// One axis of the upsampling: `source` samples stretched to `target` positions. The source position
// of a target position is a fraction of integers, so it is exact for any factor and the same on
// every machine. Half-pixel positions are clamped to the first and last sample (PyTorch
// align_corners=False, ONNX half_pixel).
//
// Cell i is what lies between samples i and far(i); the last cell has both at the last sample.
struct Grid {
  int32_t source;
  int32_t target;
  bool align_corners;

  EDGESEG_HD int64_t denominator() const {
    if (!align_corners) return 2 * static_cast<int64_t>(target);
    return target > 1 ? target - 1 : 1;
  }

  EDGESEG_HD int64_t numerator(int32_t position) const {
    const int64_t p = position;
    if (align_corners) return target > 1 ? p * (source - 1) : 0;
    const int64_t exact = (2 * p + 1) * source - target;
    const int64_t last = (source - 1) * denominator();
    return exact < 0 ? 0 : (exact > last ? last : exact);
  }

  // The first position that is in `cell` or after it, for cell 0 to source: the positions of a
  // cell are begin(cell) to begin(cell + 1) - 1, which may be none.
  EDGESEG_HD int32_t begin(int32_t cell) const {
    if (cell <= 0) return 0;
    if (cell >= source) return target;
    int64_t up;
    int64_t down;
    if (align_corners) {
      if (target == 1) return target;
      up = static_cast<int64_t>(cell) * (target - 1);
      down = source - 1;
    } else {
      up = (2 * static_cast<int64_t>(cell) + 1) * target - source;
      down = 2 * static_cast<int64_t>(source);
    }
    if (up <= 0) return 0;
    const int64_t first = quotient(up + down - 1, down);
    return first < target ? static_cast<int32_t>(first) : target;
  }

  // The cell that `position` is in.
  EDGESEG_HD int32_t cell(int32_t position) const {
    return static_cast<int32_t>(quotient(numerator(position), denominator()));
  }

  EDGESEG_HD int32_t far(int32_t cell) const { return cell + 1 < source ? cell + 1 : source - 1; }

  // Weights, in [0, 1], of the two samples of the cell that `position` is in.
  EDGESEG_HD float near_weight(int32_t position, int32_t cell) const {
    return static_cast<float>((cell + 1) * denominator() - numerator(position)) /
           static_cast<float>(denominator());
  }
  EDGESEG_HD float far_weight(int32_t position, int32_t cell) const {
    return static_cast<float>(numerator(position) - cell * denominator()) /
           static_cast<float>(denominator());
  }
};

// The functions below work on one value or on several side by side: F is float, or a vector of
// floats of the compiler, for which Lanes gives the integers that go with it. Comparisons give a
// bool or a vector of masks, and ?: takes either.
template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = int32_t;
  static EDGESEG_HD Int truncate(float x) { return static_cast<int32_t>(x); }
  static EDGESEG_HD float convert(Int x) { return static_cast<float>(x); }
  static EDGESEG_HD float from_bits(Int bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

template <class F>
EDGESEG_HD F splat(float x) {
  return F{} + x;
}

// Written as a sum of two products, not a + w * (b - a): only this form is monotone in a and b
// after rounding, which the short cuts rest on.
template <class F>
EDGESEG_HD F lerp(F near_weight, F near, F far_weight, F far) {
  return near_weight * near + far_weight * far;
}

// The running argmax of one pixel. Classes come in rising order; written as value > best so that
// NaN loses and the lower index wins a tie.
template <class F>
struct Winner {
  F value;
  typename Lanes<F>::Int index;

  EDGESEG_HD void start() {
    value = splat<F>(kMinusInfinity);
    index = typename Lanes<F>::Int{};
  }
  EDGESEG_HD void offer(F candidate, int32_t candidate_index) {
    const auto wins = candidate > value;
    index = wins ? typename Lanes<F>::Int{} + candidate_index : index;
    value = wins ? candidate : value;
  }
};

// A class whose corner value is below this, at all four corners, stays strictly below the class
// with corner values `value` in the whole cell. Interpolation multiplies each corner by (1 + e)
// with |e| <= 4.1 * 2^-24, or loses a denormal; 1e-6 is 16 * 2^-24 and covers both classes. Values
// near overflow (or infinite, or NaN) beat nobody: their interpolation may not be finite.
EDGESEG_HD float beaten_below(float value) {
  const float magnitude = value < 0.0f ? -value : value;
  return magnitude < 1e38f ? value - (1e-6f * magnitude + 1e-30f) : kMinusInfinity;
}

// e^x for x <= 0 (0 for NaN and below -87), to 2 units in the last place: the polynomial of
// Cephes' expf. The library's expf differs between host and device.
template <class F>
EDGESEG_HD F exp_nonpositive(F x) {
  using L = Lanes<F>;
  const auto normal = x > splat<F>(-87.0f);
  const F safe = normal ? x : splat<F>(0.0f);
  // Truncation rounds towards zero, which for x <= 0 makes this the nearest integer to x / ln 2.
  const auto power = L::truncate(safe * 1.44269504088896341f - 0.5f);
  const F scaled = L::convert(power);
  const F r = (safe - scaled * 0.693359375f) + scaled * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return normal ? p * L::from_bits((power + 127) * (1 << 23)) : splat<F>(0.0f);
}

// `sum` is the sum over all classes of e^(value - best), so at least 1 when the winner is finite.
template <class F>
EDGESEG_HD typename Lanes<F>::Int confidence_level(F sum) {
  const F one = splat<F>(1.0f);
  const auto finite = sum >= one;
  const F level = 255.0f / (finite ? sum : one) + 0.5f;
  return Lanes<F>::truncate(finite ? level : splat<F>(0.0f));
}

// e^x is convex, so the sum above, taken for one winner at the four corners of a cell, is nowhere
// inside larger than at the worst corner. Below 255 / 254.5 = 1.00196 the level is 255; the rest
// is room for rounding, enough for logits up to 1e4.
EDGESEG_HD bool is_saturated(float best, float sum) {
  return best < 1e4f && best > -1e4f && sum >= 1.0f && sum < 1.0019f;
}

}  // namespace edgeseg

#endif  // EDGESEG_UPSAMPLE_ARGMAX_H_
