// fit_frame on CUDA: a warp makes 128 pixels of a row at a time and goes down some rows, so that a
// row of the frame is interpolated once for both of the rows that it lies between. Device pointers
// and a stream; allocates nothing, waits for nothing.

#include "edgeseg/fit_frame.h"
#include "launch.h"

namespace edgeseg {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarpsPerBlock = 8;
constexpr int32_t kBlock = kWarp * kWarpsPerBlock;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Blocks that a processor should hold at once: fewer would hide less, more would spill registers.
constexpr int32_t blocks_at_once(int32_t format) { return format == kYuyv ? 2 : 3; }

// Pixels of one lane: 12 bytes, three words.
constexpr int32_t kPixels = 4;
constexpr int32_t kSegment = kWarp * kPixels;
constexpr int32_t kSegmentPacks = 3 * kSegment / 16;

struct FitJob {
  FramePlanes frame;
  FrameFit fit;
  SampleAxis x_axis, y_axis;
  uint8_t* image;
  int32_t store_bytes;   // at a time, as the alignment of every row of the image allows: 16, 4 or 1
  int32_t rows_at_once;  // that a warp goes down, at most kWarp
  int32_t segments;      // in a row
  int64_t items;         // segments times groups of rows
};

// Where the samples of one column lie in a row.
struct Column {
  int32_t near;
  uint32_t weights;  // near weight in the lower half, far weight in the upper one

  __device__ __forceinline__ int32_t far() const { return near + ((weights >> 16) != 0 ? 1 : 0); }
};

// Bytes 0, 3, 1 and 4 of the six in `low` and `high`, and bytes 2 and 5: with channels in the order
// of memory, the near and the far sample of each channel side by side.
__device__ __forceinline__ Bgr across_bytes(uint32_t low, uint32_t high, uint32_t weights) {
  const uint32_t outer = __byte_perm(low, high, 0x4130);
  const uint32_t last = __byte_perm(low, high, 0x0052);
  constexpr uint32_t kHalf = kAcrossHalf;
  return {static_cast<int32_t>(__dp2a_lo(weights, outer, kHalf) >> kAcrossShift),
          static_cast<int32_t>(__dp2a_hi(weights, outer, kHalf) >> kAcrossShift),
          static_cast<int32_t>(__dp2a_lo(weights, last, kHalf) >> kAcrossShift)};
}

__device__ __forceinline__ Bgr across_pixels(const Bgr& near, const Bgr& far, uint32_t weights) {
  const int32_t far_weight = static_cast<int32_t>(weights >> 16);
  return {across(near.blue, far.blue, far_weight), across(near.green, far.green, far_weight),
          across(near.red, far.red, far_weight)};
}

// BGR and RGB. What a lane reads in whole words lies within the row: a frame may end anywhere.
template <bool kSwapped>
__device__ __forceinline__ void fill_packed(const FitJob& job, const Column* columns, int32_t row,
                                            Bgr* levels) {
  const uint8_t* begin = job.frame.planes[0] + row * job.frame.pitches[0];
  // Columns rise, so the first and the last tell for all.
  const bool words = columns[0].near >= 1 && columns[kPixels - 1].near + 4 <= job.fit.frame_width;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const uint8_t* near = begin + 3 * columns[i].near;
    uint32_t low;
    uint32_t high;
    if (words) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(near);
      const uint32_t* from = reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
      const uint32_t shift = 8 * static_cast<uint32_t>(address & 3);
      const uint32_t middle = __ldg(from + 1);
      low = __funnelshift_r(__ldg(from), middle, shift);
      high = __funnelshift_r(middle, __ldg(from + 2), shift);
    } else {
      const uint8_t* far = begin + 3 * columns[i].far();
      low = __ldg(near) | static_cast<uint32_t>(__ldg(near + 1)) << 8 |
            static_cast<uint32_t>(__ldg(near + 2)) << 16 | static_cast<uint32_t>(__ldg(far)) << 24;
      high = __ldg(far + 1) | static_cast<uint32_t>(__ldg(far + 2)) << 8;
    }
    const Bgr result = across_bytes(low, high, columns[i].weights);
    levels[i] = kSwapped ? Bgr{result.red, result.green, result.blue} : result;
  }
}

