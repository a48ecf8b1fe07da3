// EdgeSegUpsampleArgmax on CUDA. Device pointers and a stream; allocates nothing, waits for
// nothing. Build with -fmad=false: the results are then those of the CPU library.
//
// Two kernels. By tiles, where both sides at least double: a block finds the winner at every sample
// under its tile of the output, draws the cells that one class wins outright, computes the pixels
// of the others class by class, and stores whole lines. By pixels, for all other sizes and for
// kNoShortCut: one thread per pixel, every class.

#include "edgeseg/half.h"
#include "edgeseg/upsample_argmax.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int32_t kClassWords = (kMaxClasses + kWarp - 1) / kWarp;

// A tile of the output. Cells are two or more pixels wide and high, so it meets no more than these.
constexpr int32_t kTileWidth = 256;
constexpr int32_t kTileHeight = 32;
constexpr int32_t kMostColumns = kTileWidth / 2 + 2;
constexpr int32_t kMostRows = kTileHeight / 2 + 2;

// An undecided cell is computed in patches of this many pixels a side, one patch per group of as
// many lanes: a lane has one column, and goes through the classes for some rows at once.
constexpr int32_t kPatch = 8;
constexpr int32_t kRowsAtOnce = 4;
constexpr int32_t kGroups = kThreads / kPatch;

// Classes fetched at once: all of Cityscapes' 19 or VOC's 21 are on their way before the first is
// looked at.
constexpr int32_t kBatch = 24;
constexpr int32_t kFew = 8;

// Blocks that a processor should hold at once.
constexpr int32_t kTileBlocks = 4;
constexpr int32_t kConfidenceBlocks = 3;
constexpr int32_t kPixelBlocks = 3;

// Tiles with borders between classes in them take longer than others.
constexpr int kRounds = 8;

constexpr uint16_t kDecisive = 0x100;  // beside a sample's winner: see find_winner

template <class T>
struct UpsampleArgmax {
  const T* logits;
  int64_t class_stride, sample_stride;  // elements
  int32_t classes;
  bool packed;        // classes of a sample lie side by side in whole packs of 16 bytes
  bool whole_packs;   // outputs can be stored 16 bytes at a time
  int32_t tile_rows;  // kTileHeight or less
  int64_t tiles_x, tiles;
  int32_t output_type;
  void* class_map;   // (y_grid.target, x_grid.target)
  void* confidence;  // the same, or null
  Grid y_grid;
  Grid x_grid;
};

__device__ __forceinline__ float load(const float* from) { return __ldg(from); }
__device__ __forceinline__ float load(const Half* from) {
  return to_float(Half{__ldg(&from->bits)});
}

template <class T>
__device__ __forceinline__ float logit(const UpsampleArgmax<T>& job, int64_t sample, int32_t c) {
  return load(job.logits + sample * job.sample_stride + c * job.class_stride);
}

__device__ __forceinline__ void unpack(const uint4& pack, float (&values)[4]) {
  memcpy(values, &pack, sizeof values);
}

__device__ __forceinline__ void unpack(const uint4& pack, float (&values)[8]) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    values[k] = to_float(Half{static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)))});
  }
}

// Classes first to first + N - 1 of a sample; NaN, which never wins, for those there are not.
template <int N, class T>
__device__ __forceinline__ void fetch(const UpsampleArgmax<T>& job, int64_t sample, int32_t first,
                                      float (&values)[N]) {
  constexpr int kPack = 16 / sizeof(T);
  static_assert(N % kPack == 0, "whole packs");
  const T* from = job.logits + sample * job.sample_stride + first * job.class_stride;
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = __builtin_nanf("");
  if (job.packed) {
#pragma unroll
    for (int n = 0; n < N; n += kPack) {
      if (first + n < job.classes) {
        float pack[kPack];
        unpack(__ldg(reinterpret_cast<const uint4*>(from + n)), pack);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          if (first + n + k < job.classes) values[n + k] = pack[k];
        }
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n, from += job.class_stride) {
      if (first + n < job.classes) values[n] = load(from);
    }
  }
}

