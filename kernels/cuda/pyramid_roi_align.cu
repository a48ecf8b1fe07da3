// EdgeSegPyramidRoiAlign on CUDA: all boxes from all levels in one launch. A block takes one box
// and some of its channels; it finds once, in shared memory, which pixels each bin reads and with
// what weights (the part that a thread per output would do again for every channel), and then all
// threads run over channels and pixels. Device pointers and a stream; allocates nothing, waits for
// nothing. Build with -fmad=false: the results are then those of the CPU library, for float16
// rounded once more.

#include "edgeseg/half.h"
#include "edgeseg/pyramid_roi_align.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarpsPerBlock = 8;
constexpr int32_t kBlock = kWarp * kWarpsPerBlock;
constexpr int32_t kBlocksPerProcessor = 4;  // 64 registers a thread: nothing spills

// Room for the taps of one axis. A box that needs more takes the slow path.
constexpr int32_t kTableBins = 128;
constexpr int32_t kTableTaps = 512;

// Channels first: a warp does so many planes at a time, and has room for so many sums of columns,
// in all of them. Of boxes that are too wide for that it does one plane at a time.
constexpr int32_t kPlanes = 4;
constexpr int32_t kColumnRoom = 512;
constexpr int32_t kPlanarChannels = 2 * kWarpsPerBlock * kPlanes;  // of one unit of work

// Channels last: bytes of output that a block puts together before it writes them.
constexpr int32_t kTileBytes = 16 * 1024;
constexpr int32_t kMostTileChannels = 64;

__device__ __forceinline__ void store(float value, float* to) { *to = value; }
__device__ __forceinline__ void store(float value, Half* to) { *to = to_half(value); }

struct Tap {
  int32_t pixel;
  float weight;
};

// The taps of each bin along one axis, in `room` places each.
struct AxisTable {
  Tap taps[kTableTaps];
  int32_t count[kTableBins];
  int32_t room;
  int32_t first, last;  // pixels that any bin reads
};

struct Job {
  Pyramid pyramid;
  LevelRule rule;
  RoiPooling pooling;
  const float* boxes;
  const int32_t* image_of;
  void* output;
  int64_t units;  // boxes times groups of channels
  int32_t groups;
  int32_t group_channels;
};

// A unit of work, in shared memory: one box, some of its channels.
struct Unit {
  Roi roi;
  // At the box's image and the unit's first channel; offsets from there fit 32 bits.
  const void* features;
  void* output;  // at the box and the same channel
  int32_t map_height, map_width;
  int32_t channel_stride, pixel_stride;
  int32_t channels;
  int32_t bins_y, bins_x, bins;
  AxisTable x, y;
  uint32_t overflowed;  // the tables are too small for the box
};

template <class T>
__device__ __forceinline__ void start_unit(const Job& job, int64_t number, Unit* unit) {
  const int64_t index = number / job.groups;
  const int32_t channel = static_cast<int32_t>(number - index * job.groups) * job.group_channels;
  unit->roi = make_roi(job.pyramid, job.rule, job.pooling, job.boxes + 4 * index,
                       job.image_of != nullptr ? job.image_of[index] : 0);
  const Features& level = job.pyramid.levels[unit->roi.level];
  unit->features = static_cast<const T*>(level.data) +
                   unit->roi.image * job.pyramid.image_strides[unit->roi.level] +
                   channel * level.channel_stride;
  unit->map_height = level.height;
  unit->map_width = level.width;
  unit->channel_stride = static_cast<int32_t>(level.channel_stride);
  unit->pixel_stride = static_cast<int32_t>(level.pixel_stride);
  unit->channels = min(job.group_channels, level.channels - channel);
  unit->bins_y = job.pooling.height;
  unit->bins_x = job.pooling.width;
  unit->bins = unit->bins_y * unit->bins_x;
  unit->output = static_cast<T*>(job.output) + (index * level.channels + channel) * unit->bins;
  unit->overflowed = max(unit->bins_y, unit->bins_x) > kTableBins;
  unit->x.room = kTableTaps / unit->bins_x;
  unit->y.room = kTableTaps / unit->bins_y;
  unit->x.first = unit->y.first = INT32_MAX;
  unit->x.last = unit->y.last = -1;
}

// One thread per bin.
__device__ __forceinline__ void fill_bin(const RoiAxis& axis, int32_t bin, int32_t size,
                                         AxisTable* table, uint32_t* overflowed) {
  Taps taps(axis, bin, size);
  Tap* to = table->taps + bin * table->room;
  int32_t count = 0;
  int32_t first = INT32_MAX;
  int32_t last = -1;
  for (Tap tap; taps.next(&tap.pixel, &tap.weight);) {
    if (count == table->room) {
      atomicOr(overflowed, 1u);
      return;
    }
    to[count++] = tap;
    first = min(first, tap.pixel);
    last = max(last, tap.pixel);
  }
  table->count[bin] = count;
  if (count > 0) {
    atomicMin(&table->first, first);
    atomicMax(&table->last, last);
  }
}

