// fit_frame on the CPU: rows of the frame are converted to BGR and interpolated along the row once,
// then two of them make a row of the network's input. Each thread keeps the last two, so that a row
// of the frame is read once.

#include "edgeseg/fit_frame.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "exports.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using edgeseg::FrameFit;
using edgeseg::FramePlanes;
using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kOutOfMemory;
using edgeseg::Sample;
using edgeseg::SampleAxis;

constexpr int32_t kKnownFlags = edgeseg::kPortableCode | edgeseg::kAvx2Code;

// How far a vector may write past the end of a row of a workspace.
constexpr int32_t kOverrun = 32;

// The samples of each column of the inner rectangle as tables, kept between calls.
struct Columns {
  int32_t source = 0, target = 0;
  std::vector<int32_t> offset;   // of the near sample's first byte in a row of BGR
  std::vector<uint32_t> weight;  // near weight in the lower half, far weight in the upper one
  // Columns before this one may read 8 bytes at their offset: the far sample follows the near one.
  int32_t wide = 0;

  void fit(int32_t wanted_source, int32_t wanted_target) {
    if (source == wanted_source && target == wanted_target) return;
    source = 0;  // a failed allocation below must not leave tables that look right
    offset.resize(wanted_target);
    weight.resize(wanted_target);
    wide = 0;
    const SampleAxis axis = SampleAxis::stretching(wanted_source, wanted_target);
    for (int32_t x = 0; x < wanted_target; ++x) {
      const Sample sample = axis.at(x);
      offset[x] = 3 * sample.near;
      weight[x] = static_cast<uint32_t>(sample.near_weight()) |
                  static_cast<uint32_t>(sample.far_weight) << 16;
      if (offset[x] + 8 <= 3 * wanted_source) wide = x + 1;
    }
    source = wanted_source;
    target = wanted_target;
  }
};

// One row of the frame, in its own format.
struct SourceRow {
  const uint8_t* first;   // pixels, luma, or YUYV
  const uint8_t* chroma;  // of NV12
};

// The three steps of a row, compiled for more than one instruction set.
struct Steps {
  // A row of any format -> width pixels of BGR.
  void (*convert)(int32_t format, SourceRow row, int32_t width, uint8_t* bgr);
  // Columns of a row of BGR, or of RGB (`swapped`) -> edgeseg::across() of each channel.
  void (*across)(const uint8_t* row, bool swapped, const Columns& columns, int16_t* levels);
  // Two rows of those -> edgeseg::down() of each value.
  void (*down)(const int16_t* top, const int16_t* bottom, int32_t far_weight, int32_t count,
               uint8_t* levels);
};

void convert_from(int32_t x, int32_t format, SourceRow row, int32_t width, uint8_t* bgr) {
  if (format == edgeseg::kRgb8) {
    for (; x < width; ++x) {
      bgr[3 * x] = row.first[3 * x + 2];
      bgr[3 * x + 1] = row.first[3 * x + 1];
      bgr[3 * x + 2] = row.first[3 * x];
    }
    return;
  }
  for (; x < width; ++x) {
    const int32_t pair = x / 2;
    const bool planar = format == edgeseg::kNv12;
    const int32_t y = planar ? row.first[x] : row.first[2 * x];
    const int32_t u = planar ? row.chroma[2 * pair] : row.first[4 * pair + 1];
    const int32_t v = planar ? row.chroma[2 * pair + 1] : row.first[4 * pair + 3];
    const edgeseg::Bgr pixel = edgeseg::bgr_of_yuv(y, u, v);
    bgr[3 * x] = static_cast<uint8_t>(pixel.blue);
    bgr[3 * x + 1] = static_cast<uint8_t>(pixel.green);
    bgr[3 * x + 2] = static_cast<uint8_t>(pixel.red);
  }
}