// The winner at one sample, and kDecisive when no lower class can tie with it after rounding and,
// if confidence is asked for, its level is 255 with room to spare.
template <bool kConfidence, class T>
__device__ __forceinline__ uint16_t find_winner(const UpsampleArgmax<T>& job, int64_t sample) {
  Winner<float> best;
  best.start();
  float lower = best.value;  // the largest value among classes below the winner
#pragma unroll 1
  for (int32_t first = 0; first < job.classes; first += kBatch) {
    float values[kBatch];
    fetch(job, sample, first, values);
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      lower = values[n] > best.value ? best.value : lower;
      best.offer(values[n], first + n);
    }
  }
  bool decisive = lower < beaten_below(best.value);
  if (kConfidence && decisive) {
    float sum = 0.0f;
#pragma unroll 1
    for (int32_t first = 0; first < job.classes; first += kFew) {
      float values[kFew];  // from the cache
      fetch(job, sample, first, values);
#pragma unroll
      for (int n = 0; n < kFew; ++n) sum += exp_nonpositive(values[n] - best.value);
    }
    decisive = is_saturated(best.value, sum);
  }
  return static_cast<uint16_t>(best.index | (decisive ? kDecisive : 0));
}

// The part of the output that a block works on, and the cells that it meets.
struct Window {
  int32_t column, columns, row, rows;
  int32_t first_x, cells_x, samples_x;  // the last cell's far samples may be its near ones
  int32_t first_y, cells_y, samples_y;
};

// For the lanes of one warp: four of them do a division each, as it is the slowest thing on the way
// to the first load.
template <class T>
__device__ __forceinline__ void find_window(const UpsampleArgmax<T>& job, int32_t tile_y,
                                            int32_t tile_x, Window* window) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const bool is_y = (lane & 2) != 0;
  const Grid grid = {is_y ? job.y_grid.source : job.x_grid.source,
                     is_y ? job.y_grid.target : job.x_grid.target, job.x_grid.align_corners};
  const int32_t start = is_y ? tile_y * job.tile_rows : tile_x * kTileWidth;
  const int32_t count = min(is_y ? job.tile_rows : kTileWidth, grid.target - start);
  const int32_t cell = grid.cell((lane & 1) != 0 ? start + count - 1 : start);
  const int32_t last = __shfl_sync(kAllLanes, cell, lane | 1);
  if (lane == 0) {
    window->column = start;
    window->columns = count;
    window->first_x = cell;
    window->cells_x = last - cell + 1;
    window->samples_x = grid.far(last) - cell + 1;
  } else if (lane == 2) {
    window->row = start;
    window->rows = count;
    window->first_y = cell;
    window->cells_y = last - cell + 1;
    window->samples_y = grid.far(last) - cell + 1;
  }
}

// What a block knows of its tile.
template <bool kConfidence>
struct Tile {
  Window window;
  alignas(16) uint8_t class_map[kTileHeight * kTileWidth];
  alignas(16) uint8_t confidence[kConfidence ? kTileHeight * kTileWidth : 16];
  // The cell, counted from the window's first, of each column and row; and where cells begin.
  alignas(4) uint8_t cell_of_column[kTileWidth];
  uint8_t cell_of_row[kTileHeight];
  uint16_t column_of_cell[kMostColumns + 1];
  uint16_t row_of_cell[kMostRows + 1];
  uint16_t samples[(kMostColumns + 1) * (kMostRows + 1)];  // what find_winner says
  // Where patches of undecided cells begin, row * kTileWidth + column. Only cells of more than
  // kPatch pixels a side have several, and of those there are few.
  uint16_t patches[kMostColumns * kMostRows];
  uint32_t patch_count;
  uint32_t candidates[kGroups][kClassWords];
};

// One axis of the tables above; `thread` counts from 0.
__device__ __forceinline__ void find_cells(const Grid& grid, int32_t first_cell, int32_t cells,
                                           int32_t start, int32_t count, int32_t room,
                                           int32_t thread, uint16_t* begin_of, uint8_t* cell_of) {
  for (int32_t i = thread; i < cells; i += kThreads) {
    const int32_t begin = max(grid.begin(first_cell + i) - start, 0);
    const int32_t end = min(grid.begin(first_cell + i + 1) - start, count);
    begin_of[i] = static_cast<uint16_t>(begin);
    const bool is_last = i + 1 == cells;
    if (is_last) begin_of[cells] = static_cast<uint16_t>(end);
    // To the end of the room, because four are read at once.
#pragma unroll 1
    for (int32_t at = begin; at < (is_last ? room : end); ++at) {
      cell_of[at] = static_cast<uint8_t>(i);
    }
  }
}

