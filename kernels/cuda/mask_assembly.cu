// EdgeSegMaskAssembly on CUDA. Device pointers and a stream; allocates nothing, waits for nothing.
// Build with -fmad=false: the results are then those of the CPU library.

#include "edgeseg/half.h"
#include "edgeseg/mask_assembly.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

// 16 bytes of elements, loaded at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int32_t kCount = 16 / static_cast<int32_t>(sizeof(T));
  T values[kCount];
};

template <class T>
struct Prototypes {
  const T* data;
  int32_t channels, height, width;
  int64_t channel_stride, pixel_stride;
  bool packs_pixels;    // Pack of samples side by side, from a sample divisible by its count
  bool packs_channels;  // Pack of channels of one sample, likewise

  explicit Prototypes(const Features& features)
      : data(static_cast<const T*>(features.data)),
        channels(features.channels),
        height(features.height),
        width(features.width),
        channel_stride(features.channel_stride),
        pixel_stride(features.pixel_stride) {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T>) == 0;
    packs_pixels = aligned && pixel_stride == 1 && channel_stride % Pack<T>::kCount == 0;
    packs_channels = aligned && channel_stride == 1 && pixel_stride % Pack<T>::kCount == 0;
  }

  EDGESEG_HD int64_t plane() const { return static_cast<int64_t>(height) * width; }
};

template <class T>
struct Job {
  Prototypes<T> prototypes;
  const T* coefficients;  // (capacity, channels)
  const float* boxes;     // (capacity, 4)
  const int32_t* count;   // or null
  int32_t capacity, network_height, network_width;

  Job(const Features& features, const Instances& instances)
      : prototypes(features),
        coefficients(static_cast<const T*>(instances.coefficients)),
        boxes(instances.boxes),
        count(instances.count),
        capacity(instances.capacity),
        network_height(instances.network_height),
        network_width(instances.network_width) {}

  __device__ __forceinline__ int32_t present() const {
    if (count == nullptr) return capacity;
    return *count < 0 ? 0 : (*count < capacity ? *count : capacity);
  }

  __device__ __forceinline__ Crop crop(int32_t instance) const {
    return crop_of(boxes + 4 * static_cast<int64_t>(instance), prototypes.height, prototypes.width,
                   network_height, network_width);
  }
};

// --- Levels at the size of the prototypes. A block takes a tile of samples to shared memory and
// serves a group of instances from there: a warp works on one instance, a thread on four samples.

constexpr int32_t kThreadSamples = 4;
constexpr int32_t kTileSamples = kWarp * kThreadSamples;
constexpr int32_t kTileChannels = 32;
constexpr int32_t kTileInstances = 4 * kWarps;
// Rows of channels are shifted against each other, so that threads that store channels of one
// sample rarely meet in a bank, and stay aligned for loads of four.
constexpr int32_t kTilePitch = kTileSamples + 4;

struct LevelTile {
  __align__(16) float samples[kTileChannels * kTilePitch];
  float coefficients[kTileInstances * kTileChannels];
  Crop crops[kTileInstances];
  int32_t in_use;  // whether a crop of the group reaches the rows of the tile
};

