// IEEE 754 binary16 as bits, with the two conversions; the same results on CPU and GPU.

#ifndef EDGESEG_HALF_H_
#define EDGESEG_HALF_H_

#include <stdint.h>
#include <string.h>

#include "edgeseg/host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace edgeseg {

// Same size and bits as CUDA's __half and numpy's float16.
struct Half {
  uint16_t bits;
};

EDGESEG_HD float to_float(float value) { return value; }

EDGESEG_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  float result;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {
    // Shifting puts the exponent 112 too low, denormals included: one exact product mends both.
    bits = magnitude << 13;
    memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;
    memcpy(&bits, &result, sizeof bits);
  }
  bits |= sign;
  memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

// Round to nearest, ties to even; what is too large becomes infinity.
EDGESEG_HD Half to_half(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7fffu)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Denormal: adding 0.5 leaves as many bits of the fraction as binary16 has there, rounded.
    float small;
    memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    memcpy(&magnitude, &small, sizeof magnitude);
    return {static_cast<uint16_t>(sign | (magnitude - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  magnitude += 0xc8000fffu + odd;  // the exponent 112 lower, and just under a half for rounding
  return {static_cast<uint16_t>(sign | (magnitude >> 13))};
#endif
}

}  // namespace edgeseg

#endif  // EDGESEG_HALF_H_
