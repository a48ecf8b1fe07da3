// refine_borders on the CPU: a row's uncertain pixels in blocks, whose votes are counted side by
// side, class after class. Few classes meet at a border, so few rounds are needed.

#include "edgeseg/refine_borders.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "exports.h"
#include "threads.h"

namespace {

using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kOutOfMemory;
using edgeseg::kReach;
using edgeseg::kVoters;

constexpr int32_t kKnownFlags = edgeseg::kPortableCode | edgeseg::kAvx2Code;
constexpr int32_t kMaxSide = 1 << 22;
constexpr int32_t kMostLanes = 32;

// The channels of the frame and the class map apart, each row between two margins that can be read
// and do not count.
struct Planes {
  std::vector<uint8_t> channels[3], classes;
  std::vector<int16_t> inside;  // -1 for a column of the frame, 0 for one of the margins
  int64_t margin = 0, row = 0;

  void size(int32_t height, int32_t width, int32_t step_x) {
    margin = static_cast<int64_t>(kReach) * step_x + kMostLanes;
    row = width + 2 * margin;
    for (std::vector<uint8_t>& channel : channels) channel.resize(row * height);
    classes.resize(row * height);
    inside.assign(row, 0);
    std::fill(inside.begin() + margin, inside.begin() + margin + width, int16_t{-1});
  }
};

struct Job;
using RefineRange = int32_t (*)(const Job& job, int64_t begin, int64_t end);

struct Job {
  const uint8_t* class_map;  // (height, width)
  const uint8_t* frame;      // (height, width, 3), rows `pitch` bytes apart
  int64_t pitch;
  int32_t height, width, step_y, step_x;
  const int64_t* uncertain;
  uint8_t* refined;
  Planes* planes;
  RefineRange refine;
};

// Rows `begin` to `end` - 1 of the planes.
int32_t split(const Job& job, int32_t begin, int32_t end) {
  Planes& planes = *job.planes;
  for (int32_t y = begin; y < end; ++y) {
    const int64_t to = y * planes.row + planes.margin;
    const uint8_t* from = job.frame + y * job.pitch;
    uint8_t* blue = planes.channels[0].data() + to;
    uint8_t* green = planes.channels[1].data() + to;
    uint8_t* red = planes.channels[2].data() + to;
    for (int32_t x = 0; x < job.width; ++x) {
      blue[x] = from[3 * x];
      green[x] = from[3 * x + 1];
      red[x] = from[3 * x + 2];
    }
    memcpy(planes.classes.data() + to, job.class_map + static_cast<int64_t>(y) * job.width,
           job.width);
  }
  return kOk;
}

}  // namespace

#define EDGESEG_LOOPS "refine_borders_loops.h"
#include "each_isa.h"

namespace {

RefineRange choose_refine(int32_t flags) {
#if defined(__x86_64__)
  const edgeseg::Isa isa = edgeseg::chosen_isa(flags);
  if (isa == edgeseg::Isa::kAvx512) return avx512::refine_range;
  if (isa == edgeseg::Isa::kAvx2) return avx2::refine_range;
#else
  (void)flags;
#endif
  return portable::refine_range;
}

}  // namespace

// refine_borders; the definition is in edgeseg/refine_borders.h.
//   class_map  (height, width) uint8, contiguous
//   frame      (height, width, 3) uint8 BGR, rows `pitch` bytes apart
//   step_y, step_x  1 to kMaxSide, rows and columns from one sample to the next
//   uncertain  (count,) positions in the class map, row after row; quickest in ascending order
//   refined    (height, width) uint8, contiguous; written where the positions are
//   flags      kPortableCode | kAvx2Code
//   threads    at least 1
// Returns 0, or 1 for an argument outside its bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_refine_borders(const uint8_t* class_map, const uint8_t* frame,
                                              int64_t pitch, int32_t height, int32_t width,
                                              int32_t step_y, int32_t step_x,
                                              const int64_t* uncertain, int64_t count,
                                              uint8_t* refined, int32_t flags, int32_t threads) {
  if (class_map == nullptr || frame == nullptr || refined == nullptr || height < 1 || width < 1 ||
      height > kMaxSide || width > kMaxSide || pitch < 3 * static_cast<int64_t>(width) ||
      step_y < 1 || step_x < 1 || step_y > kMaxSide || step_x > kMaxSide || count < 0 ||
      (count > 0 && uncertain == nullptr) || threads < 1 || (flags & ~kKnownFlags) != 0) {
    return kBadArgument;
  }
  thread_local Planes planes;
  // Beyond the frame's width a step leads nowhere, and would only widen the margins.
  step_x = std::min(step_x, width);
  try {
    planes.size(height, width, step_x);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  const Job job = {
      class_map,           frame, pitch, height, width, step_y, step_x, uncertain, refined, &planes,
      choose_refine(flags)};
  // A few pixels are not worth another thread.
  const int32_t rows = std::min(height, 4 * threads);
  const int32_t parts = threads == 1 ? 1 : rows;
  const int32_t code = edgeseg::for_chunks(
      [&](int32_t part) {
        return split(job, static_cast<int32_t>(static_cast<int64_t>(height) * part / parts),
                     static_cast<int32_t>(static_cast<int64_t>(height) * (part + 1) / parts));
      },
      parts, threads);
  if (code != kOk) return code;
  const int64_t wanted = std::min<int64_t>(count / 1024 + 1, 4LL * threads);
  const int32_t chunks = threads == 1 ? 1 : static_cast<int32_t>(wanted);
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        return job.refine(job, count * chunk / chunks, count * (chunk + 1) / chunks);
      },
      chunks, threads);
}