// Channels from `channel` on, of the samples from `first` on; zeros beyond the end.
template <class T>
__device__ __forceinline__ void stage_samples(const Prototypes<T>& prototypes, int64_t first,
                                              int32_t channel, LevelTile* tile) {
  constexpr int32_t kPack = Pack<T>::kCount;
  const int64_t plane = prototypes.plane();
  const int32_t channels =
      prototypes.channels - channel < kTileChannels ? prototypes.channels - channel : kTileChannels;
  if (prototypes.packs_pixels) {
    constexpr int32_t kPacks = kTileSamples / kPack;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < channels * kPacks; i += kThreads) {
      const int32_t c = i / kPacks;
      const int32_t s = i % kPacks * kPack;
      const T* from = prototypes.data + (channel + c) * prototypes.channel_stride + first + s;
      float* to = tile->samples + c * kTilePitch + s;
      if (first + s + kPack <= plane) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
        for (int32_t j = 0; j < kPack; ++j) to[j] = to_float(pack.values[j]);
      } else {
        for (int32_t j = 0; j < kPack; ++j) {
          to[j] = first + s + j < plane ? to_float(from[j]) : 0.0f;
        }
      }
    }
    return;
  }
  if (prototypes.packs_channels) {
    constexpr int32_t kPacks = kTileChannels / kPack;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kTileSamples * kPacks; i += kThreads) {
      const int32_t s = i / kPacks;
      const int32_t c = i % kPacks * kPack;
      if (c >= channels) continue;
      const T* from = prototypes.data + (first + s) * prototypes.pixel_stride + channel + c;
      float* to = tile->samples + c * kTilePitch + s;
      if (first + s < plane && c + kPack <= channels) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
        for (int32_t j = 0; j < kPack; ++j) to[j * kTilePitch] = to_float(pack.values[j]);
      } else {
        for (int32_t j = 0; j < kPack && c + j < channels; ++j) {
          to[j * kTilePitch] = first + s < plane ? to_float(from[j]) : 0.0f;
        }
      }
    }
    return;
  }
  // Neighbouring threads read along the axis of the smaller stride.
  const bool along_samples = prototypes.pixel_stride <= prototypes.channel_stride;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < channels * kTileSamples; i += kThreads) {
    const int32_t c = along_samples ? i / kTileSamples : i % channels;
    const int32_t s = along_samples ? i % kTileSamples : i / channels;
    tile->samples[c * kTilePitch + s] =
        first + s < plane ? to_float(prototypes.data[(channel + c) * prototypes.channel_stride +
                                                     (first + s) * prototypes.pixel_stride])
                          : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void stage_coefficients(const Job<T>& job, int32_t first_instance,
                                                   int32_t channel, LevelTile* tile) {
  const int32_t channels = job.prototypes.channels;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kTileInstances * kTileChannels;
       i += kThreads) {
    const int32_t instance = first_instance + i / kTileChannels;
    const int32_t c = channel + i % kTileChannels;
    if (instance < job.capacity && c < channels) {
      tile->coefficients[i] =
          to_float(job.coefficients[static_cast<int64_t>(instance) * channels + c]);
    }
  }
}

__device__ __forceinline__ void store_level(int32_t level, uint8_t* to) {
  *to = static_cast<uint8_t>(level);
}
__device__ __forceinline__ void store_level(int32_t level, Half* to) {
  *to = to_half(static_cast<float>(level));
}

template <class Out>
struct alignas(kThreadSamples * sizeof(Out)) Levels {
  Out values[kThreadSamples];
};

