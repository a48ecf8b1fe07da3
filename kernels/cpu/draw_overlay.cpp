// draw_overlay on the CPU: the colours of a row of the class map, blended over the rows of the
// frame that lie in it. The class map is never made at the size of the frame.

#include "edgeseg/draw_overlay.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "exports.h"
#include "threads.h"

namespace {

using edgeseg::FrameFit;
using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kOutOfMemory;
using edgeseg::RationalLine;

constexpr int32_t kKnownFlags = edgeseg::kPortableCode | edgeseg::kAvx2Code;

// Columns of the class map that are compared, and painted, together.
constexpr int32_t kBlock = 32;

// The column of the class map for each column of the frame, kept between calls.
struct Columns {
  int32_t source = 0, target = 0, left = 0;
  std::vector<int32_t> at;
  std::vector<int32_t> block_begin;  // the frame's first column in each block, and the end

  void fit(const FrameFit& fit) {
    if (source == fit.inner_width && target == fit.frame_width && left == fit.left) return;
    source = 0;  // a failed allocation below must not leave tables that look right
    at.resize(fit.frame_width);
    block_begin.assign(static_cast<size_t>((fit.inner_width - 1) / kBlock) + 2, fit.frame_width);
    const RationalLine line = edgeseg::nearest_line(fit.inner_width, fit.frame_width);
    RationalLine::Point point = line.point(0);
    size_t block = 0;
    for (int32_t x = 0; x < fit.frame_width; ++x) {
      const int32_t column = static_cast<int32_t>(point.quotient);
      at[x] = column + fit.left;
      for (; block <= static_cast<size_t>(column / kBlock); ++block) block_begin[block] = x;
      point = line.after(point);
    }
    source = fit.inner_width;
    target = fit.frame_width;
    left = fit.left;
  }
};

using BlendRow = void (*)(const uint8_t* frame, const uint8_t* colours, int32_t opacity,
                          int64_t count, uint8_t* drawn);

// `drawn` may be `frame`: each value is read before it is written, in vectors too.
EDGESEG_INLINE void blend_values(const uint8_t* frame, const uint8_t* colours, int32_t opacity,
                                 int64_t count, uint8_t* drawn) {
#if !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    drawn[i] = edgeseg::blended(frame[i], colours[i], opacity);
  }
}

void blend_portable(const uint8_t* frame, const uint8_t* colours, int32_t opacity, int64_t count,
                    uint8_t* drawn) {
  blend_values(frame, colours, opacity, count, drawn);
}

#if defined(__x86_64__)
EDGESEG_TARGET("avx2")
void blend_avx2(const uint8_t* frame, const uint8_t* colours, int32_t opacity, int64_t count,
                uint8_t* drawn) {
  blend_values(frame, colours, opacity, count, drawn);
}
EDGESEG_TARGET_END
#endif

BlendRow choose_blend(int32_t flags) {
#if defined(__x86_64__)
  if (edgeseg::chosen_isa(flags) != edgeseg::Isa::kPortable) return blend_avx2;
#else
  (void)flags;
#endif
  return blend_portable;
}

struct Job {
  const uint8_t* frame;
  int64_t frame_pitch;
  const uint8_t* class_map;  // (height, width)
  FrameFit fit;
  int32_t opacity;
  uint8_t* drawn;
  int64_t drawn_pitch;
  const Columns* columns;
  RationalLine rows;
  BlendRow blend;
  uint32_t palette[edgeseg::kColours];
};