// U in the lowest byte, then V.
template <bool kAligned>
__device__ __forceinline__ uint32_t load_chroma(const uint8_t* from) {
  if (kAligned) return __ldg(reinterpret_cast<const uint16_t*>(from));
  return __ldg(from) | static_cast<uint32_t>(__ldg(from + 1)) << 8;
}

template <bool kAligned>
__device__ __forceinline__ void fill_nv12(const FitJob& job, const Column* columns, int32_t row,
                                          Bgr* levels) {
  const uint8_t* luma = job.frame.planes[0] + row * job.frame.pitches[0];
  const uint8_t* chroma = job.frame.planes[1] + row / 2 * job.frame.pitches[1];
  const auto pixel = [&](int32_t x) {
    const uint32_t uv = load_chroma<kAligned>(chroma + (x & ~1));
    return bgr_of_yuv(__ldg(luma + x), uv & 255, uv >> 8);
  };
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    levels[i] = across_pixels(pixel(columns[i].near), pixel(columns[i].far()), columns[i].weights);
  }
}

// The four bytes of two columns: luma, U, luma, V.
template <bool kAligned>
__device__ __forceinline__ uint32_t load_group(const uint8_t* from) {
  if (kAligned) return __ldg(reinterpret_cast<const uint32_t*>(from));
  return load_chroma<false>(from) | load_chroma<false>(from + 2) << 16;
}

template <bool kAligned>
__device__ __forceinline__ void fill_yuyv(const FitJob& job, const Column* columns, int32_t row,
                                          Bgr* levels) {
  const uint8_t* begin = job.frame.planes[0] + row * job.frame.pitches[0];
  const auto pixel = [&](int32_t x) {
    const uint32_t group = load_group<kAligned>(begin + 2 * (x & ~1));
    return bgr_of_yuv((group >> (16 * (x & 1))) & 255, (group >> 8) & 255, group >> 24);
  };
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    levels[i] = across_pixels(pixel(columns[i].near), pixel(columns[i].far()), columns[i].weights);
  }
}

template <int32_t kFormat, bool kAligned>
__device__ __forceinline__ void fill_levels(const FitJob& job, const Column* columns, int32_t row,
                                            Bgr* levels) {
  if (kFormat == kBgr8) fill_packed<false>(job, columns, row, levels);
  if (kFormat == kRgb8) fill_packed<true>(job, columns, row, levels);
  if (kFormat == kNv12) fill_nv12<kAligned>(job, columns, row, levels);
  if (kFormat == kYuyv) fill_yuyv<kAligned>(job, columns, row, levels);
}

// A lane's pixels, blue in the lowest byte of each, to the row at columns from `x`. The warp's go
// through `staged` where packs of 16 bytes can be stored: whole sectors of memory, each once.
__device__ __forceinline__ void store_pixels(const FitJob& job, const uint32_t* pixels, int32_t y,
                                             int32_t x, int32_t lane, uint4* staged) {
  const uint32_t words[3] = {pixels[0] | pixels[1] << 24, pixels[1] >> 8 | pixels[2] << 16,
                             pixels[2] >> 16 | pixels[3] << 8};
  const int32_t width = job.fit.width;
  uint8_t* row = job.image + 3 * (static_cast<int64_t>(y) * width);
  if (job.store_bytes == 16) {
    uint32_t* place = reinterpret_cast<uint32_t*>(staged) + 3 * lane;
#pragma unroll
    for (int i = 0; i < 3; ++i) place[i] = words[i];
    __syncwarp();
    const int32_t byte = 3 * (x - lane * kPixels) + 16 * lane;
    if (lane < kSegmentPacks && byte < 3 * width) {
      *reinterpret_cast<uint4*>(row + byte) = staged[lane];
    }
    __syncwarp();
  } else if (job.store_bytes == 4) {
    if (x < width) {
#pragma unroll
      for (int i = 0; i < 3; ++i) reinterpret_cast<uint32_t*>(row + 3 * x)[i] = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (x + i < width) {
        uint8_t* to = row + 3 * (x + i);
        to[0] = static_cast<uint8_t>(pixels[i]);
        to[1] = static_cast<uint8_t>(pixels[i] >> 8);
        to[2] = static_cast<uint8_t>(pixels[i] >> 16);
      }
    }
  }
}