// Unit `number` with its tables; the whole block takes part.
template <class T>
__device__ __forceinline__ void prepare(const Job& job, int64_t number, Unit* unit) {
  __syncthreads();  // until nobody reads the unit before
  if (threadIdx.x == 0) start_unit<T>(job, number, unit);
  __syncthreads();
  if (!unit->roi.is_empty && unit->bins_y <= kTableBins && unit->bins_x <= kTableBins) {
    for (int32_t i = threadIdx.x; i < unit->bins_x + unit->bins_y; i += kBlock) {
      if (i < unit->bins_x) {
        fill_bin(unit->roi.x, i, unit->map_width, &unit->x, &unit->overflowed);
      } else {
        fill_bin(unit->roi.y, i - unit->bins_x, unit->map_height, &unit->y, &unit->overflowed);
      }
    }
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void write_zeros(const Unit& unit) {
  const int32_t count = unit.channels * unit.bins;
  for (int32_t i = threadIdx.x; i < count; i += kBlock) {
    store(0.0f, static_cast<T*>(unit.output) + i);
  }
}

// One thread per output, which finds its taps by itself: for boxes that the tables are too small
// for. Any strides.
template <class T>
__device__ __forceinline__ void pool_without_tables(const Unit& unit) {
  const int32_t count = unit.channels * unit.bins;
  for (int32_t i = threadIdx.x; i < count; i += kBlock) {
    const int32_t channel = i / unit.bins;
    const int32_t bin = i - channel * unit.bins;
    const int32_t bin_y = bin / unit.bins_x;
    const T* plane = static_cast<const T*>(unit.features) + channel * unit.channel_stride;
    Taps columns(unit.roi.x, bin - bin_y * unit.bins_x, unit.map_width);
    float sum = 0.0f;
    for (Tap x; columns.next(&x.pixel, &x.weight);) {
      Taps rows(unit.roi.y, bin_y, unit.map_height);
      float column = 0.0f;
      for (Tap y; rows.next(&y.pixel, &y.weight);) {
        const int32_t pixel = y.pixel * unit.map_width + x.pixel;
        column += y.weight * to_float(plane[pixel * unit.pixel_stride]);
      }
      sum += x.weight * column;
    }
    store(sum, static_cast<T*>(unit.output) + i);
  }
}

// start, start + step, ... as (i / by, i % by), without a division each time.
struct Walk {
  int32_t major, minor;
  int32_t by, major_step, minor_step;

  __device__ __forceinline__ Walk(int32_t start, int32_t step, int32_t its_by)
      : major(start / its_by),
        minor(start % its_by),
        by(its_by),
        major_step(step / its_by),
        minor_step(step % its_by) {}

  __device__ __forceinline__ void advance() {
    major += major_step;
    minor += minor_step;
    if (minor >= by) {
      minor -= by;
      ++major;
    }
  }
};

// A warp pools kCount planes. First the columns, each summed over its rows for some rows of bins,
// with neighbouring lanes on neighbouring pixels; then bins from their columns.
template <class T, int kCount>
__device__ __forceinline__ void pool_planes(const Unit& unit, int32_t lane, int32_t channel,
                                            float* columns) {
  constexpr int32_t kRoom = kColumnRoom / kCount;
  const int32_t span = unit.x.last - unit.x.first + 1;
  const int32_t pixel_stride = unit.pixel_stride;
  const int32_t row_stride = unit.map_width * pixel_stride;
  // Planes after the last one are the last one again, and not written.
  const int32_t planes = min(kCount, unit.channels - channel);
  const T* from[kCount];
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    from[p] = static_cast<const T*>(unit.features) +
              (channel + min(p, planes - 1)) * unit.channel_stride + unit.x.first * pixel_stride;
  }
  T* to = static_cast<T*>(unit.output) + channel * unit.bins;

  // As many rows at a time as there is room for, each time about the same number.
  const int32_t most_rows = kRoom / span;
  const int32_t passes = (unit.bins_y + most_rows - 1) / most_rows;
  const int32_t rows_each = (unit.bins_y + passes - 1) / passes;
  for (int32_t row = 0; row < unit.bins_y; row += rows_each) {
    const int32_t rows = min(rows_each, unit.bins_y - row);
    Walk at(lane, kWarp, span);
    for (int32_t i = lane; i < rows * span; i += kWarp, at.advance()) {
      const Tap* taps = unit.y.taps + (row + at.major) * unit.y.room;
      const int32_t count = unit.y.count[row + at.major];
      const int32_t column = at.minor * pixel_stride;
      float sum[kCount] = {};
      for (int32_t t = 0; t < count; ++t) {
        const Tap tap = taps[t];
        const int32_t offset = tap.pixel * row_stride + column;
#pragma unroll
        for (int p = 0; p < kCount; ++p) sum[p] += tap.weight * to_float(from[p][offset]);
      }
#pragma unroll
      for (int p = 0; p < kCount; ++p) columns[p * kRoom + i] = sum[p];
    }
    __syncwarp();
    Walk bin(lane, kWarp, unit.bins_x);
    for (int32_t i = lane; i < rows * unit.bins_x; i += kWarp, bin.advance()) {
      const Tap* taps = unit.x.taps + bin.minor * unit.x.room;
      const int32_t count = unit.x.count[bin.minor];
      const int32_t first = bin.major * span - unit.x.first;
      float sum[kCount] = {};
      for (int32_t t = 0; t < count; ++t) {
        const Tap tap = taps[t];
#pragma unroll
        for (int p = 0; p < kCount; ++p) {
          sum[p] += tap.weight * columns[p * kRoom + first + tap.pixel];
        }
      }
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
        if (p < planes) store(sum[p], to + p * unit.bins + row * unit.bins_x + i);
      }
    }
    __syncwarp();  // before the next rows replace the columns
  }
}

