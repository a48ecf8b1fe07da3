// The arithmetic of fit_frame: a camera's frame to the network's input.
//
// Everything that decides a result is here, once; the CPU library and the CUDA kernel both include
// this file, and agree bit for bit because all of it is integers.
//
// Definition, for an output pixel inside the inner rectangle:
//   position = (p + 1/2) * frame side / inner side - 1/2, along each axis, clamped to the frame,
//              rounded to 2^-14 of a sample
//   sample   = the frame's pixel in BGR, 8 bits a channel
//   across   = the two samples of a row, weighted, rounded to 7 bits of fraction
//   level    = the two rows, weighted, rounded to a whole level
// and 114 outside. Smaller sizes are sampled without antialiasing. This is cv::resize with
// INTER_LINEAR, which rounds its weights to 11 bits, up to one level; where nothing is resized the
// samples come out as they are.
//
// YUV formats hold BT.601 in limited range, and each pixel takes the chroma of the pair or square
// that it is in, without interpolation. The conversion is that of cv::cvtColor (COLOR_YUV2BGR_NV12,
// COLOR_YUV2BGR_YUYV), to the bit.

#ifndef EDGESEG_FIT_FRAME_H_
#define EDGESEG_FIT_FRAME_H_

#include <stdint.h>

#include "edgeseg/host_device.h"
#include "edgeseg/launchers.h"
#include "edgeseg/rational_line.h"

namespace edgeseg {

// A side of 2^22 keeps every numerator of a position below 2^60.
constexpr int32_t kMaxFrameSide = 1 << 22;

// The level of the padding around the inner rectangle; edgeseg/geometry.py has the same.
constexpr int32_t kPadding = 114;

constexpr int32_t kWeightBits = 14;
constexpr int32_t kWholeWeight = 1 << kWeightBits;
constexpr int32_t kFractionBits = 7;

// The two samples that a position lies between, and how near it is to the second.
struct Sample {
  int32_t near;
  int32_t far;         // near, or near + 1 where far_weight is above 0
  int32_t far_weight;  // 0 to kWholeWeight - 1

  EDGESEG_HD int32_t near_weight() const { return kWholeWeight - far_weight; }
};

// One axis: `source` samples stretched to `target` positions.
struct SampleAxis {
  RationalLine line;  // kWholeWeight * (1 + position in samples), rounded
  int32_t source;

  static EDGESEG_HD SampleAxis stretching(int32_t source, int32_t target) {
    // The position times kWholeWeight is ((2p + 1) * source - target) * kWholeWeight over twice the
    // target. Adding a whole sample keeps it above 0, adding half of the divisor rounds it.
    const uint64_t from = static_cast<uint64_t>(source);
    const uint64_t to = static_cast<uint64_t>(target);
    return {RationalLine::through((from + to) * kWholeWeight + to, 2 * from * kWholeWeight, 2 * to),
            source};
  }

  EDGESEG_HD Sample at(int32_t position) const {
    const uint64_t fixed = line.at(position);
    const int32_t near = static_cast<int32_t>(fixed >> kWeightBits) - 1;
    if (near < 0) return {0, 0, 0};
    if (near >= source - 1) return {source - 1, source - 1, 0};
    const int32_t weight = static_cast<int32_t>(fixed & (kWholeWeight - 1));
    return {near, near + (weight > 0 ? 1 : 0), weight};
  }
};

constexpr int32_t kAcrossShift = kWeightBits - kFractionBits;
constexpr int32_t kAcrossHalf = 1 << (kAcrossShift - 1);

// Two samples of one row -> 0 to 255 * 2^7.
EDGESEG_HD int32_t across(int32_t near, int32_t far, int32_t far_weight) {
  return (near * (kWholeWeight - far_weight) + far * far_weight + kAcrossHalf) >> kAcrossShift;
}

constexpr int32_t kDownShift = kWeightBits + kFractionBits;
// Half a level, and half of the last of the 7 bits: the sum is the same as rounding to 7 bits
// first, which is how vectors of 16 bits do it.
constexpr int32_t kDownHalf = (1 << (kDownShift - 1)) + (1 << (kWeightBits - 1));

// Two rows' results of across() -> 0 to 255.
EDGESEG_HD int32_t down(int32_t top, int32_t bottom, int32_t far_weight) {
  return (top * (kWholeWeight - far_weight) + bottom * far_weight + kDownHalf) >> kDownShift;
}

// BT.601, limited range, times 2^20: the coefficients of OpenCV's color_yuv.
constexpr int32_t kYuvShift = 20;
constexpr int32_t kYuvHalf = 1 << (kYuvShift - 1);
constexpr int32_t kLumaGain = 1220542;
constexpr int32_t kBlueOfU = 2116026;
constexpr int32_t kGreenOfU = -409993;
constexpr int32_t kGreenOfV = -852492;
constexpr int32_t kRedOfV = 1673527;

struct Bgr {
  int32_t blue, green, red;
};

EDGESEG_HD int32_t saturated(int32_t level) { return level < 0 ? 0 : (level > 255 ? 255 : level); }

EDGESEG_HD Bgr bgr_of_yuv(int32_t y, int32_t u, int32_t v) {
  const int32_t luma = (y > 16 ? y - 16 : 0) * kLumaGain + kYuvHalf;
  return {saturated((luma + kBlueOfU * (u - 128)) >> kYuvShift),
          saturated((luma + kGreenOfU * (u - 128) + kGreenOfV * (v - 128)) >> kYuvShift),
          saturated((luma + kRedOfV * (v - 128)) >> kYuvShift)};
}

EDGESEG_HD bool is_frame_side(int32_t side) { return side >= 1 && side <= kMaxFrameSide; }

// Whether sides are in bounds and the inner rectangle lies within the network's input.
EDGESEG_HD bool is_frame_fit(const FrameFit& fit) {
  return is_frame_side(fit.frame_height) && is_frame_side(fit.frame_width) &&
         is_frame_side(fit.height) && is_frame_side(fit.width) && fit.top >= 0 && fit.left >= 0 &&
         fit.inner_height >= 1 && fit.inner_width >= 1 &&
         fit.top <= fit.height - fit.inner_height && fit.left <= fit.width - fit.inner_width;
}

// Whether the planes can hold a frame of these sides. YUYV shares chroma between two columns, NV12
// between two rows as well: half a pair is refused.
EDGESEG_HD bool is_frame_planes(const FramePlanes& frame, int32_t height, int32_t width) {
  const int64_t pixels = width;
  if (frame.planes[0] == nullptr) return false;
  switch (frame.format) {
    case kBgr8:
    case kRgb8:
      return frame.pitches[0] >= 3 * pixels;
    case kNv12:
      return frame.planes[1] != nullptr && frame.pitches[0] >= pixels &&
             frame.pitches[1] >= pixels && height % 2 == 0 && width % 2 == 0;
    case kYuyv:
      return frame.pitches[0] >= 2 * pixels && width % 2 == 0;
    default:
      return false;
  }
}

// Whether the inner rectangle is the frame, pixel for pixel.
EDGESEG_HD bool keeps_size(const FrameFit& fit) {
  return fit.inner_height == fit.frame_height && fit.inner_width == fit.frame_width;
}

}  // namespace edgeseg

#endif  // EDGESEG_FIT_FRAME_H_
