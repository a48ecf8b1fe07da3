// Positions of one grid on another as exact integers: floor((first + position * step) / divisor).
//
// A sampling position is a fraction of integers. Its whole part and its rounded fraction come from
// one integer division, so they are the same on every machine and for any size; the division is by
// a number that stays the same for a whole picture, and so becomes a multiplication.

#ifndef EDGESEG_RATIONAL_LINE_H_
#define EDGESEG_RATIONAL_LINE_H_

#include <stdint.h>

#include "edgeseg/host_device.h"

namespace edgeseg {

// The upper half of the 128 bits of a * b.
EDGESEG_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// For positions from 0, with first + position * step below 2^63 and 2 <= divisor.
struct RationalLine {
  uint64_t first;
  uint64_t step;
  uint64_t divisor;
  uint64_t reciprocal;      // floor((2^64 - 1) / divisor)
  uint64_t step_quotient;   // step / divisor
  uint64_t step_remainder;  // step % divisor

  // What the line gives at a position, and what the division leaves.
  struct Point {
    uint64_t quotient;
    uint64_t remainder;
  };

  static EDGESEG_HD RationalLine through(uint64_t first, uint64_t step, uint64_t divisor) {
    return {first, step, divisor, ~uint64_t{0} / divisor, step / divisor, step % divisor};
  }

  EDGESEG_HD Point point(int32_t position) const {
    const uint64_t numerator = first + static_cast<uint64_t>(position) * step;
    // The reciprocal is short of 2^64 / divisor by at most 1, so the product is short of the true
    // quotient by less than numerator / 2^64 < 1: the estimate is right, or one too low.
    const uint64_t estimate = multiply_high(numerator, reciprocal);
    const uint64_t remainder = numerator - estimate * divisor;
    if (remainder >= divisor) return {estimate + 1, remainder - divisor};
    return {estimate, remainder};
  }

  EDGESEG_HD uint64_t at(int32_t position) const { return point(position).quotient; }

  // The next position's point, without a multiplication.
  EDGESEG_HD Point after(const Point& point) const {
    const uint64_t remainder = point.remainder + step_remainder;
    const uint64_t quotient = point.quotient + step_quotient;
    if (remainder >= divisor) return {quotient + 1, remainder - divisor};
    return {quotient, remainder};
  }
};

}  // namespace edgeseg

#endif  // EDGESEG_RATIONAL_LINE_H_