// Levels of any strides; made for channels first.
template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksPerProcessor) planar_kernel(const Job job) {
  __shared__ Unit unit;
  __shared__ float columns[kWarpsPerBlock][kColumnRoom];
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  for (int64_t number = blockIdx.x; number < job.units; number += gridDim.x) {
    prepare<T>(job, number, &unit);
    const int32_t span = unit.x.last - unit.x.first + 1;
    if (unit.roi.is_empty) {
      write_zeros<T>(unit);
    } else if (unit.overflowed != 0 || span > kColumnRoom) {
      pool_without_tables<T>(unit);
    } else if (unit.x.last < 0) {
      write_zeros<T>(unit);
    } else if (span > kColumnRoom / kPlanes) {
      for (int32_t c = warp; c < unit.channels; c += kWarpsPerBlock) {
        pool_planes<T, 1>(unit, lane, c, columns[warp]);
      }
    } else {
      for (int32_t c = warp * kPlanes; c < unit.channels; c += kWarpsPerBlock * kPlanes) {
        pool_planes<T, kPlanes>(unit, lane, c, columns[warp]);
      }
    }
  }
}

// kCount neighbouring channels; kCount * sizeof(T) is 16, or kCount is 1.
template <class T, int kCount>
struct Channels {
  T values[kCount];

  __device__ __forceinline__ explicit Channels(const T* from) {
    if constexpr (kCount == 1) {
      values[0] = *from;
    } else {
      static_assert(sizeof(values) == sizeof(uint4), "one 16-byte load");
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      memcpy(values, &bits, sizeof bits);
    }
  }
};

