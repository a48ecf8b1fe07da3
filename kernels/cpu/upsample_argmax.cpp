// EdgeSegUpsampleArgmax on the CPU. The loops, in upsample_argmax_loops.h, are compiled once per
// instruction set, so one portable binary uses AVX2 or AVX-512 where they are.

#include "edgeseg/upsample_argmax.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "exports.h"
#include "threads.h"

namespace {

using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kOutOfMemory;

// The widest vector in floats: tables are padded to a multiple of this.
constexpr int32_t kMaxLanes = 16;

// A cell is computed in tiles of at most this many columns and rows, so that tables fit in L1.
constexpr int32_t kTileSide = 32;
constexpr int32_t kTilePixels = kTileSide * kTileSide;

constexpr int32_t kPaddedClasses = 256;
static_assert(kPaddedClasses >= edgeseg::kMaxClasses && kPaddedClasses % kMaxLanes == 0,
              "room for every class in whole vectors");

constexpr int32_t kKnownFlags =
    edgeseg::kAlignCorners | edgeseg::kNoShortCut | edgeseg::kPortableCode | edgeseg::kAvx2Code;

constexpr uint8_t kClear = 1;      // no lower class can tie with the winner after rounding
constexpr uint8_t kSaturated = 2;  // confidence is 255 with room to spare

int32_t round_up(int32_t value, int32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One axis of the upsampling as tables, kept between calls.
struct Axis {
  edgeseg::Grid grid = {0, 0, false};
  std::vector<int32_t> begin;  // Grid::begin of each cell, and the end
  std::vector<float> near_weight;
  std::vector<float> far_weight;

  void fit(const edgeseg::Grid& wanted) {
    if (grid.source == wanted.source && grid.target == wanted.target &&
        grid.align_corners == wanted.align_corners) {
      return;
    }
    grid.source = 0;  // a failed allocation below must not leave tables that look right
    begin.resize(static_cast<size_t>(wanted.source) + 1);
    near_weight.resize(wanted.target);
    far_weight.resize(wanted.target);
    begin[0] = 0;
    for (int32_t cell = 0; cell < wanted.source; ++cell) {
      begin[cell + 1] = wanted.begin(cell + 1);
      for (int32_t position = begin[cell]; position < begin[cell + 1]; ++position) {
        near_weight[position] = wanted.near_weight(position, cell);
        far_weight[position] = wanted.far_weight(position, cell);
      }
    }
    grid = wanted;
  }

  int32_t far(int32_t cell) const { return grid.far(cell); }
};

// The winner at each sample of one low-resolution row.
struct SampleRow {
  int32_t y = -1;
  std::vector<uint8_t> winner;
  std::vector<uint8_t> state;  // kClear, kSaturated

  void fit(int32_t width) {
    y = -1;
    winner.resize(round_up(width, kMaxLanes));
    state.resize(round_up(width, kMaxLanes));
  }
};

// The logits at the four corners of one cell, class after class.
struct Corners {
  alignas(64) float top_left[kPaddedClasses];
  alignas(64) float top_right[kPaddedClasses];
  alignas(64) float bottom_left[kPaddedClasses];
  alignas(64) float bottom_right[kPaddedClasses];
};

// Weights of each pixel of a tile, rows one after the other without gaps.
struct Tile {
  int32_t row = 0, rows = 0;
  int32_t column = 0, columns = 0;
  alignas(64) float x_near[kTilePixels];
  alignas(64) float x_far[kTilePixels];
  alignas(64) float y_near[kTilePixels];
  alignas(64) float y_far[kTilePixels];
};

// What one thread needs; kept between calls, so that a stream of frames allocates once.
struct Workspace {
  SampleRow rows[2];
  Corners corners[2];  // the logits of this cell, and of its candidates in short
  Tile tile;
  alignas(64) int32_t candidate[kPaddedClasses];
  alignas(64) int32_t beaten[kPaddedClasses];
  alignas(64) int32_t winner[kTilePixels];
  alignas(64) int32_t level[kTilePixels];
};

struct Job {
  const float* logits;  // (classes, height, width)
  int32_t classes, height, width;
  uint8_t* class_map;   // (target height, target width)
  uint8_t* confidence;  // the same, or null
  const Axis* x_axis;
  const Axis* y_axis;
  bool short_cut;
};

using ComputeStrips = void (*)(const Job&, int32_t, int32_t, Workspace*);

}  // namespace

#define EDGESEG_LOOPS "upsample_argmax_loops.h"
#include "each_isa.h"

namespace {

ComputeStrips choose_compute_strips(int32_t flags) {
#if defined(__x86_64__)
  const edgeseg::Isa isa = edgeseg::chosen_isa(flags);
  if (isa == edgeseg::Isa::kAvx512) return avx512::compute_strips;
  if (isa == edgeseg::Isa::kAvx2) return avx2::compute_strips;
#else
  (void)flags;
#endif
  return portable::compute_strips;
}

bool is_side(int32_t side) { return side >= 1 && side <= edgeseg::kMaxSide; }

// Strips begin to end - 1 on the calling thread, with that thread's workspace.
int32_t run_strips(ComputeStrips compute, const Job& job, int32_t begin, int32_t end) {
  thread_local std::vector<Workspace> workspace;
  if (workspace.empty()) workspace.resize(1);
  Workspace* work = &workspace[0];
  for (SampleRow& row : work->rows) row.fit(job.width);
  work->tile.rows = 0;  // its weights may be of another call
  compute(job, begin, end, work);
  return kOk;
}

}  // namespace

// EdgeSegUpsampleArgmax; the definition is in edgeseg/upsample_argmax.h.
//   logits      (classes, height, width) float32, contiguous, 1 <= classes <= 255
//   class_map   (target_height, target_width) uint8, written
//   confidence  the same shape, written, or null
//   flags       kAlignCorners | kNoShortCut | kPortableCode | kAvx2Code
//   threads     at least 1
// Returns 0, or 1 for an argument outside these bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_upsample_argmax(const float* logits, int32_t classes, int32_t height,
                                               int32_t width, uint8_t* class_map,
                                               uint8_t* confidence, int32_t target_height,
                                               int32_t target_width, int32_t flags,
                                               int32_t threads) {
  if (logits == nullptr || class_map == nullptr || classes < 1 || classes > edgeseg::kMaxClasses ||
      !is_side(height) || !is_side(width) || !is_side(target_height) || !is_side(target_width) ||
      threads < 1 || (flags & ~kKnownFlags) != 0) {
    return kBadArgument;
  }
  const ComputeStrips compute = choose_compute_strips(flags);
  thread_local Axis x_axis;
  thread_local Axis y_axis;
  const bool align_corners = (flags & edgeseg::kAlignCorners) != 0;
  try {
    x_axis.fit({width, target_width, align_corners});
    y_axis.fit({height, target_height, align_corners});
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  const Job job = {logits,  classes,   height,
                   width,   class_map, confidence,
                   &x_axis, &y_axis,   (flags & edgeseg::kNoShortCut) == 0};

  // More chunks than threads, because busy regions of an image cost more than empty ones.
  const int32_t chunks =
      threads == 1 ? 1 : static_cast<int32_t>(std::min<int64_t>(height, 4LL * threads));
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        const int64_t strips = height;
        return run_strips(compute, job, static_cast<int32_t>(strips * chunk / chunks),
                          static_cast<int32_t>(strips * (chunk + 1) / chunks));
      },
      chunks, threads);
}