void across_from(int32_t x, const uint8_t* row, bool swapped, const Columns& columns,
                 int16_t* levels) {
  const int32_t blue = swapped ? 2 : 0;
  for (; x < columns.target; ++x) {
    const uint8_t* near = row + columns.offset[x];
    const int32_t far_weight = static_cast<int32_t>(columns.weight[x] >> 16);
    const uint8_t* far = far_weight > 0 ? near + 3 : near;
    levels[3 * x] = static_cast<int16_t>(edgeseg::across(near[blue], far[blue], far_weight));
    levels[3 * x + 1] = static_cast<int16_t>(edgeseg::across(near[1], far[1], far_weight));
    levels[3 * x + 2] =
        static_cast<int16_t>(edgeseg::across(near[2 - blue], far[2 - blue], far_weight));
  }
}

EDGESEG_INLINE void down_from(int32_t i, const int16_t* top, const int16_t* bottom,
                              int32_t far_weight, int32_t count, uint8_t* levels) {
  for (; i < count; ++i) {
    levels[i] = static_cast<uint8_t>(edgeseg::down(top[i], bottom[i], far_weight));
  }
}

void convert_portable(int32_t format, SourceRow row, int32_t width, uint8_t* bgr) {
  convert_from(0, format, row, width, bgr);
}

void across_portable(const uint8_t* row, bool swapped, const Columns& columns, int16_t* levels) {
  across_from(0, row, swapped, columns, levels);
}

void down_portable(const int16_t* top, const int16_t* bottom, int32_t far_weight, int32_t count,
                   uint8_t* levels) {
  down_from(0, top, bottom, far_weight, count, levels);
}

#if defined(__x86_64__)
// The same integers as in the header, in the instructions made for them: a compiler finds neither
// the multiply-add of pairs nor the rounding product of 16 bits in plain loops.
EDGESEG_TARGET("avx2")

// 16 pixels of which lane i of `y` has the lumas of pixels 2i and 2i + 1 in its two lowest bytes,
// `u` and `v` their chroma, to 48 bytes.
EDGESEG_INLINE void store_pixels(__m256i y, __m256i u, __m256i v, uint8_t* bgr) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i centre = _mm256_set1_epi32(128);
  const __m256i gain = _mm256_set1_epi32(edgeseg::kLumaGain);
  const __m256i half = _mm256_set1_epi32(edgeseg::kYuvHalf);
  // Saturating: black is 16, and what is below is no darker.
  const __m256i above = _mm256_subs_epu8(y, _mm256_set1_epi8(16));
  const __m256i even = _mm256_mullo_epi32(_mm256_and_si256(above, byte), gain);
  const __m256i odd = _mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(above, 8), byte), gain);
  u = _mm256_sub_epi32(u, centre);
  v = _mm256_sub_epi32(v, centre);
  const __m256i blue =
      _mm256_add_epi32(half, _mm256_mullo_epi32(u, _mm256_set1_epi32(edgeseg::kBlueOfU)));
  const __m256i green = _mm256_add_epi32(
      _mm256_add_epi32(half, _mm256_mullo_epi32(u, _mm256_set1_epi32(edgeseg::kGreenOfU))),
      _mm256_mullo_epi32(v, _mm256_set1_epi32(edgeseg::kGreenOfV)));
  const __m256i red =
      _mm256_add_epi32(half, _mm256_mullo_epi32(v, _mm256_set1_epi32(edgeseg::kRedOfV)));
  // 16 bits each: four even pixels, then the four odd ones between them, in each half.
  const auto channel = [&](__m256i chroma) {
    return _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(even, chroma), edgeseg::kYuvShift),
                              _mm256_srai_epi32(_mm256_add_epi32(odd, chroma), edgeseg::kYuvShift));
  };
  // Each half: 8 bytes of blue (even, then odd pixels), 8 of green; and 8 of red, twice.
  const __m256i blue_green = _mm256_packus_epi16(channel(blue), channel(green));
  const __m256i red_level = channel(red);
  const __m256i reds = _mm256_packus_epi16(red_level, red_level);
  constexpr char kNone = -1;
  const __m256i head = _mm256_or_si256(
      _mm256_shuffle_epi8(
          blue_green, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                          0, 8, kNone, 4, 12, kNone, 1, 9, kNone, 5, 13, kNone, 2, 10, kNone, 6))),
      _mm256_shuffle_epi8(reds, _mm256_broadcastsi128_si256(
                                    _mm_setr_epi8(kNone, kNone, 0, kNone, kNone, 4, kNone, kNone, 1,
                                                  kNone, kNone, 5, kNone, kNone, 2, kNone))));
  const __m256i tail = _mm256_or_si256(
      _mm256_shuffle_epi8(blue_green, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                          14, kNone, 3, 11, kNone, 7, 15, kNone, kNone, kNone,
                                          kNone, kNone, kNone, kNone, kNone, kNone))),
      _mm256_shuffle_epi8(reds, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                    kNone, 6, kNone, kNone, 3, kNone, kNone, 7, kNone, kNone, kNone,
                                    kNone, kNone, kNone, kNone, kNone))));
  const auto at = [&](int32_t i) { return reinterpret_cast<__m128i*>(bgr + i); };
  _mm_storeu_si128(at(0), _mm256_castsi256_si128(head));
  _mm_storel_epi64(at(16), _mm256_castsi256_si128(tail));
  _mm_storeu_si128(at(24), _mm256_extracti128_si256(head, 1));
  _mm_storel_epi64(at(40), _mm256_extracti128_si256(tail, 1));
}

