// EdgeSegUpsampleArgmax on CUDA: one thread per low-resolution cell to find the cells that one
// class wins outright, one warp per cell for the rest. Device pointers and a stream; allocates
// nothing, waits for nothing. Build with -fmad=false: the results are then those of the CPU
// library.

#include "edgeseg/upsample_argmax.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarpsPerBlock = 8;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int32_t kClassWords = (kMaxClasses + kWarp - 1) / kWarp;

struct UpsampleArgmax {
  const float* logits;  // (classes, y_grid.source, x_grid.source)
  int32_t classes;
  uint8_t* class_map;   // (y_grid.target, x_grid.target)
  uint8_t* confidence;  // the same, or null
  Grid y_grid;
  Grid x_grid;
  bool short_cut;
};

// Where the four corners of a cell lie in a plane of logits, and its pixels in the output.
struct Cell {
  int32_t y, x;
  int64_t corner[4];  // top left, top right, bottom left, bottom right
  int32_t row, rows;
  int32_t column, columns;

  __device__ __forceinline__ Cell(const UpsampleArgmax& job, int64_t index) {
    const int64_t width = job.x_grid.source;
    y = static_cast<int32_t>(index / width);
    x = static_cast<int32_t>(index - y * width);
    const int64_t top = y * width;
    const int64_t bottom = job.y_grid.far(y) * width;
    const int32_t x_far = job.x_grid.far(x);
    corner[0] = top + x;
    corner[1] = top + x_far;
    corner[2] = bottom + x;
    corner[3] = bottom + x_far;
    row = job.y_grid.begin(y);
    rows = job.y_grid.begin(y + 1) - row;
    column = job.x_grid.begin(x);
    columns = job.x_grid.begin(x + 1) - column;
  }

  __device__ __forceinline__ bool is_empty() const { return rows == 0 || columns == 0; }
};

// Four bytes at a time where the address allows.
__device__ __forceinline__ void fill_span(uint8_t* to, int32_t count, uint32_t value) {
  int32_t i = 0;
  for (; i < count && (reinterpret_cast<uintptr_t>(to + i) & 3) != 0; ++i) {
    to[i] = static_cast<uint8_t>(value);
  }
  for (; i + 4 <= count; i += 4) *reinterpret_cast<uint32_t*>(to + i) = value * 0x01010101u;
  for (; i < count; ++i) to[i] = static_cast<uint8_t>(value);
}

__device__ __forceinline__ void fill_cell(const UpsampleArgmax& job, const Cell& cell,
                                          uint32_t winner) {
  for (int32_t r = 0; r < cell.rows; ++r) {
    const int64_t start = static_cast<int64_t>(cell.row + r) * job.x_grid.target + cell.column;
    fill_span(job.class_map + start, cell.columns, winner);
    if (job.confidence != nullptr) fill_span(job.confidence + start, cell.columns, 255);
  }
}

// Whether one class wins the whole cell, and on request with full confidence. `winners` gets the
// winner at each corner, one byte each.
__device__ __forceinline__ bool is_decided(const UpsampleArgmax& job, const Cell& cell,
                                           uint32_t* winners) {
  const int64_t plane = static_cast<int64_t>(job.y_grid.source) * job.x_grid.source;
  Winner<float> best[4];
  float lower[4];  // the largest value among classes below the winner
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    best[i].start();
    lower[i] = best[i].value;
  }
  for (int32_t c = 0; c < job.classes; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = job.logits[c * plane + cell.corner[i]];
      lower[i] = value > best[i].value ? best[i].value : lower[i];
      best[i].offer(value, c);
    }
  }
  bool decided = true;
  *winners = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    decided = decided && best[i].index == best[0].index && lower[i] < beaten_below(best[i].value);
    *winners |= static_cast<uint32_t>(best[i].index) << (8 * i);
  }
  if (job.confidence == nullptr || !decided) return decided;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int32_t c = 0; c < job.classes; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += exp_nonpositive(job.logits[c * plane + cell.corner[i]] - best[i].value);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) decided = decided && is_saturated(best[i].value, sum[i]);
  return decided;
}

// Bit c % 32 of candidates[c / 32]: class c is not beaten in the whole cell by a corner's winner.
// The whole warp works on one cell, one class per lane.
__device__ __forceinline__ void keep_candidates(const UpsampleArgmax& job, const Cell& cell,
                                                uint32_t winners, int32_t lane,
                                                uint32_t* candidates) {
  const int64_t plane = static_cast<int64_t>(job.y_grid.source) * job.x_grid.source;
  for (int32_t first = 0; first < job.classes; first += kWarp) {
    const int32_t c = first + lane;
    bool beaten = c >= job.classes;
    if (!beaten && job.short_cut) {
      for (int w = 0; w < 4; ++w) {
        const float* rival = job.logits + ((winners >> (8 * w)) & 255) * plane;
        bool below = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          below =
              below && job.logits[c * plane + cell.corner[i]] < beaten_below(rival[cell.corner[i]]);
        }
        beaten = beaten || below;
      }
    }
    const uint32_t kept = __ballot_sync(kAllLanes, !beaten);
    if (lane == 0) candidates[first / kWarp] = kept;
  }
  __syncwarp();
}