// The colours of row `row` of the class map at the frame's columns, to (frame_width, 3). Where they
// hold those of row `painted` already (-1: of none), only blocks that differ from it are painted:
// in most pictures that is few.
void paint_row(const Job& job, int32_t row, int32_t painted, uint8_t* colours) {
  const int32_t* at = job.columns->at.data();
  const std::vector<int32_t>& begin = job.columns->block_begin;
  const uint8_t* classes = job.class_map + static_cast<int64_t>(row) * job.fit.width;
  const uint8_t* before = job.class_map + static_cast<int64_t>(painted) * job.fit.width;
  for (int32_t block = 0; block + 1 < static_cast<int32_t>(begin.size()); ++block) {
    const int32_t last = begin[block + 1] - 1;
    if (begin[block] > last) continue;
    const int32_t column = job.fit.left + block * kBlock;
    const int32_t count = std::min(kBlock, job.fit.inner_width - block * kBlock);
    if (painted >= 0 && memcmp(classes + column, before + column, count) == 0) continue;
    uint8_t* to = colours + 3 * static_cast<int64_t>(begin[block]);
    // Each store writes one byte more than the pixel has, and the next pixel mends that.
    for (int32_t x = begin[block]; x < last; ++x, to += 3) {
      memcpy(to, &job.palette[classes[at[x]]], 4);
    }
    memcpy(to, &job.palette[classes[at[last]]], 3);
  }
}

// Rows begin to end - 1 of the frame, on the calling thread, with that thread's row of colours.
int32_t draw_rows(const Job& job, int32_t begin, int32_t end) {
  thread_local std::vector<uint8_t> colours;
  const int64_t row_bytes = 3 * static_cast<int64_t>(job.fit.frame_width);
  colours.resize(static_cast<size_t>(row_bytes));
  int32_t painted = -1;
  for (int32_t y = begin; y < end; ++y) {
    const int32_t row = static_cast<int32_t>(job.rows.at(y)) + job.fit.top;
    if (row != painted) {
      paint_row(job, row, painted, colours.data());
      painted = row;
    }
    job.blend(job.frame + y * job.frame_pitch, colours.data(), job.opacity, row_bytes,
              job.drawn + y * job.drawn_pitch);
  }
  return kOk;
}

}  // namespace

// draw_overlay; the definition is in edgeseg/draw_overlay.h.
//   frame      (frame_height, frame_width, 3) uint8 BGR, rows frame_pitch bytes apart
//   class_map  (height, width) uint8, contiguous
//   colours    (classes, 3) uint8 BGR, contiguous, 0 <= classes <= 256
//   opacity    0 to 256
//   drawn      as frame, written; the same memory and pitch, or none of the frame's
//   flags      kPortableCode | kAvx2Code
//   threads    at least 1
// Returns 0, or 1 for an argument outside its bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_draw_overlay(const uint8_t* frame, int64_t frame_pitch,
                                            const uint8_t* class_map, const uint8_t* colours,
                                            int32_t classes, const edgeseg::FrameFit* fit,
                                            int32_t opacity, uint8_t* drawn, int64_t drawn_pitch,
                                            int32_t flags, int32_t threads) {
  if (frame == nullptr || class_map == nullptr || fit == nullptr || drawn == nullptr ||
      !edgeseg::is_overlay(*fit, frame_pitch, colours, classes, opacity, drawn_pitch) ||
      threads < 1 || (flags & ~kKnownFlags) != 0) {
    return kBadArgument;
  }
  thread_local Columns columns;
  try {
    columns.fit(*fit);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  Job job = {frame,
             frame_pitch,
             class_map,
             *fit,
             opacity,
             drawn,
             drawn_pitch,
             &columns,
             edgeseg::nearest_line(fit->inner_height, fit->frame_height),
             choose_blend(flags),
             {}};
  for (int32_t i = 0; i < edgeseg::kColours; ++i) {
    job.palette[i] = edgeseg::packed_colour(colours, classes, i);
  }
  const int32_t chunks =
      threads == 1 ? 1 : static_cast<int32_t>(std::min<int64_t>(fit->frame_height, 4LL * threads));
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        const int64_t rows = fit->frame_height;
        return draw_rows(job, static_cast<int32_t>(rows * chunk / chunks),
                         static_cast<int32_t>(rows * (chunk + 1) / chunks));
      },
      chunks, threads);
}