void convert_avx2(int32_t format, SourceRow row, int32_t width, uint8_t* bgr) {
  const __m256i byte = _mm256_set1_epi32(255);
  const auto load = [](const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  int32_t x = 0;
  if (format == edgeseg::kNv12) {
    for (; x + 16 <= width; x += 16) {
      const __m256i chroma = _mm256_cvtepu16_epi32(load(row.chroma + x));
      store_pixels(_mm256_cvtepu16_epi32(load(row.first + x)), _mm256_and_si256(chroma, byte),
                   _mm256_srli_epi32(chroma, 8), bgr + 3 * x);
    }
  } else if (format == edgeseg::kYuyv) {
    const __m256i lumas = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, -1, -1, 4, 6, -1, -1, 8, 10, -1, -1, 12, 14, -1, -1));
    for (; x + 16 <= width; x += 16) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.first + 2 * x));
      store_pixels(_mm256_shuffle_epi8(pairs, lumas),
                   _mm256_and_si256(_mm256_srli_epi32(pairs, 8), byte),
                   _mm256_srli_epi32(pairs, 24), bgr + 3 * x);
    }
  } else {
    const __m128i swap = _mm_setr_epi8(2, 1, 0, 5, 4, 3, 8, 7, 6, 11, 10, 9, 14, 13, 12, 15);
    // The 16th byte is written wrong, and then right by the next step.
    for (; x + 6 <= width; x += 5) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bgr + 3 * x),
                       _mm_shuffle_epi8(load(row.first + 3 * x), swap));
    }
  }
  convert_from(x, format, row, width, bgr);
}

void across_avx2(const uint8_t* row, bool swapped, const Columns& columns, int16_t* levels) {
  // Near and far sample of each channel side by side, as 16 bits.
  const __m128i pairs =
      swapped ? _mm_setr_epi8(2, -1, 5, -1, 1, -1, 4, -1, 0, -1, 3, -1, -1, -1, -1, -1)
              : _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m128i half = _mm_set1_epi32(edgeseg::kAcrossHalf);
  const int32_t* offset = columns.offset.data();
  const uint32_t* weight = columns.weight.data();
  const auto weighted = [&](int32_t x) {
    const __m128i samples = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + offset[x]));
    const __m128i sum = _mm_madd_epi16(_mm_shuffle_epi8(samples, pairs),
                                       _mm_set1_epi32(static_cast<int32_t>(weight[x])));
    return _mm_srai_epi32(_mm_add_epi32(sum, half), edgeseg::kAcrossShift);
  };
  int32_t x = 0;
  // Each store writes one value more than the column has, and the next column mends that.
  for (; x + 2 <= columns.wide; x += 2) {
    const __m128i two = _mm_packs_epi32(weighted(x), weighted(x + 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(levels + 3 * x), two);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(levels + 3 * x + 3), _mm_unpackhi_epi64(two, two));
  }
  across_from(x, row, swapped, columns, levels);
}