template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    mask_levels_kernel(const Job<T> job, Out* masks, bool aligned) {
  __shared__ LevelTile tile;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int64_t plane = job.prototypes.plane();
  const int32_t width = job.prototypes.width;
  const int32_t channels = job.prototypes.channels;
  const int32_t present = job.present();
  const int64_t tiles = ceil_div(plane, kTileSamples);
  const int64_t groups = ceil_div(job.capacity, kTileInstances);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t group = quotient(item, tiles);
    const int64_t first = (item - group * tiles) * kTileSamples;
    const int32_t first_instance = static_cast<int32_t>(group) * kTileInstances;

    __syncthreads();  // the last item's shared memory has been read
    if (threadIdx.x == 0) tile.in_use = 0;
    __syncthreads();
    if (threadIdx.x < kTileInstances) {
      const int32_t instance = first_instance + static_cast<int32_t>(threadIdx.x);
      const Crop crop = instance < present ? job.crop(instance) : Crop{{0, 0}, {0, 0}};
      tile.crops[threadIdx.x] = crop;
      const int64_t first_row = quotient(first, width);
      const int64_t last_row = quotient(first + kTileSamples - 1, width);
      if (!crop.is_empty() && crop.y.begin <= last_row && first_row < crop.y.end) tile.in_use = 1;
    }
    __syncthreads();
    const bool in_use = tile.in_use != 0;

    const int64_t sample = first + lane * kThreadSamples;
    int32_t y[kThreadSamples];
    int32_t x[kThreadSamples];
    y[0] = static_cast<int32_t>(quotient(sample, width));
    x[0] = static_cast<int32_t>(sample - static_cast<int64_t>(y[0]) * width);
#pragma unroll
    for (int32_t j = 1; j < kThreadSamples; ++j) {
      const bool wraps = x[j - 1] + 1 == width;
      x[j] = wraps ? 0 : x[j - 1] + 1;
      y[j] = y[j - 1] + wraps;
    }

    int32_t staged = -1;
    for (int32_t pass = 0; pass < kTileInstances / kWarps; ++pass) {
      const int32_t member = pass * kWarps + warp;
      const Crop crop = tile.crops[member];
      bool inside[kThreadSamples];
      bool any = false;
#pragma unroll
      for (int32_t j = 0; j < kThreadSamples; ++j) {
        inside[j] = crop.y.contains(y[j]) && crop.x.contains(x[j]);
        any = any || inside[j];
      }
      float logit[kThreadSamples] = {0.0f, 0.0f, 0.0f, 0.0f};
      // With a single chunk of channels, the usual case, it stays for all passes.
      for (int32_t channel = 0; in_use && channel < channels; channel += kTileChannels) {
        if (staged != channel) {
          __syncthreads();
          stage_samples(job.prototypes, first, channel, &tile);
          stage_coefficients(job, first_instance, channel, &tile);
          __syncthreads();
          staged = channel;
        }
        if (!any) continue;
        const float* samples = tile.samples + lane * kThreadSamples;
        const float* coefficients = tile.coefficients + member * kTileChannels;
        const int32_t end = channels - channel < kTileChannels ? channels - channel : kTileChannels;
#pragma unroll 4
        for (int32_t c = 0; c < end; ++c) {
          const float4 four = *reinterpret_cast<const float4*>(samples + c * kTilePitch);
          const float coefficient = coefficients[c];
          logit[0] += four.x * coefficient;
          logit[1] += four.y * coefficient;
          logit[2] += four.z * coefficient;
          logit[3] += four.w * coefficient;
        }
      }
      if (first_instance + member >= job.capacity) continue;
      Levels<Out> levels;
#pragma unroll
      for (int32_t j = 0; j < kThreadSamples; ++j) {
        store_level(inside[j] ? mask_level(sigmoid(logit[j])) : 0, &levels.values[j]);
      }
      Out* to = masks + (first_instance + member) * plane + sample;
      if (aligned && sample + kThreadSamples <= plane) {
        *reinterpret_cast<Levels<Out>*>(to) = levels;
      } else {
        for (int32_t j = 0; j < kThreadSamples && sample + j < plane; ++j) to[j] = levels.values[j];
      }
    }
  }
}

// --- Bits at frame size. All bits are cleared first; then a block takes a tile of pixels that one
// instance's crop reaches: the probabilities of the samples around it to shared memory, each once,
// then the bits, one pixel per lane, so that a vote of the warp is a word of the mask.

constexpr int32_t kTileWords = kWarps;
constexpr int32_t kTileColumns = kTileWords * 32;
constexpr int32_t kMaxTileRows = 64;
constexpr int32_t kMinTileRows = 4;
constexpr int32_t kMaxTileProbabilities = 4096;
constexpr int32_t kBatch = kThreads;  // instances whose tiles are counted together
static_assert(2 * kTileColumns * 2 * kMinTileRows <= kMaxTileProbabilities,
              "two samples of each axis for every pixel have room in the smallest tile");

// How a tile's pixels find their samples along one axis. Usually all samples between the first and
// the last are taken; where pixels are further apart than samples, two for each pixel.
struct TileAxis {
  FrameAxis axis;
  bool in_pairs;

  TileAxis(const FrameAxis& its_axis, int32_t positions) : axis(its_axis) {
    in_pairs = between(positions) > 2 * positions;
  }

