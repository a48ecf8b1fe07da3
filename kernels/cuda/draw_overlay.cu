// draw_overlay on CUDA: a thread blends some bytes of a row, at the same place of some rows. Device
// pointers and a stream; allocates nothing, waits for nothing.

#include <string.h>

#include "edgeseg/draw_overlay.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kBlock = 256;
static_assert(kBlock == kColours, "each thread of a block fetches one colour");

// Rows of one thread: columns are looked up once for all of them, and classes once for all that lie
// in the same row of the class map.
constexpr int32_t kMostRows = 8;

struct DrawJob {
  const uint8_t* frame;  // not read through the read-only cache: it may be `drawn`
  int64_t frame_pitch;
  const uint8_t* class_map;
  const uint8_t* colours;
  int32_t classes;
  FrameFit fit;
  int32_t opacity;
  uint8_t* drawn;
  int64_t drawn_pitch;
  RationalLine columns, rows;  // of the inner rectangle, at those of the frame
  int32_t rows_at_once;
  int64_t packs;  // in a row
  int64_t items;  // packs times groups of rows
};

// What is loaded and stored at once.
template <int32_t kWords>
struct Pack;
template <>
struct Pack<4> {
  using Type = uint4;
};
template <>
struct Pack<1> {
  using Type = uint32_t;
};

template <int32_t kWords>
struct Words {
  uint32_t word[kWords];
};

// `count` bytes, fewer than a pack at the end of a row. kWhole: both addresses are multiples of the
// size of a pack.
template <int32_t kWords, bool kWhole>
__device__ __forceinline__ Words<kWords> load_words(const uint8_t* from, int32_t count) {
  using Pack = typename Pack<kWords>::Type;
  Words<kWords> words;
  if (kWhole && count == 4 * kWords) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
    memcpy(&words, &pack, sizeof words);
    return words;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words.word[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * w + i < count) words.word[w] |= static_cast<uint32_t>(from[4 * w + i]) << (8 * i);
    }
  }
  return words;
}

template <int32_t kWords, bool kWhole>
__device__ __forceinline__ void store_words(const Words<kWords>& words, int32_t count,
                                            uint8_t* to) {
  using Pack = typename Pack<kWords>::Type;
  if (kWhole && count == 4 * kWords) {
    Pack pack;
    memcpy(&pack, &words, sizeof words);
    *reinterpret_cast<Pack*>(to) = pack;
    return;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * w + i < count) to[4 * w + i] = static_cast<uint8_t>(words.word[w] >> (8 * i));
    }
  }
}

// Bytes of pixels that follow each other, from byte `phase` of the first, in words.
template <int32_t kWords, int32_t kPixels>
__device__ __forceinline__ Words<kWords> joined(const uint32_t* colours, int32_t phase) {
  // Four pixels are three words; one word more than asked for, to shift from.
  uint32_t stream[kWords + 1];
#pragma unroll
  for (int w = 0; w <= kWords; ++w) {
    const int first = 4 * w / 3;
    const int shift = 8 * (w % 3);
    const uint32_t low = first < kPixels ? colours[first] : 0;
    const uint32_t high = first + 1 < kPixels ? colours[first + 1] : 0;
    stream[w] = low >> shift | high << (24 - shift);
  }
  Words<kWords> words;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words.word[w] = __funnelshift_r(stream[w], stream[w + 1], 8 * static_cast<uint32_t>(phase));
  }
  return words;
}