void down_avx2(const int16_t* top, const int16_t* bottom, int32_t far_weight, int32_t count,
               uint8_t* levels) {
  // The product of 16 bits shifts by 15.
  const __m256i weight = _mm256_set1_epi16(static_cast<int16_t>(2 * far_weight));
  static_assert(edgeseg::kWeightBits == 14, "twice the weight is a fraction of 15 bits");
  const __m256i half = _mm256_set1_epi16(1 << (edgeseg::kFractionBits - 1));
  const auto blended = [&](int32_t i) {
    const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(top + i));
    const __m256i to = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bottom + i));
    const __m256i step = _mm256_mulhrs_epi16(_mm256_sub_epi16(to, from), weight);
    return _mm256_srai_epi16(_mm256_add_epi16(_mm256_add_epi16(from, step), half),
                             edgeseg::kFractionBits);
  };
  int32_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i both = _mm256_packus_epi16(blended(i), blended(i + 16));
    // Packing goes half by half; this puts the quarters in order.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(levels + i),
                        _mm256_permute4x64_epi64(both, 0xd8));
  }
  down_from(i, top, bottom, far_weight, count, levels);
}

EDGESEG_TARGET_END
#endif

Steps choose_steps(int32_t flags) {
#if defined(__x86_64__)
  if (edgeseg::chosen_isa(flags) != edgeseg::Isa::kPortable) {
    return {convert_avx2, across_avx2, down_avx2};
  }
#else
  (void)flags;
#endif
  return {convert_portable, across_portable, down_portable};
}

struct Job {
  FramePlanes frame;
  FrameFit fit;
  const Columns* columns;
  SampleAxis rows;
  uint8_t* image;
  Steps steps;

  SourceRow source_row(int32_t row) const {
    const uint8_t* first = frame.planes[0] + row * frame.pitches[0];
    if (frame.format != edgeseg::kNv12) return {first, nullptr};
    return {first, frame.planes[1] + row / 2 * frame.pitches[1]};
  }
};

// What one thread needs; kept between calls, so that a stream of frames allocates once.
struct Workspace {
  std::vector<uint8_t> bgr;        // a converted row
  std::vector<int16_t> levels[2];  // two rows after across()
  int32_t row_of[2] = {-1, -1};    // which rows of the frame those are

  void fit(const Job& job) {
    const bool converts = job.frame.format == edgeseg::kNv12 || job.frame.format == edgeseg::kYuyv;
    if (converts) bgr.resize(3 * static_cast<size_t>(job.fit.frame_width) + kOverrun);
    for (int32_t i = 0; i < 2; ++i) {
      levels[i].resize(3 * static_cast<size_t>(job.fit.inner_width) + kOverrun);
      row_of[i] = -1;
    }
  }
};

void fill_levels(const Job& job, int32_t row, int32_t place, Workspace* work) {
  const SourceRow source = job.source_row(row);
  const bool swapped = job.frame.format == edgeseg::kRgb8;
  const uint8_t* pixels = source.first;
  if (!swapped && job.frame.format != edgeseg::kBgr8) {
    job.steps.convert(job.frame.format, source, job.fit.frame_width, work->bgr.data());
    pixels = work->bgr.data();
  }
  job.steps.across(pixels, swapped, *job.columns, work->levels[place].data());
  work->row_of[place] = row;
}