  // Samples that `positions` neighbouring pixels need at most.
  int64_t samples(int32_t positions) const { return in_pairs ? 2 * positions : between(positions); }

 private:
  int64_t between(int32_t positions) const {
    return (positions - 1) * axis.step / axis.denominator + 3;
  }
};

template <class T>
struct BitsJob {
  Job<T> masks;
  TileAxis y_axis, x_axis;
  int32_t tile_rows;
  Limits limits;
  float threshold;
  uint8_t* bits;
  int64_t pitch;  // bytes
  bool aligned;   // rows can be stored in words
};

// The tiles of one instance: in rows of tiles_across, from pixel (row, column) on.
struct InstanceTiles {
  Crop crop;
  int32_t row, row_end;
  int32_t column, column_end;
  int32_t tiles_across;
};

template <int32_t kPositions>
struct TileTable {
  int32_t near[kPositions];  // index of a pixel's first sample; the second follows
  float near_weight[kPositions];
  float far_weight[kPositions];
  int32_t sample[2 * kPositions + 2];
};

struct BitTile {
  float probabilities[kMaxTileProbabilities];
  TileTable<kTileColumns> x;
  TileTable<kMaxTileRows> y;
  uint32_t words[kMaxTileRows * kTileWords];
  InstanceTiles tiles[kBatch];
  int64_t tiles_until[kBatch];  // tiles of the batch up to this instance and with it
};

template <class T>
__device__ __forceinline__ InstanceTiles tiles_of(const BitsJob<T>& job, int32_t instance,
                                                  int32_t* count) {
  InstanceTiles tiles = {};
  *count = 0;
  if (instance >= job.masks.present()) return tiles;
  tiles.crop = job.masks.crop(instance);
  if (tiles.crop.is_empty()) return tiles;
  const Span rows = job.y_axis.axis.positions_of(tiles.crop.y);
  const Span columns = job.x_axis.axis.positions_of(tiles.crop.x);
  if (rows.is_empty() || columns.is_empty()) return tiles;
  tiles.row = rows.begin;
  tiles.row_end = rows.end;
  tiles.column = columns.begin / 32 * 32;
  tiles.column_end = columns.end;
  tiles.tiles_across = (tiles.column_end - tiles.column + kTileColumns - 1) / kTileColumns;
  *count = tiles.tiles_across * ((tiles.row_end - tiles.row + job.tile_rows - 1) / job.tile_rows);
  return tiles;
}

// Fills tile->tiles and tile->tiles_until for the instances from `first` on; returns their tiles.
template <class T>
__device__ __forceinline__ int64_t count_tiles(const BitsJob<T>& job, int32_t first,
                                               BitTile* tile) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  int32_t own = 0;
  tile->tiles[thread] = tiles_of(job, first + thread, &own);
  int64_t until = own;
  tile->tiles_until[thread] = until;
  __syncthreads();
  for (int32_t reach = 1; reach < kBatch; reach *= 2) {
    const int64_t before = thread >= reach ? tile->tiles_until[thread - reach] : 0;
    __syncthreads();
    until += before;
    tile->tiles_until[thread] = until;
    __syncthreads();
  }
  return tile->tiles_until[kBatch - 1];
}

// Tables for the pixels from `first` to `end` - 1 of one axis; returns how many samples they need.
// Threads from `thread` 0 on share the work.
template <int32_t kPositions>
__device__ __forceinline__ int32_t fill_table(const TileAxis& axis, int32_t first, int32_t end,
                                              int32_t thread, TileTable<kPositions>* table) {
  const int32_t first_cell = axis.axis.cell(first);
  for (int32_t i = thread; i < kPositions; i += kThreads) {
    // Beyond the last pixel both weights are 0, and so is the value.
    int32_t near = 0;
    float near_weight = 0.0f;
    float far_weight = 0.0f;
    if (first + i < end) {
      const int32_t cell = axis.axis.cell(first + i);
      near = axis.in_pairs ? 2 * i : cell - first_cell;
      near_weight = axis.axis.near_weight(first + i, cell);
      far_weight = axis.axis.far_weight(first + i, cell);
      if (axis.in_pairs) {
        table->sample[2 * i] = cell;
        table->sample[2 * i + 1] = axis.axis.far(cell);
      }
    }
    table->near[i] = near;
    table->near_weight[i] = near_weight;
    table->far_weight[i] = far_weight;
  }
  if (axis.in_pairs) return 2 * (end - first);
  const int32_t samples = axis.axis.cell(end - 1) - first_cell + 2;
  for (int32_t i = thread; i < samples; i += kThreads) {
    const int32_t sample = first_cell + i;
    table->sample[i] = sample < axis.axis.samples ? sample : axis.axis.samples - 1;
  }
  return samples;
}