// Colours the tile as if one class won every cell, its top left sample's.
template <bool kConfidence>
__device__ __forceinline__ void fill_tile(Tile<kConfidence>* tile) {
  const Window& window = tile->window;
  constexpr int32_t kWords = kTileWidth / 4;
  constexpr int32_t kBands = kThreads / kWords;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t at = thread % kWords * 4;
  if (at >= window.columns) return;
  uint32_t cells;
  memcpy(&cells, tile->cell_of_column + at, sizeof cells);
  const int32_t band = (window.rows + kBands - 1) / kBands;
  const int32_t first = thread / kWords * band;
  int32_t drawn = -1;
  uint32_t winners = 0;
#pragma unroll 1
  for (int32_t row = first; row < min(first + band, window.rows); ++row) {
    const int32_t y = tile->cell_of_row[row];
    if (y != drawn) {
      const uint16_t* samples = tile->samples + y * window.samples_x;
      winners = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        winners |= static_cast<uint32_t>(samples[cells >> (8 * k) & 255] & 255) << (8 * k);
      }
      drawn = y;
    }
    *reinterpret_cast<uint32_t*>(tile->class_map + row * kTileWidth + at) = winners;
    if (kConfidence) {
      *reinterpret_cast<uint32_t*>(tile->confidence + row * kTileWidth + at) = 0xffffffffu;
    }
  }
}

// Notes the patches of the cells that more than one class may win.
template <bool kConfidence>
__device__ __forceinline__ void find_patches(Tile<kConfidence>* tile) {
  const Window& window = tile->window;
  const int32_t cells = window.cells_x * window.cells_y;
  for (int32_t cell = static_cast<int32_t>(threadIdx.x); cell < cells; cell += kThreads) {
    const int32_t y = static_cast<int32_t>(static_cast<uint32_t>(cell) / window.cells_x);
    const int32_t x = cell - y * window.cells_x;
    const int32_t right = min(x + 1, window.samples_x - 1);
    const uint16_t* top = tile->samples + y * window.samples_x;
    const uint16_t* bottom = tile->samples + min(y + 1, window.samples_y - 1) * window.samples_x;
    const uint16_t first = top[x];
    const bool decided = (first & kDecisive) != 0 && top[right] == first && bottom[x] == first &&
                         bottom[right] == first;
    if (decided) continue;
#pragma unroll 1
    for (int32_t row = tile->row_of_cell[y]; row < tile->row_of_cell[y + 1]; row += kPatch) {
#pragma unroll 1
      for (int32_t column = tile->column_of_cell[x]; column < tile->column_of_cell[x + 1];
           column += kPatch) {
        tile->patches[atomicAdd(&tile->patch_count, 1u)] =
            static_cast<uint16_t>(row * kTileWidth + column);
      }
    }
  }
}

// The four samples around a cell, top left, top right, bottom left, bottom right.
struct Corners {
  int64_t sample[4];

  template <class T>
  __device__ __forceinline__ Corners(const UpsampleArgmax<T>& job, int32_t y, int32_t x) {
    const int64_t width = job.x_grid.source;
    const int64_t far_y = job.y_grid.far(y);
    const int32_t far_x = job.x_grid.far(x);
    sample[0] = y * width + x;
    sample[1] = y * width + far_x;
    sample[2] = far_y * width + x;
    sample[3] = far_y * width + far_x;
  }
};

