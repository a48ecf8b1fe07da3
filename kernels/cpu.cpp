// EdgeSeg's CPU library: plain extern "C" functions over raw pointers, loaded with ctypes.
//
// Loops only; the arithmetic is in include/edgeseg/. Nothing here throws across the boundary:
// each function returns one of the codes below. The loops, in cpu_loops.h, are compiled once per
// instruction set, so one portable binary uses AVX2 or AVX-512 where they are.

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "edgeseg/upsample_argmax.h"

#if !defined(__GNUC__)
#error "EdgeSeg's CPU library needs GCC or Clang"
#endif

#define EDGESEG_EXPORT extern "C" __attribute__((visibility("default")))
#define EDGESEG_INLINE inline __attribute__((always_inline))

namespace {

constexpr int32_t kAbiVersion = 1;  // kernels/build.py has the same number

constexpr int32_t kOk = 0;
constexpr int32_t kBadArgument = 1;
constexpr int32_t kOutOfMemory = 2;

// The widest vector in floats: tables are padded to a multiple of this.
constexpr int32_t kMaxLanes = 16;

// A cell is computed in tiles of at most this many columns and rows, so that tables fit in L1.
constexpr int32_t kTileSide = 32;
constexpr int32_t kTilePixels = kTileSide * kTileSide;

constexpr int32_t kPaddedClasses = 256;
static_assert(kPaddedClasses >= edgeseg::kMaxClasses && kPaddedClasses % kMaxLanes == 0,
              "room for every class in whole vectors");

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

// Each inclusion makes namespace EDGESEG_ISA with the arithmetic and the loops in it. The header is
// included again each time, because GCC takes vectors apart in functions that were defined outside
// the target region, even when they are inlined into it.
#define EDGESEG_ISA portable
#define EDGESEG_LANES 4
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define EDGESEG_PRAGMA(text) _Pragma(#text)
#define EDGESEG_TARGET(isa) \
  EDGESEG_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(clang attribute pop)
#else
#define EDGESEG_PRAGMA(text) _Pragma(#text)
#define EDGESEG_TARGET(isa) EDGESEG_PRAGMA(GCC push_options) EDGESEG_PRAGMA(GCC target(isa))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(GCC pop_options)
#endif

EDGESEG_TARGET("avx2")
#define EDGESEG_ISA avx2
#define EDGESEG_LANES 8
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END

EDGESEG_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#define EDGESEG_ISA avx512
#define EDGESEG_LANES 16
#include "cpu_loops.h"
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END
#endif

namespace {

ComputeStrips choose_compute_strips() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::compute_strips;
  }
  if (__builtin_cpu_supports("avx2")) return avx2::compute_strips;
#endif
  return portable::compute_strips;
}

bool is_side(int32_t side) { return side >= 1 && side <= edgeseg::kMaxSide; }

// One chunk of strips on the calling thread, with that thread's workspace.
int32_t run_chunk(ComputeStrips compute, const Job& job, int32_t begin, int32_t end) noexcept {
  try {
    thread_local std::vector<Workspace> workspace;
    if (workspace.empty()) workspace.resize(1);
    Workspace* work = &workspace[0];
    for (SampleRow& row : work->rows) row.fit(job.width);
    work->tile.rows = 0;  // its weights may be of another call
    compute(job, begin, end, work);
    return kOk;
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

}  // namespace

// The number that a caller compares with its own before anything else.
EDGESEG_EXPORT int32_t edgeseg_abi_version(void) { return kAbiVersion; }

// 1 when the library was built with OpenMP, else 0 (`threads` is then ignored).
EDGESEG_EXPORT int32_t edgeseg_has_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// EdgeSegUpsampleArgmax; the definition is in edgeseg/upsample_argmax.h.
//   logits      (classes, height, width) float32, contiguous, 1 <= classes <= 255
//   class_map   (target_height, target_width) uint8, written
//   confidence  the same shape, written, or null
//   flags       kAlignCorners | kNoShortCut
//   threads     at least 1, or 0 for as many as OpenMP would take
// Returns 0, or 1 for an argument outside these bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_upsample_argmax(const float* logits, int32_t classes, int32_t height,
                                               int32_t width, uint8_t* class_map,
                                               uint8_t* confidence, int32_t target_height,
                                               int32_t target_width, int32_t flags,
                                               int32_t threads) {
  if (logits == nullptr || class_map == nullptr || classes < 1 || classes > edgeseg::kMaxClasses ||
      !is_side(height) || !is_side(width) || !is_side(target_height) || !is_side(target_width) ||
      threads < 0 || (flags & ~(edgeseg::kAlignCorners | edgeseg::kNoShortCut)) != 0) {
    return kBadArgument;
  }
  static const ComputeStrips compute = choose_compute_strips();
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

#ifdef _OPENMP
  const int32_t team = threads > 0 ? threads : omp_get_max_threads();
#else
  const int32_t team = 1;
#endif
  if (team == 1) return run_chunk(compute, job, 0, height);
  // More chunks than threads, because busy regions of an image cost more than empty ones.
  const int32_t chunks = std::min(height, 4 * team);
  std::atomic<int32_t> status(kOk);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
#endif
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t begin = static_cast<int32_t>(static_cast<int64_t>(height) * chunk / chunks);
    const int32_t end = static_cast<int32_t>(static_cast<int64_t>(height) * (chunk + 1) / chunks);
    const int32_t result = run_chunk(compute, job, begin, end);
    if (result != kOk) status.store(result);
  }
  return status.load();
}