template <class T>
__device__ __forceinline__ float logit_at(const Prototypes<T>& prototypes, int64_t sample,
                                          const T* coefficients) {
  const T* from = prototypes.data + sample * prototypes.pixel_stride;
  float logit = 0.0f;
  int32_t c = 0;
  if (prototypes.packs_channels) {
    constexpr int32_t kPack = Pack<T>::kCount;
    for (; c + kPack <= prototypes.channels; c += kPack) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + c);
#pragma unroll
      for (int32_t j = 0; j < kPack; ++j) {
        logit += to_float(pack.values[j]) * to_float(coefficients[c + j]);
      }
    }
  }
#pragma unroll 8
  for (; c < prototypes.channels; ++c) {
    logit += to_float(from[c * prototypes.channel_stride]) * to_float(coefficients[c]);
  }
  return logit;
}

// The words of one column of a tile: the warp's lanes are its 32 pixels, each eight in reverse
// order, because the first pixel of a byte is its highest bit.
template <class T>
__device__ __forceinline__ void draw_words(const BitsJob<T>& job, int32_t word, int32_t rows,
                                           int32_t samples_across, BitTile* tile) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t column = word * 32 + (lane ^ 7);
  const int32_t x = tile->x.near[column];
  const float x_near = tile->x.near_weight[column];
  const float x_far = tile->x.far_weight[column];
  int32_t strip = -1;
  bool all_above = false;
  bool all_below = false;
  float top = 0.0f;
  float bottom = 0.0f;
  for (int32_t row = 0; row < rows; ++row) {
    if (tile->y.near[row] != strip) {
      strip = tile->y.near[row];
      const float* near = tile->probabilities + strip * samples_across + x;
      const float* far = near + samples_across;
      const Limits limits = job.limits;
      const bool above = near[0] > limits.above && near[1] > limits.above &&
                         far[0] > limits.above && far[1] > limits.above;
      const bool below = near[0] < limits.below && near[1] < limits.below &&
                         far[0] < limits.below && far[1] < limits.below;
      // Pixels beyond the frame's last have no weight, and none of their bits may be set.
      all_above = __all_sync(kAllLanes, above && x_near + x_far > 0.0f);
      all_below = __all_sync(kAllLanes, below);
      top = lerp(x_near, near[0], x_far, near[1]);
      bottom = lerp(x_near, far[0], x_far, far[1]);
    }
    uint32_t bits = all_above ? kAllLanes : 0;
    if (!all_above && !all_below) {
      const float value = lerp(tile->y.near_weight[row], top, tile->y.far_weight[row], bottom);
      bits = __ballot_sync(kAllLanes, value > job.threshold);
    }
    if (lane == 0) tile->words[row * kTileWords + word] = bits;
  }
}