// One row of the inner rectangle to `levels`, (inner_width, 3).
void resize_row(const Job& job, int32_t row, Workspace* work, uint8_t* levels) {
  const Sample sample = job.rows.at(row);
  int32_t near = 0;
  if (work->row_of[1] == sample.near) {
    near = 1;
  } else if (work->row_of[0] != sample.near) {
    near = work->row_of[0] == sample.far ? 1 : 0;
    fill_levels(job, sample.near, near, work);
  }
  int32_t far = near;
  if (sample.far != sample.near) {
    far = 1 - near;
    if (work->row_of[far] != sample.far) fill_levels(job, sample.far, far, work);
  }
  job.steps.down(work->levels[near].data(), work->levels[far].data(), sample.far_weight,
                 3 * job.fit.inner_width, levels);
}

// Rows begin to end - 1 of the image, on the calling thread, with that thread's workspace.
int32_t fill_rows(const Job& job, int32_t begin, int32_t end) {
  thread_local std::vector<Workspace> workspace;
  if (workspace.empty()) workspace.resize(1);
  Workspace* work = &workspace[0];
  const bool same_size = edgeseg::keeps_size(job.fit);
  if (!same_size) work->fit(job);
  const size_t row_bytes = 3 * static_cast<size_t>(job.fit.width);
  const size_t inner_bytes = 3 * static_cast<size_t>(job.fit.inner_width);
  const size_t left_bytes = 3 * static_cast<size_t>(job.fit.left);
  for (int32_t y = begin; y < end; ++y) {
    uint8_t* image = job.image + y * row_bytes;
    const int32_t row = y - job.fit.top;
    if (row < 0 || row >= job.fit.inner_height) {
      memset(image, edgeseg::kPadding, row_bytes);
      continue;
    }
    uint8_t* inner = image + left_bytes;
    memset(image, edgeseg::kPadding, left_bytes);
    memset(inner + inner_bytes, edgeseg::kPadding, row_bytes - left_bytes - inner_bytes);
    if (!same_size) {
      resize_row(job, row, work, inner);
    } else if (job.frame.format == edgeseg::kBgr8) {
      memcpy(inner, job.source_row(row).first, inner_bytes);
    } else {
      job.steps.convert(job.frame.format, job.source_row(row), job.fit.inner_width, inner);
    }
  }
  return kOk;
}

}  // namespace

// fit_frame; the definition is in edgeseg/fit_frame.h.
//   frame    planes of a frame of fit->frame_height x fit->frame_width pixels
//   image    (height, width, 3) uint8 BGR, contiguous, written; not the frame's memory
//   flags    kPortableCode | kAvx2Code
//   threads  at least 1
// Returns 0, or 1 for an argument outside its bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_fit_frame(const edgeseg::FramePlanes* frame,
                                         const edgeseg::FrameFit* fit, uint8_t* image,
                                         int32_t flags, int32_t threads) {
  if (frame == nullptr || fit == nullptr || image == nullptr || !edgeseg::is_frame_fit(*fit) ||
      !edgeseg::is_frame_planes(*frame, fit->frame_height, fit->frame_width) || threads < 1 ||
      (flags & ~kKnownFlags) != 0) {
    return kBadArgument;
  }
  thread_local Columns columns;
  try {
    columns.fit(fit->frame_width, fit->inner_width);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  const Job job = {*frame,   *fit,
                   &columns, SampleAxis::stretching(fit->frame_height, fit->inner_height),
                   image,    choose_steps(flags)};
  // More chunks than threads, because a core may be busy elsewhere; few, because neighbours both
  // read the rows at their border.
  const int32_t chunks =
      threads == 1 ? 1 : static_cast<int32_t>(std::min<int64_t>(fit->height, 4LL * threads));
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        const int64_t rows = fit->height;
        return fill_rows(job, static_cast<int32_t>(rows * chunk / chunks),
                         static_cast<int32_t>(rows * (chunk + 1) / chunks));
      },
      chunks, threads);
}