// Bit c % 32 of candidates[c / 32]: class c is not beaten in the whole cell by a corner's winner.
// Coarser than the rule of beaten_below allows: a class counts as beaten when its best corner is
// below the worst corner of a winner. That keeps one class in eight more, for half of the work.
template <class T>
__device__ __forceinline__ void keep_candidates(const UpsampleArgmax<T>& job,
                                                const Corners& corners, uint32_t winners,
                                                uint32_t* candidates) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t member = lane % kPatch;
  // Two lanes have the four corners of one winner.
  const int32_t rival = static_cast<int32_t>(winners >> (member / 2 * 8) & 255);
  const bool is_bottom = member % 2 != 0;
  const float left = logit(job, is_bottom ? corners.sample[2] : corners.sample[0], rival);
  const float right = logit(job, is_bottom ? corners.sample[3] : corners.sample[1], rival);
  float limit = fminf(beaten_below(left), beaten_below(right));  // which are never NaN
  limit = fminf(limit, __shfl_xor_sync(kAllLanes, limit, 1));
  limit = fmaxf(limit, __shfl_xor_sync(kAllLanes, limit, 2));
  limit = fmaxf(limit, __shfl_xor_sync(kAllLanes, limit, 4));
  for (int32_t first = 0; first < job.classes; first += kWarp) {
    float best[kWarp / kPatch];
#pragma unroll
    for (int k = 0; k < kWarp / kPatch; ++k) {
      const int32_t c = first + k * kPatch + member;
      best[k] = 0.0f;
      if (c < job.classes) {
        best[k] = fmaxf(fmaxf(logit(job, corners.sample[0], c), logit(job, corners.sample[1], c)),
                        fmaxf(logit(job, corners.sample[2], c), logit(job, corners.sample[3], c)));
      }
    }
    uint32_t kept = 0;
#pragma unroll
    for (int k = 0; k < kWarp / kPatch; ++k) {
      const bool is_kept = first + k * kPatch + member < job.classes && !(best[k] < limit);
      const uint32_t votes = __ballot_sync(kAllLanes, is_kept);
      kept |= (votes >> (lane - member) & 255) << (k * kPatch);
    }
    if (member == 0) candidates[first / kWarp] = kept;
  }
}

// The values of one class along a column of a cell, for which x is fixed.
struct Edge {
  float top, bottom;

  template <class T>
  __device__ __forceinline__ Edge(const UpsampleArgmax<T>& job, const Corners& corners, int32_t c,
                                  float x_near, float x_far)
      : top(lerp(x_near, logit(job, corners.sample[0], c), x_far,
                 logit(job, corners.sample[1], c))),
        bottom(lerp(x_near, logit(job, corners.sample[2], c), x_far,
                    logit(job, corners.sample[3], c))) {}
};

// Pixels of undecided cells, a patch per group of lanes.
template <bool kConfidence, class T>
__device__ __forceinline__ void compute_patches(const UpsampleArgmax<T>& job,
                                                Tile<kConfidence>* tile) {
  const Window& window = tile->window;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t member = thread % kPatch;
  const int32_t first_lane = thread % kWarp - member;
  uint32_t* candidates = tile->candidates[thread / kPatch];
  const int32_t count = static_cast<int32_t>(tile->patch_count);
  // The bounds are the same for all lanes of a warp, as the warp-wide calls need.
  for (int32_t first = thread / kWarp * (kWarp / kPatch); first < count; first += kGroups) {
    const int32_t own = first + first_lane / kPatch;
    const int32_t patch = tile->patches[min(own, count - 1)];
    const int32_t row = patch / kTileWidth;
    const int32_t column = patch % kTileWidth + member;
    const int32_t y = tile->cell_of_row[row];
    const int32_t x = tile->cell_of_column[column - member];
    const int32_t rows =
        own < count ? min(static_cast<int32_t>(tile->row_of_cell[y + 1]) - row, kPatch) : 0;
    const bool has_column = column < tile->column_of_cell[x + 1];
    const uint16_t* top = tile->samples + y * window.samples_x;
    const uint16_t* bottom = tile->samples + min(y + 1, window.samples_y - 1) * window.samples_x;
    const int32_t right = min(x + 1, window.samples_x - 1);
    const uint32_t winners = static_cast<uint32_t>(top[x] & 255) |
                             static_cast<uint32_t>(top[right] & 255) << 8 |
                             static_cast<uint32_t>(bottom[x] & 255) << 16 |
                             static_cast<uint32_t>(bottom[right] & 255) << 24;
    const int32_t cell_y = window.first_y + y;
    const int32_t cell_x = window.first_x + x;
    const Corners corners(job, cell_y, cell_x);
    keep_candidates(job, corners, winners, candidates);

    // Each lane works out the weights of its column, and of one row for all of the group.
    const int32_t x_at = window.column + min(column, window.columns - 1);
    const float x_near = job.x_grid.near_weight(x_at, cell_x);
    const float x_far = job.x_grid.far_weight(x_at, cell_x);
    const int32_t y_at = window.row + min(row + member, window.rows - 1);
    const float near = job.y_grid.near_weight(y_at, cell_y);
    const float far = job.y_grid.far_weight(y_at, cell_y);
    __syncwarp();  // candidates are written
    for (int32_t done = 0; __any_sync(kAllLanes, done < rows); done += kRowsAtOnce) {
      float y_near[kRowsAtOnce];
      float y_far[kRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        y_near[k] = __shfl_sync(kAllLanes, near, first_lane + done + k);
        y_far[k] = __shfl_sync(kAllLanes, far, first_lane + done + k);
      }
      if (!has_column || done >= rows) continue;
      Winner<float> best[kRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) best[k].start();
#pragma unroll 1
      for (int32_t word = 0; word * kWarp < job.classes; ++word) {
#pragma unroll 1
        for (uint32_t left = candidates[word]; left != 0; left &= left - 1) {
          const int32_t c = word * kWarp + __ffs(static_cast<int>(left)) - 1;
          const Edge edge(job, corners, c, x_near, x_far);
#pragma unroll
          for (int k = 0; k < kRowsAtOnce; ++k) {
            best[k].offer(lerp(y_near[k], edge.top, y_far[k], edge.bottom), c);
          }
        }
      }
      const int32_t at = (row + done) * kTileWidth + column;
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (done + k < rows) {
          tile->class_map[at + k * kTileWidth] = static_cast<uint8_t>(best[k].index);
        }
      }
      if (!kConfidence) continue;
      float sum[kRowsAtOnce] = {};
#pragma unroll 1
      for (int32_t c = 0; c < job.classes; ++c) {
        const Edge edge(job, corners, c, x_near, x_far);
#pragma unroll
        for (int k = 0; k < kRowsAtOnce; ++k) {
          sum[k] +=
              exp_nonpositive(lerp(y_near[k], edge.top, y_far[k], edge.bottom) - best[k].value);
        }
      }
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (done + k < rows) {
          tile->confidence[at + k * kTileWidth] = static_cast<uint8_t>(confidence_level(sum[k]));
        }
      }
    }
    __syncwarp();  // before the next patch's candidates replace these
  }
}