template <class T>
__device__ __forceinline__ void draw_tile(const BitsJob<T>& job, int32_t instance,
                                          const InstanceTiles& tiles, int32_t index,
                                          BitTile* tile) {
  const int32_t down = index / tiles.tiles_across;
  const int32_t row = tiles.row + down * job.tile_rows;
  const int32_t column = tiles.column + (index - down * tiles.tiles_across) * kTileColumns;
  const int32_t rows = tiles.row_end - row < job.tile_rows ? tiles.row_end - row : job.tile_rows;
  const int32_t columns =
      tiles.column_end - column < kTileColumns ? tiles.column_end - column : kTileColumns;
  const int32_t words = (columns + 31) / 32;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);

  // The two tables are filled by different threads as far as they last.
  const int32_t across = fill_table(job.x_axis, column, column + columns, thread, &tile->x);
  const int32_t along = fill_table(job.y_axis, row, row + rows, kThreads - 1 - thread, &tile->y);
  __syncthreads();

  const Prototypes<T>& prototypes = job.masks.prototypes;
  const T* coefficients =
      job.masks.coefficients + static_cast<int64_t>(instance) * prototypes.channels;
  for (int32_t i = thread; i < across * along; i += kThreads) {
    const int32_t y = tile->y.sample[i / across];
    const int32_t x = tile->x.sample[i % across];
    float probability = 0.0f;
    if (tiles.crop.y.contains(y) && tiles.crop.x.contains(x)) {
      const int64_t sample = static_cast<int64_t>(y) * prototypes.width + x;
      probability = sigmoid(logit_at(prototypes, sample, coefficients));
    }
    tile->probabilities[i] = probability;
  }
  __syncthreads();

  if (thread / kWarp < words) draw_words(job, thread / kWarp, rows, across, tile);
  __syncthreads();

  const int64_t frame_row = static_cast<int64_t>(instance) * job.y_axis.axis.positions + row;
  for (int32_t i = thread; i < rows * kTileWords; i += kThreads) {
    const int32_t word = i % kTileWords;
    const uint32_t bits = word < words ? tile->words[i] : 0;
    if (bits == 0) continue;
    const int64_t byte = column / 8 + word * 4;
    uint8_t* to = job.bits + (frame_row + i / kTileWords) * job.pitch + byte;
    if (job.aligned) {
      *reinterpret_cast<uint32_t*>(to) = bits;
    } else {
      for (int32_t j = 0; j < 4 && byte + j < job.pitch; ++j) {
        to[j] = static_cast<uint8_t>(bits >> (8 * j));
      }
    }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) mask_bits_kernel(const BitsJob<T> job) {
  __shared__ BitTile tile;
  const int64_t blocks = gridDim.x;
  int64_t next = blockIdx.x;  // of the tiles that are still to come
  for (int32_t first = 0; first < job.masks.capacity; first += kBatch) {
    const int64_t count = count_tiles(job, first, &tile);
    for (; next < count; next += blocks) {
      // The first instance with more tiles up to it than `next`.
      int32_t low = 0;
      int32_t high = kBatch - 1;
      while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (tile.tiles_until[middle] > next) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const int64_t before = low == 0 ? 0 : tile.tiles_until[low - 1];
      draw_tile(job, first + low, tile.tiles[low], static_cast<int32_t>(next - before), &tile);
    }
    next -= count;
    __syncthreads();  // before the next batch's tiles replace these
  }
}

bool is_side(int32_t side) { return side >= 1 && side <= kMaxMaskSide; }

bool is_good(const Features* prototypes, const Instances* instances) {
  return prototypes != nullptr && prototypes->data != nullptr &&
         (prototypes->type == kFloat32 || prototypes->type == kFloat16) &&
         prototypes->channels >= 1 && prototypes->channels <= kMaxPrototypes &&
         is_side(prototypes->height) && is_side(prototypes->width) &&
         prototypes->channel_stride >= 1 && prototypes->pixel_stride >= 1 && instances != nullptr &&
         instances->capacity >= 0 &&
         (instances->capacity == 0 ||
          (instances->coefficients != nullptr && instances->boxes != nullptr)) &&
         is_side(instances->network_height) && is_side(instances->network_width);
}

bool is_good(const FrameFit* fit, const Instances& instances) {
  return fit != nullptr && is_side(fit->frame_height) && is_side(fit->frame_width) &&
         fit->height == instances.network_height && fit->width == instances.network_width &&
         fit->top >= 0 && fit->left >= 0 && fit->inner_height >= 1 && fit->inner_width >= 1 &&
         fit->inner_height <= fit->height - fit->top && fit->inner_width <= fit->width - fit->left;
}