template <int32_t kFormat, bool kAligned>
__global__ void __launch_bounds__(kBlock, blocks_at_once(kFormat))
    fit_frame_kernel(const FitJob job) {
  __shared__ uint4 staged_of[kWarpsPerBlock][kSegmentPacks];
  constexpr uint32_t kPadded = kPadding * 0x010101u;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  uint4* staged = staged_of[threadIdx.x / kWarp];
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  // The bounds of every loop are the same for all lanes of a warp, as the warp-wide calls need.
  for (int64_t item = warp; item < job.items; item += warps) {
    const int64_t group = item / job.segments;
    const int32_t x = static_cast<int32_t>(item - group * job.segments) * kSegment + lane * kPixels;
    const int32_t first = static_cast<int32_t>(group) * job.rows_at_once;
    const int32_t left = job.fit.height - first;
    const int32_t count = left < job.rows_at_once ? left : job.rows_at_once;

    Column columns[kPixels];
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int32_t column = x + i - job.fit.left;
      const bool is_inside = column >= 0 && column < job.fit.inner_width;
      inside |= static_cast<uint32_t>(is_inside) << i;
      // Outside, the nearest column inside: it is read, and not shown.
      const int32_t shown = column < 0 ? 0 : (is_inside ? column : job.fit.inner_width - 1);
      const Sample sample = job.x_axis.at(shown);
      columns[i] = {sample.near, static_cast<uint32_t>(sample.near_weight()) |
                                     static_cast<uint32_t>(sample.far_weight) << 16};
    }
    // Each lane finds the samples of one row, and gives them to the others when it is that row's
    // turn.
    int32_t own_near = -1;
    int32_t own_weight = 0;
    const int32_t own_row = first + lane - job.fit.top;
    if (own_row >= 0 && own_row < job.fit.inner_height) {
      const Sample sample = job.y_axis.at(own_row);
      own_near = sample.near;
      own_weight = sample.far_weight;
    }

    Bgr top[kPixels];
    Bgr bottom[kPixels];
    int32_t top_row = -1;
    int32_t bottom_row = -1;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t near = __shfl_sync(kAllLanes, own_near, i);
      const int32_t far_weight = __shfl_sync(kAllLanes, own_weight, i);
      uint32_t pixels[kPixels] = {kPadded, kPadded, kPadded, kPadded};
      if (near >= 0) {
        const int32_t far = far_weight > 0 ? near + 1 : near;
        if (near != top_row) {
          if (near == bottom_row) {
#pragma unroll
            for (int p = 0; p < kPixels; ++p) top[p] = bottom[p];
          } else {
            fill_levels<kFormat, kAligned>(job, columns, near, top);
          }
          top_row = near;
        }
        if (far != near && far != bottom_row) {
          fill_levels<kFormat, kAligned>(job, columns, far, bottom);
          bottom_row = far;
        }
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          // With no weight the bottom may be of any row: what is read is multiplied by 0.
          const Bgr other = far_weight > 0 ? bottom[p] : top[p];
          const uint32_t blue = down(top[p].blue, other.blue, far_weight);
          const uint32_t green = down(top[p].green, other.green, far_weight);
          const uint32_t red = down(top[p].red, other.red, far_weight);
          if ((inside >> p & 1) != 0) pixels[p] = blue | green << 8 | red << 16;
        }
      }
      store_pixels(job, pixels, first + i, x, lane, staged);
    }
  }
}

// Rows of words, a warp to each; what lies in one piece counts as rows of kPieceWords.
struct CopyJob {
  const uint8_t* from;
  int64_t from_pitch;
  uint8_t* to;
  int64_t to_pitch;
  int64_t row_words;
  int64_t rows;
  int64_t words;  // in all: the last piece may be short
};

constexpr int64_t kPieceWords = 4 * kWarp;

template <class Word>
__global__ void __launch_bounds__(kBlock) copy_rows_kernel(const CopyJob job) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
  for (int64_t row = warp; row < job.rows; row += warps) {
    const int64_t left = job.words - row * job.row_words;
    const int64_t count = left < job.row_words ? left : job.row_words;
    const Word* from = reinterpret_cast<const Word*>(job.from + row * job.from_pitch);
    Word* to = reinterpret_cast<Word*>(job.to + row * job.to_pitch);
#pragma unroll 4
    for (int64_t i = lane; i < count; i += kWarp) to[i] = __ldg(from + i);
  }
}