__device__ __forceinline__ void convert(uint32_t level, uint8_t* to) {
  *to = static_cast<uint8_t>(level);
}
__device__ __forceinline__ void convert(uint32_t level, Half* to) {
  *to = to_half(static_cast<float>(level));
}
__device__ __forceinline__ void convert(uint32_t level, int32_t* to) {
  *to = static_cast<int32_t>(level);
}

template <class Element, int kCount>
struct alignas(kCount * sizeof(Element)) Pack {
  Element element[kCount];
};

// The tile to device memory: 16 bytes at a time, or one element after the other.
template <class Out>
__device__ __forceinline__ void store_tile(const Window& window, const uint8_t* levels,
                                           int64_t width, bool whole_packs, Out* output) {
  constexpr int32_t kPack = 16 / sizeof(Out);
  constexpr int32_t kPacks = kTileWidth / kPack;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  Out* corner = output + window.row * width + window.column;
  if (whole_packs) {
#pragma unroll 1
    for (int32_t i = thread; i < window.rows * kPacks; i += kThreads) {
      const int32_t row = i / kPacks;
      const int32_t column = i % kPacks * kPack;
      if (column >= window.columns) continue;
      const auto from =
          *reinterpret_cast<const Pack<uint8_t, kPack>*>(levels + row * kTileWidth + column);
      Pack<Out, kPack> to;
#pragma unroll
      for (int k = 0; k < kPack; ++k) convert(from.element[k], &to.element[k]);
      *reinterpret_cast<Pack<Out, kPack>*>(corner + row * width + column) = to;
    }
  } else {
#pragma unroll 1
    for (int32_t i = thread; i < window.rows * kTileWidth; i += kThreads) {
      const int32_t row = i / kTileWidth;
      const int32_t column = i % kTileWidth;
      if (column < window.columns) convert(levels[i], corner + row * width + column);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_tile(const UpsampleArgmax<T>& job, const Window& window,
                                           const uint8_t* levels, void* output) {
  const int64_t width = job.x_grid.target;
  if (job.output_type == kUint8) {
    store_tile(window, levels, width, job.whole_packs, static_cast<uint8_t*>(output));
  } else if (job.output_type == kFloat16) {
    store_tile(window, levels, width, job.whole_packs, static_cast<Half*>(output));
  } else {
    store_tile(window, levels, width, job.whole_packs, static_cast<int32_t*>(output));
  }
}

template <class T, bool kConfidence>
__global__ void __launch_bounds__(kThreads, kConfidence ? kConfidenceBlocks : kTileBlocks)
    upsample_argmax_by_tiles(const UpsampleArgmax<T> job) {
  __shared__ Tile<kConfidence> tile;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int64_t index = blockIdx.x; index < job.tiles; index += gridDim.x) {
    if (thread < kWarp) {
      const int64_t tile_y = quotient(index, job.tiles_x);
      find_window(job, static_cast<int32_t>(tile_y),
                  static_cast<int32_t>(index - tile_y * job.tiles_x), &tile.window);
      if (thread == 0) tile.patch_count = 0;
    }
    __syncthreads();
    const Window& window = tile.window;
    // The last threads, which often have no sample, write the tables.
    find_cells(job.x_grid, window.first_x, window.cells_x, window.column, window.columns,
               kTileWidth, kThreads - 1 - thread, tile.column_of_cell, tile.cell_of_column);
    find_cells(job.y_grid, window.first_y, window.cells_y, window.row, window.rows, window.rows,
               kThreads - 1 - thread, tile.row_of_cell, tile.cell_of_row);
#pragma unroll 1
    for (int32_t i = thread; i < window.samples_x * window.samples_y; i += kThreads) {
      const int32_t y = static_cast<int32_t>(quotient(i, window.samples_x));
      const int32_t x = i - y * window.samples_x;
      const int64_t row = static_cast<int64_t>(window.first_y + y) * job.x_grid.source;
      tile.samples[i] = find_winner<kConfidence>(job, row + window.first_x + x);
    }
    __syncthreads();
    find_patches(&tile);
    fill_tile(&tile);
    __syncthreads();
    if (tile.patch_count != 0) {
      compute_patches(job, &tile);
      __syncthreads();
    }
    store_tile(job, window, tile.class_map, job.class_map);
    if (kConfidence) store_tile(job, window, tile.confidence, job.confidence);
    __syncthreads();
  }
}

// One pixel from all classes.
template <class T>
__device__ __forceinline__ void compute_pixel(const UpsampleArgmax<T>& job, int32_t row,
                                              int32_t column, uint32_t* winner, uint32_t* level) {
  const int32_t y = job.y_grid.cell(row);
  const int32_t x = job.x_grid.cell(column);
  const Corners corners(job, y, x);
  const float x_near = job.x_grid.near_weight(column, x);
  const float x_far = job.x_grid.far_weight(column, x);
  const float y_near = job.y_grid.near_weight(row, y);
  const float y_far = job.y_grid.far_weight(row, y);
  const auto interpolate = [&](int32_t first, float (&values)[kFew]) {
    float near[kFew];
    float far[kFew];
    fetch(job, corners.sample[0], first, near);
    fetch(job, corners.sample[1], first, far);
#pragma unroll
    for (int n = 0; n < kFew; ++n) values[n] = lerp(x_near, near[n], x_far, far[n]);
    fetch(job, corners.sample[2], first, near);
    fetch(job, corners.sample[3], first, far);
#pragma unroll
    for (int n = 0; n < kFew; ++n) {
      values[n] = lerp(y_near, values[n], y_far, lerp(x_near, near[n], x_far, far[n]));
    }
  };
  Winner<float> best;
  best.start();
  for (int32_t first = 0; first < job.classes; first += kFew) {
    float values[kFew];
    interpolate(first, values);
#pragma unroll
    for (int n = 0; n < kFew; ++n) best.offer(values[n], first + n);
  }
  *winner = static_cast<uint32_t>(best.index);
  *level = 0;
  if (job.confidence == nullptr) return;
  float sum = 0.0f;
  for (int32_t first = 0; first < job.classes; first += kFew) {
    float values[kFew];
    interpolate(first, values);
#pragma unroll
    for (int n = 0; n < kFew; ++n) sum += exp_nonpositive(values[n] - best.value);
  }
  *level = static_cast<uint32_t>(confidence_level(sum));
}

__device__ __forceinline__ void store(int32_t type, uint32_t level, void* output, int64_t at) {
  if (type == kUint8) {
    convert(level, static_cast<uint8_t*>(output) + at);
  } else if (type == kFloat16) {
    convert(level, static_cast<Half*>(output) + at);
  } else {
    convert(level, static_cast<int32_t*>(output) + at);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kPixelBlocks)
    upsample_argmax_by_pixels(const UpsampleArgmax<T> job) {
  const int64_t width = job.x_grid.target;
  const int64_t pixels = width * job.y_grid.target;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < pixels;
       at += threads) {
    const int64_t row = quotient(at, width);
    uint32_t winner;
    uint32_t level;
    compute_pixel(job, static_cast<int32_t>(row), static_cast<int32_t>(at - row * width), &winner,
                  &level);
    store(job.output_type, winner, job.class_map, at);
    if (job.confidence != nullptr) store(job.output_type, level, job.confidence, at);
  }
}

bool is_side(int32_t side) { return side >= 1 && side <= kMaxSide; }

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

uintptr_t size_of(int32_t type) {
  return type == kUint8 ? 1 : type == kFloat16 ? sizeof(Half) : sizeof(int32_t);
}

// The launcher below for one type of logits; all arguments but the address of the logits have been
// checked.
template <class T>
int32_t run(const Features& logits, void* class_map, void* confidence, int32_t output_type,
            int32_t target_height, int32_t target_width, int32_t flags, void* stream) {
  constexpr int64_t kPack = 16 / sizeof(T);
  if (!is_aligned(logits.data, sizeof(T))) return cudaErrorInvalidValue;
  const bool align_corners = (flags & kAlignCorners) != 0;
  UpsampleArgmax<T> job = {};
  job.logits = static_cast<const T*>(logits.data);
  job.class_stride = logits.channel_stride;
  job.sample_stride = logits.pixel_stride;
  job.classes = logits.channels;
  job.packed =
      job.class_stride == 1 && job.sample_stride % kPack == 0 && is_aligned(job.logits, 16);
  job.output_type = output_type;
  job.class_map = class_map;
  job.confidence = confidence;
  job.whole_packs = is_aligned(class_map, 16) && is_aligned(confidence, 16) &&
                    target_width * size_of(output_type) % 16 == 0;
  job.y_grid = Grid{logits.height, target_height, align_corners};
  job.x_grid = Grid{logits.width, target_width, align_corners};

  const bool doubles = target_width / 2 >= logits.width && target_height / 2 >= logits.height;
  if (!doubles || (flags & kNoShortCut) != 0) {
    const int64_t pixels = static_cast<int64_t>(target_width) * target_height;
    return launch<upsample_argmax_by_pixels<T>>(ceil_div(pixels, kThreads), kThreads, stream, job);
  }
  // High tiles share more samples; but every processor should have a few blocks.
  int32_t processors = 0;
  const cudaError_t error = processors_here(&processors);
  if (error != cudaSuccess) return error;
  job.tiles_x = ceil_div(target_width, kTileWidth);
  job.tile_rows = 2 * kTileHeight;
  do {
    job.tile_rows /= 2;
    job.tiles = job.tiles_x * ceil_div(target_height, job.tile_rows);
  } while (job.tile_rows > kPatch && job.tiles < int64_t{kTileBlocks} * processors);
  if (confidence != nullptr) {
    return launch<upsample_argmax_by_tiles<T, true>, kRounds>(job.tiles, kThreads, stream, job);
  }
  return launch<upsample_argmax_by_tiles<T, false>, kRounds>(job.tiles, kThreads, stream, job);
}

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_upsample_argmax(const edgeseg::Features* logits, void* class_map,
                                              void* confidence, int32_t output_type,
                                              int32_t target_height, int32_t target_width,
                                              int32_t flags, void* stream) {
  using namespace edgeseg;
  if (logits == nullptr || logits->data == nullptr || class_map == nullptr ||
      logits->channels < 1 || logits->channels > kMaxClasses || !is_side(logits->height) ||
      !is_side(logits->width) || logits->channel_stride < 1 || logits->pixel_stride < 1 ||
      !is_side(target_height) || !is_side(target_width) ||
      (flags & ~(kAlignCorners | kNoShortCut)) != 0 ||
      (output_type != kUint8 && output_type != kFloat16 && output_type != kInt32) ||
      !is_aligned(class_map, size_of(output_type)) ||
      !is_aligned(confidence, size_of(output_type))) {
    return cudaErrorInvalidValue;
  }
  switch (logits->type) {
    case kFloat32:
      return run<float>(*logits, class_map, confidence, output_type, target_height, target_width,
                        flags, stream);
    case kFloat16:
      return run<Half>(*logits, class_map, confidence, output_type, target_height, target_width,
                       flags, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