template <class T, class Out>
int32_t queue_levels(const Features& prototypes, const Instances& instances, void* masks,
                     void* stream) {
  const Job<T> job(prototypes, instances);
  Out* to = static_cast<Out*>(masks);
  const int64_t plane = job.prototypes.plane();
  const bool aligned =
      plane % kThreadSamples == 0 && reinterpret_cast<uintptr_t>(masks) % sizeof(Levels<Out>) == 0;
  const int64_t items = ceil_div(plane, kTileSamples) * ceil_div(job.capacity, kTileInstances);
  return launch<mask_levels_kernel<T, Out>>(items, kThreads, stream, job, to, aligned);
}

template <class T>
int32_t queue_bits(const Features& prototypes, const Instances& instances, const FrameFit& fit,
                   float threshold, uint8_t* bits, void* stream) {
  const TileAxis y_axis(
      frame_axis(prototypes.height, fit.height, fit.top, fit.inner_height, fit.frame_height),
      kMaxTileRows);
  const TileAxis x_axis(
      frame_axis(prototypes.width, fit.width, fit.left, fit.inner_width, fit.frame_width),
      kTileColumns);
  int32_t tile_rows = kMaxTileRows;
  while (y_axis.samples(tile_rows) * x_axis.samples(kTileColumns) > kMaxTileProbabilities) {
    tile_rows /= 2;
  }
  const int64_t pitch = ceil_div(fit.frame_width, 8);
  const bool aligned = pitch % 4 == 0 && reinterpret_cast<uintptr_t>(bits) % 4 == 0;
  const BitsJob<T> job = {Job<T>(prototypes, instances),
                          y_axis,
                          x_axis,
                          tile_rows,
                          limits_of(threshold),
                          threshold,
                          bits,
                          pitch,
                          aligned};
  const int64_t size = instances.capacity * fit.frame_height * pitch;
  const cudaError_t error =
      cudaMemsetAsync(bits, 0, static_cast<size_t>(size), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  const int64_t tiles = ceil_div(fit.frame_height, tile_rows) *
                        (ceil_div(fit.frame_width, kTileColumns) + 1) * instances.capacity;
  return launch<mask_bits_kernel<T>>(tiles, kThreads, stream, job);
}

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_mask_assembly(const edgeseg::Features* prototypes,
                                            const edgeseg::Instances* instances, void* masks,
                                            int32_t output_type, void* stream) {
  using namespace edgeseg;
  if (!is_good(prototypes, instances) || masks == nullptr ||
      (output_type != kUint8 && output_type != kFloat16)) {
    return cudaErrorInvalidValue;
  }
  if (instances->capacity == 0) return cudaSuccess;
  const bool to_bytes = output_type == kUint8;
  if (prototypes->type == kFloat32) {
    return to_bytes ? queue_levels<float, uint8_t>(*prototypes, *instances, masks, stream)
                    : queue_levels<float, Half>(*prototypes, *instances, masks, stream);
  }
  return to_bytes ? queue_levels<Half, uint8_t>(*prototypes, *instances, masks, stream)
                  : queue_levels<Half, Half>(*prototypes, *instances, masks, stream);
}

EDGESEG_LAUNCHER edgeseg_cuda_mask_bits(const edgeseg::Features* prototypes,
                                        const edgeseg::Instances* instances,
                                        const edgeseg::FrameFit* fit, float threshold,
                                        uint8_t* bits, void* stream) {
  using namespace edgeseg;
  if (!is_good(prototypes, instances) || !is_good(fit, *instances) || !is_threshold(threshold) ||
      bits == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (instances->capacity == 0) return cudaSuccess;
  return prototypes->type == kFloat32
             ? queue_bits<float>(*prototypes, *instances, *fit, threshold, bits, stream)
             : queue_bits<Half>(*prototypes, *instances, *fit, threshold, bits, stream);
}