struct PixelWeights {
  float x_near, x_far, y_near, y_far;

  __device__ __forceinline__ float value(const float* plane, const Cell& cell) const {
    const float top = lerp(x_near, plane[cell.corner[0]], x_far, plane[cell.corner[1]]);
    const float bottom = lerp(x_near, plane[cell.corner[2]], x_far, plane[cell.corner[3]]);
    return lerp(y_near, top, y_far, bottom);
  }
};

// The whole warp works on one cell, one pixel per lane.
__device__ __forceinline__ void compute_cell(const UpsampleArgmax& job, const Cell& cell,
                                             int32_t lane, const uint32_t* candidates) {
  const int64_t plane = static_cast<int64_t>(job.y_grid.source) * job.x_grid.source;
  const int64_t pixels = static_cast<int64_t>(cell.rows) * cell.columns;
  for (int64_t pixel = lane; pixel < pixels; pixel += kWarp) {
    const int32_t row = cell.row + static_cast<int32_t>(pixel / cell.columns);
    const int32_t column = cell.column + static_cast<int32_t>(pixel % cell.columns);
    const PixelWeights weights = {
        job.x_grid.near_weight(column, cell.x), job.x_grid.far_weight(column, cell.x),
        job.y_grid.near_weight(row, cell.y), job.y_grid.far_weight(row, cell.y)};
    Winner<float> best;
    best.start();
    for (int32_t first = 0; first < job.classes; first += kWarp) {
      for (uint32_t left = candidates[first / kWarp]; left != 0; left &= left - 1) {
        const int32_t c = first + __ffs(static_cast<int>(left)) - 1;
        best.offer(weights.value(job.logits + c * plane, cell), c);
      }
    }
    const int64_t at = static_cast<int64_t>(row) * job.x_grid.target + column;
    job.class_map[at] = static_cast<uint8_t>(best.index);
    if (job.confidence != nullptr) {
      float sum = 0.0f;
      for (int32_t c = 0; c < job.classes; ++c) {
        sum += exp_nonpositive(weights.value(job.logits + c * plane, cell) - best.value);
      }
      job.confidence[at] = static_cast<uint8_t>(confidence_level(sum));
    }
  }
}

__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    upsample_argmax_kernel(const UpsampleArgmax job) {
  __shared__ uint32_t candidates_of[kWarpsPerBlock][kClassWords];
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  uint32_t* candidates = candidates_of[threadIdx.x / kWarp];
  const int64_t cells = static_cast<int64_t>(job.y_grid.source) * job.x_grid.source;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  // The bounds are the same for all lanes of a warp, as the warp-wide calls need.
  for (int64_t first = warp * kWarp; first < cells; first += warps * kWarp) {
    bool undecided = false;
    uint32_t winners = 0;
    if (first + lane < cells) {
      const Cell own(job, first + lane);
      if (!own.is_empty()) {
        undecided = !(job.short_cut && is_decided(job, own, &winners));
        if (!undecided) fill_cell(job, own, winners & 255);
      }
    }
    for (uint32_t left = __ballot_sync(kAllLanes, undecided); left != 0; left &= left - 1) {
      const int32_t owner = __ffs(static_cast<int>(left)) - 1;
      const Cell cell(job, first + owner);
      keep_candidates(job, cell, __shfl_sync(kAllLanes, winners, owner), lane, candidates);
      compute_cell(job, cell, lane, candidates);
      __syncwarp();  // before the next cell's candidates replace these
    }
  }
}

bool is_side(int32_t side) { return side >= 1 && side <= kMaxSide; }

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_upsample_argmax(const edgeseg::Features* logits, void* class_map,
                                              void* confidence, int32_t output_type,
                                              int32_t target_height, int32_t target_width,
                                              int32_t flags, void* stream) {
  using namespace edgeseg;
  if (logits == nullptr || logits->data == nullptr || class_map == nullptr ||
      logits->channels < 1 || logits->channels > kMaxClasses || !is_side(logits->height) ||
      !is_side(logits->width) || !is_side(target_height) || !is_side(target_width) ||
      (flags & ~(kAlignCorners | kNoShortCut)) != 0 || output_type != kUint8 ||
      logits->type != kFloat32) {
    return cudaErrorInvalidValue;
  }
  const bool align_corners = (flags & kAlignCorners) != 0;
  const UpsampleArgmax job = {static_cast<const float*>(logits->data),
                              logits->channels,
                              static_cast<uint8_t*>(class_map),
                              static_cast<uint8_t*>(confidence),
                              {logits->height, target_height, align_corners},
                              {logits->width, target_width, align_corners},
                              (flags & kNoShortCut) == 0};
  constexpr int32_t kBlock = kWarp * kWarpsPerBlock;
  const int64_t cells = static_cast<int64_t>(logits->height) * logits->width;
  return launch<upsample_argmax_kernel>(ceil_div(cells, kBlock), kBlock, stream, job);
}