template <int32_t kWords, bool kWhole>
__global__ void __launch_bounds__(kBlock) draw_overlay_kernel(const DrawJob job) {
  constexpr int32_t kBytes = 4 * kWords;
  // Up to two bytes of the first pixel come before a pack.
  constexpr int32_t kPixels = (kBytes + 2 + 2) / 3;
  __shared__ uint32_t palette[kColours];
  palette[threadIdx.x] = packed_colour(job.colours, job.classes, static_cast<int32_t>(threadIdx.x));
  __syncthreads();
  const int64_t row_bytes = 3 * static_cast<int64_t>(job.fit.frame_width);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; item < job.items;
       item += stride) {
    const int64_t group = item / job.packs;
    const int64_t byte = (item - group * job.packs) * kBytes;
    const int32_t count =
        row_bytes - byte < kBytes ? static_cast<int32_t>(row_bytes - byte) : kBytes;
    const int32_t pixel = static_cast<int32_t>(byte / 3);
    const int32_t phase = static_cast<int32_t>(byte - 3 * static_cast<int64_t>(pixel));
    int32_t columns[kPixels];
    RationalLine::Point point = job.columns.point(pixel);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      columns[i] = static_cast<int32_t>(point.quotient) + job.fit.left;
      // The last column serves for those after it, which are not drawn.
      if (pixel + i + 1 < job.fit.frame_width) point = job.columns.after(point);
    }
    const int32_t first = static_cast<int32_t>(group) * job.rows_at_once;
    const int32_t left = job.fit.frame_height - first;
    const int32_t end = first + (left < job.rows_at_once ? left : job.rows_at_once);
    RationalLine::Point row_point = job.rows.point(first);
    int32_t painted = -1;
    Words<kWords> colours;
    for (int32_t y = first; y < end; ++y) {
      const int32_t row = static_cast<int32_t>(row_point.quotient) + job.fit.top;
      row_point = job.rows.after(row_point);
      const Words<kWords> shown =
          load_words<kWords, kWhole>(job.frame + y * job.frame_pitch + byte, count);
      if (row != painted) {
        const uint8_t* classes = job.class_map + static_cast<int64_t>(row) * job.fit.width;
        uint32_t colour[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) colour[i] = palette[__ldg(classes + columns[i])];
        colours = joined<kWords, kPixels>(colour, phase);
        painted = row;
      }
      Words<kWords> result;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        result.word[w] = blended_bytes(shown.word[w], colours.word[w], job.opacity);
      }
      store_words<kWords, kWhole>(result, count, job.drawn + y * job.drawn_pitch + byte);
    }
  }
}

template <int32_t kWords, bool kWhole>
int32_t draw(DrawJob job, void* stream) {
  // As many rows as give every thread that the device holds something to do.
  unsigned blocks = 0;
  const cudaError_t error =
      blocks_for<draw_overlay_kernel<kWords, kWhole>>(INT64_MAX, kBlock, &blocks);
  if (error != cudaSuccess) return error;
  job.packs = ceil_div(3 * static_cast<int64_t>(job.fit.frame_width), 4 * kWords);
  const int64_t rows =
      ceil_div(job.packs * job.fit.frame_height, static_cast<int64_t>(blocks) * kBlock);
  job.rows_at_once = static_cast<int32_t>(std::clamp<int64_t>(rows, 1, kMostRows));
  job.items = job.packs * ceil_div(job.fit.frame_height, job.rows_at_once);
  return launch<draw_overlay_kernel<kWords, kWhole>>(ceil_div(job.items, kBlock), kBlock, stream,
                                                     job);
}

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_draw_overlay(const uint8_t* frame, int64_t frame_pitch,
                                           const uint8_t* class_map, const uint8_t* colours,
                                           int32_t classes, const edgeseg::FrameFit* fit,
                                           int32_t opacity, uint8_t* drawn, int64_t drawn_pitch,
                                           void* stream) {
  using namespace edgeseg;
  if (frame == nullptr || class_map == nullptr || fit == nullptr || drawn == nullptr ||
      !is_overlay(*fit, frame_pitch, colours, classes, opacity, drawn_pitch)) {
    return cudaErrorInvalidValue;
  }
  const DrawJob job = {frame,
                       frame_pitch,
                       class_map,
                       colours,
                       classes,
                       *fit,
                       opacity,
                       drawn,
                       drawn_pitch,
                       nearest_line(fit->inner_width, fit->frame_width),
                       nearest_line(fit->inner_height, fit->frame_height),
                       1,
                       0,
                       0};
  const uint64_t alignment = reinterpret_cast<uintptr_t>(frame) |
                             reinterpret_cast<uintptr_t>(drawn) |
                             static_cast<uint64_t>(frame_pitch | drawn_pitch);
  if (alignment % 16 == 0) return draw<4, true>(job, stream);
  if (alignment % 4 == 0) return draw<1, true>(job, stream);
  return draw<1, false>(job, stream);
}