// Channels last: neighbouring threads on neighbouring channels, 16 bytes each where kCount > 1. The
// last of them may be padding, which is read and not used. The output is channels first, so the
// block puts it together in shared memory and writes it in order.
template <class T, int kCount>
__global__ void __launch_bounds__(kBlock, kBlocksPerProcessor) interleaved_kernel(const Job job) {
  __shared__ Unit unit;
  __shared__ uint4 tile_bits[kTileBytes / sizeof(uint4)];
  T* tile = reinterpret_cast<T*>(tile_bits);
  for (int64_t number = blockIdx.x; number < job.units; number += gridDim.x) {
    prepare<T>(job, number, &unit);
    if (unit.roi.is_empty) {
      write_zeros<T>(unit);
      continue;
    }
    if (unit.overflowed != 0) {
      pool_without_tables<T>(unit);
      continue;
    }
    const T* from = static_cast<const T*>(unit.features);
    const int32_t bins = unit.bins;
    const int32_t pixel_stride = unit.pixel_stride;
    const int32_t row_stride = unit.map_width * pixel_stride;
    const int32_t vectors = (unit.channels + kCount - 1) / kCount;
    Walk at(static_cast<int32_t>(threadIdx.x), kBlock, vectors);
    for (; at.major < bins; at.advance()) {
      const int32_t bin_y = at.major / unit.bins_x;
      const int32_t bin_x = at.major - bin_y * unit.bins_x;
      const int32_t channel = at.minor * kCount;
      const Tap* x_taps = unit.x.taps + bin_x * unit.x.room;
      const Tap* y_taps = unit.y.taps + bin_y * unit.y.room;
      const int32_t x_count = unit.x.count[bin_x];
      const int32_t y_count = unit.y.count[bin_y];
      float sum[kCount] = {};
      for (int32_t i = 0; i < x_count; ++i) {
        const Tap x = x_taps[i];
        const T* pixels = from + (x.pixel * pixel_stride + channel);
        float column[kCount] = {};
        for (int32_t j = 0; j < y_count; ++j) {
          const Tap y = y_taps[j];
          const Channels<T, kCount> pixel(pixels + y.pixel * row_stride);
#pragma unroll
          for (int k = 0; k < kCount; ++k) column[k] += y.weight * to_float(pixel.values[k]);
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[k] += x.weight * column[k];
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) store(sum[k], tile + (channel + k) * bins + at.major);
    }
    __syncthreads();  // the next unit's tile waits for the barriers of prepare()
    T* to = static_cast<T*>(unit.output);
    const int32_t count = unit.channels * bins;
    constexpr int32_t kPerVector = sizeof(uint4) / sizeof(T);
    int32_t done = 0;
    if ((reinterpret_cast<uintptr_t>(to) & (sizeof(uint4) - 1)) == 0) {
      const int32_t whole = count / kPerVector;
      for (int32_t i = threadIdx.x; i < whole; i += kBlock) {
        reinterpret_cast<uint4*>(to)[i] = tile_bits[i];
      }
      done = whole * kPerVector;
    }
    for (int32_t i = done + static_cast<int32_t>(threadIdx.x); i < count; i += kBlock) {
      to[i] = tile[i];
    }
  }
}

// Whether the channels of each pixel lie in whole 16 bytes, at 16-byte addresses.
bool is_vectorizable(const Pyramid& pyramid, int32_t count, int64_t element) {
  for (int32_t i = 0; i < pyramid.level_count; ++i) {
    const Features& level = pyramid.levels[i];
    if (ceil_div(level.channels, count) * count > level.pixel_stride ||
        level.pixel_stride % count != 0 ||
        (pyramid.images > 1 && pyramid.image_strides[i] % count != 0) ||
        reinterpret_cast<uintptr_t>(level.data) % (count * element) != 0) {
      return false;
    }
  }
  return true;
}

bool is_interleaved(const Pyramid& pyramid) {
  for (int32_t i = 0; i < pyramid.level_count; ++i) {
    const Features& level = pyramid.levels[i];
    if (level.channel_stride != 1 || level.pixel_stride < level.channels) return false;
  }
  return pyramid.levels[0].channels > 1;
}

template <auto Kernel>
int32_t launch_units(Job* job, int32_t rois, int32_t group_channels, void* stream) {
  job->group_channels = group_channels;
  job->groups = static_cast<int32_t>(ceil_div(job->pyramid.levels[0].channels, group_channels));
  job->units = static_cast<int64_t>(rois) * job->groups;
  return launch<Kernel>(job->units, kBlock, stream, *job);
}

template <class T>
int32_t launch_for(Job* job, int32_t rois, void* stream) {
  constexpr int32_t kVector = 16 / static_cast<int32_t>(sizeof(T));
  constexpr int32_t kTile = kTileBytes / static_cast<int32_t>(sizeof(T));
  if (is_interleaved(job->pyramid)) {
    const bool vectorizable = is_vectorizable(job->pyramid, kVector, sizeof(T));
    const int32_t count = vectorizable ? kVector : 1;
    const int32_t padded =
        static_cast<int32_t>(ceil_div(job->pyramid.levels[0].channels, count) * count);
    const int32_t room = kTile / (job->pooling.height * job->pooling.width) / count * count;
    const int32_t group = std::min({room, padded, kMostTileChannels});
    if (group > 0) {
      return vectorizable ? launch_units<interleaved_kernel<T, kVector>>(job, rois, group, stream)
                          : launch_units<interleaved_kernel<T, 1>>(job, rois, group, stream);
    }
  }
  return launch_units<planar_kernel<T>>(job, rois, kPlanarChannels, stream);
}

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_pyramid_roi_align(const edgeseg::Pyramid* pyramid, const float* boxes,
                                                const int32_t* image_of, int32_t rois,
                                                const edgeseg::RoiPooling* pooling, void* output,
                                                void* stream) {
  using namespace edgeseg;
  if (pyramid == nullptr || pooling == nullptr || rois < 0 ||
      !is_valid(*pyramid, *pooling, kAligned)) {
    return cudaErrorInvalidValue;
  }
  if (rois == 0) return cudaSuccess;
  if (boxes == nullptr || output == nullptr) return cudaErrorInvalidValue;
  Job job = {*pyramid, LevelRule(*pyramid), *pooling, boxes, image_of, output, 0, 0, 0};
  if (pyramid->levels[0].type == kFloat32) return launch_for<float>(&job, rois, stream);
  if (pyramid->levels[0].type == kFloat16) return launch_for<Half>(&job, rois, stream);
  return cudaErrorInvalidValue;
}