template <class Word>
int32_t copy_rows(CopyJob job, void* stream) {
  constexpr int64_t kBytes = sizeof(Word);
  job.words /= kBytes;
  if (job.rows == 1) {
    job.rows = ceil_div(job.words, kPieceWords);
    job.row_words = kPieceWords;
    job.from_pitch = job.to_pitch = kPieceWords * kBytes;
  } else {
    job.row_words = job.words / job.rows;
  }
  return launch<copy_rows_kernel<Word>>(ceil_div(job.rows, kWarpsPerBlock), kBlock, stream, job);
}

// A BGR frame of the network's size, byte for byte.
int32_t copy_frame(const FramePlanes& frame, const FrameFit& fit, uint8_t* image, void* stream) {
  const int64_t row_bytes = 3 * static_cast<int64_t>(fit.width);
  const bool one_piece = frame.pitches[0] == row_bytes || fit.height == 1;
  const CopyJob job = {
      frame.planes[0],       frame.pitches[0], image, row_bytes, 0, one_piece ? 1 : fit.height,
      row_bytes * fit.height};
  uint64_t addresses = reinterpret_cast<uintptr_t>(frame.planes[0]) |
                       reinterpret_cast<uintptr_t>(image) | static_cast<uint64_t>(job.words);
  if (!one_piece) addresses |= static_cast<uint64_t>(frame.pitches[0] | row_bytes);
  if (addresses % 16 == 0) return copy_rows<uint4>(job, stream);
  if (addresses % 4 == 0) return copy_rows<uint32_t>(job, stream);
  return copy_rows<uint8_t>(job, stream);
}

bool is_aligned(const uint8_t* pointer, int64_t pitch, uint64_t bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uint64_t>(pitch)) % bytes == 0;
}

template <int32_t kFormat, bool kAligned>
int32_t fit_format(FitJob job, void* stream) {
  // As many rows as give every warp that the device holds something to do.
  unsigned blocks = 0;
  const cudaError_t error =
      blocks_for<fit_frame_kernel<kFormat, kAligned>>(INT64_MAX, kBlock, &blocks);
  if (error != cudaSuccess) return error;
  const int64_t warps = static_cast<int64_t>(blocks) * kWarpsPerBlock;
  const int64_t rows = ceil_div(static_cast<int64_t>(job.segments) * job.fit.height, warps);
  job.rows_at_once = static_cast<int32_t>(std::clamp<int64_t>(rows, 1, kWarp));
  job.items = job.segments * ceil_div(job.fit.height, job.rows_at_once);
  return launch<fit_frame_kernel<kFormat, kAligned>>(ceil_div(job.items, kWarpsPerBlock), kBlock,
                                                     stream, job);
}

}  // namespace
}  // namespace edgeseg

EDGESEG_LAUNCHER edgeseg_cuda_fit_frame(const edgeseg::FramePlanes* frame,
                                        const edgeseg::FrameFit* fit, uint8_t* image,
                                        void* stream) {
  using namespace edgeseg;
  if (frame == nullptr || fit == nullptr || image == nullptr || !is_frame_fit(*fit) ||
      !is_frame_planes(*frame, fit->frame_height, fit->frame_width)) {
    return cudaErrorInvalidValue;
  }
  const bool fills = fit->inner_height == fit->height && fit->inner_width == fit->width;
  if (frame->format == kBgr8 && fills && keeps_size(*fit)) {
    return copy_frame(*frame, *fit, image, stream);
  }
  FitJob job = {*frame,
                *fit,
                SampleAxis::stretching(fit->frame_width, fit->inner_width),
                SampleAxis::stretching(fit->frame_height, fit->inner_height),
                image,
                1,
                1,
                static_cast<int32_t>(ceil_div(fit->width, kSegment)),
                0};
  if (is_aligned(image, fit->width, 4)) job.store_bytes = 4;
  if (is_aligned(image, fit->width, 16)) job.store_bytes = 16;
  switch (frame->format) {
    case kBgr8:
      return fit_format<kBgr8, false>(job, stream);
    case kRgb8:
      return fit_format<kRgb8, false>(job, stream);
    case kNv12:
      return is_aligned(frame->planes[1], frame->pitches[1], 2)
                 ? fit_format<kNv12, true>(job, stream)
                 : fit_format<kNv12, false>(job, stream);
    default:
      return is_aligned(frame->planes[0], frame->pitches[0], 4)
                 ? fit_format<kYuyv, true>(job, stream)
                 : fit_format<kYuyv, false>(job, stream);
  }
}
