// The arithmetic of draw_overlay: class colours blended into the frame.
//
// Everything that decides a result is here, once; the CPU library and the CUDA kernel both include
// this file, and agree bit for bit because all of it is integers.
//
// Definition, for a pixel of the frame:
//   class = class_map at the sample of the inner rectangle that the pixel's centre lies in
//   drawn = round((frame * (256 - opacity) + colour of the class * opacity) / 256)
// A class without a colour is black.
//
// The sample is floor((p + 1/2) * inner side / frame side), exactly. cv::resize with
// INTER_NEAREST_EXACT means the same but rounds on the way, differently from version to version:
// OpenCV 4 steps in 2^-16 of a sample and drifts with the distance (opencv/opencv issue 27191),
// OpenCV 5 adds up doubles (pull request 28873). Where a centre falls on, or within that rounding
// of, the border between two samples, it can take the other one.

#ifndef EDGESEG_DRAW_OVERLAY_H_
#define EDGESEG_DRAW_OVERLAY_H_

#include <stdint.h>

#include "edgeseg/fit_frame.h"
#include "edgeseg/host_device.h"
#include "edgeseg/rational_line.h"

namespace edgeseg {

constexpr int32_t kColours = 256;  // one for each value of a byte
constexpr int32_t kOpaque = 256;   // the opacity that hides the frame

// The sample of `source` that each of `target` positions, stretched over them, lies in.
EDGESEG_HD RationalLine nearest_line(int32_t source, int32_t target) {
  const uint64_t from = static_cast<uint64_t>(source);
  return RationalLine::through(from, 2 * from, 2 * static_cast<uint64_t>(target));
}

// The colour of a class as 0x00RRGGBB, blue in the lowest byte; `colours` (classes, 3) BGR.
EDGESEG_HD uint32_t packed_colour(const uint8_t* colours, int32_t classes, int32_t index) {
  if (index >= classes) return 0;
  const uint8_t* colour = colours + 3 * index;
  return colour[0] | static_cast<uint32_t>(colour[1]) << 8 | static_cast<uint32_t>(colour[2]) << 16;
}

// One channel of one pixel.
EDGESEG_HD uint8_t blended(uint8_t frame, uint8_t colour, int32_t opacity) {
  // At most 255 * 256 + 128: 16 bits hold it.
  return static_cast<uint8_t>((frame * (kOpaque - opacity) + colour * opacity + kOpaque / 2) >> 8);
}

// Four channels at once, one in each byte: two 16-bit sums in each 32-bit one.
EDGESEG_HD uint32_t blended_bytes(uint32_t frame, uint32_t colours, int32_t opacity) {
  constexpr uint32_t kEven = 0x00ff00ffu;
  constexpr uint32_t kHalves = 0x00800080u;
  const uint32_t shown = static_cast<uint32_t>(kOpaque - opacity);
  const uint32_t laid = static_cast<uint32_t>(opacity);
  const uint32_t even = (frame & kEven) * shown + (colours & kEven) * laid + kHalves;
  const uint32_t odd = ((frame >> 8) & kEven) * shown + ((colours >> 8) & kEven) * laid + kHalves;
  return ((even >> 8) & kEven) | (odd & ~kEven);
}

// Whether every argument but the pointers to pixels is in bounds.
EDGESEG_HD bool is_overlay(const FrameFit& fit, int64_t frame_pitch, const uint8_t* colours,
                           int32_t classes, int32_t opacity, int64_t drawn_pitch) {
  return is_frame_fit(fit) && classes >= 0 && classes <= kColours &&
         (classes == 0 || colours != nullptr) && opacity >= 0 && opacity <= kOpaque &&
         frame_pitch >= 3 * static_cast<int64_t>(fit.frame_width) &&
         drawn_pitch >= 3 * static_cast<int64_t>(fit.frame_width);
}

}  // namespace edgeseg

#endif  // EDGESEG_DRAW_OVERLAY_H_
