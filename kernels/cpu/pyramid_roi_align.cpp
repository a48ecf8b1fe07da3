// EdgeSegPyramidRoiAlign on the CPU. What depends on the box alone, which pixels a bin reads and
// with what weights, is found once per box; the loops over channels, in pyramid_roi_align_loops.h,
// are compiled once per instruction set.

#include "edgeseg/pyramid_roi_align.h"

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

using edgeseg::kBadArgument;
using edgeseg::kOk;

constexpr int32_t kKnownFlags = edgeseg::kAligned | edgeseg::kPortableCode | edgeseg::kAvx2Code;

// Channels of one box that one thread does at a time; the sums of a row of bins stay in L1.
constexpr int32_t kChannelsAtOnce = 64;

// A pixel, in elements from the first one, and its share of a bin.
struct Tap {
  int32_t offset;
  float weight;
};

// The taps of each bin along one axis.
class AxisTaps {
 public:
  void fit(const edgeseg::RoiAxis& axis, int32_t bins, int32_t size) {
    taps_.clear();
    begin_.assign(1, 0);
    first_ = size;
    last_ = -1;
    for (int32_t bin = 0; bin < bins; ++bin) {
      edgeseg::Taps taps(axis, bin, size);
      for (Tap tap; taps.next(&tap.offset, &tap.weight);) {
        first_ = std::min(first_, tap.offset);
        last_ = std::max(last_, tap.offset);
        taps_.push_back(tap);
      }
      begin_.push_back(static_cast<int32_t>(taps_.size()));
    }
  }

  // Pixel numbers to offsets: (pixel - first) * stride.
  void scale(int32_t first, int64_t stride) {
    for (Tap& tap : taps_) tap.offset = static_cast<int32_t>((tap.offset - first) * stride);
  }

  int32_t bins() const { return static_cast<int32_t>(begin_.size()) - 1; }
  const Tap* taps(int32_t bin) const { return taps_.data() + begin_[bin]; }
  int32_t count(int32_t bin) const { return begin_[bin + 1] - begin_[bin]; }
  bool is_empty() const { return taps_.empty(); }
  int32_t first() const { return first_; }
  int32_t last() const { return last_; }

 private:
  std::vector<Tap> taps_;
  std::vector<int32_t> begin_;
  int32_t first_ = 0, last_ = -1;  // of all pixels read
};

// Tap t of bin b at [t * kPaddedBins + b], for a row of bins in one vector.
constexpr int32_t kPaddedBins = 16;
constexpr int32_t kPaddedColumns = 32;
constexpr int32_t kMostPadded = 16;

struct PaddedTaps {
  int32_t count;                  // of the bin with the most; 0: they do not fit
  uint16_t bins;                  // bit b: there is a bin b
  uint16_t present[kMostPadded];  // bit b: it has this tap
  alignas(64) int32_t column[kMostPadded * kPaddedBins];
  alignas(64) float weight[kMostPadded * kPaddedBins];

  void fit(const AxisTaps& axis, int32_t columns) {
    count = 0;
    if (axis.bins() > kPaddedBins || columns > kPaddedColumns) return;
    int32_t most = 0;
    for (int32_t bin = 0; bin < axis.bins(); ++bin) most = std::max(most, axis.count(bin));
    if (most > kMostPadded) return;
    for (int32_t t = 0; t < most; ++t) {
      uint32_t bits = 0;
      for (int32_t bin = 0; bin < kPaddedBins; ++bin) {
        const bool is_tap = bin < axis.bins() && t < axis.count(bin);
        column[t * kPaddedBins + bin] = is_tap ? axis.taps(bin)[t].offset : 0;
        weight[t * kPaddedBins + bin] = is_tap ? axis.taps(bin)[t].weight : 0.0f;
        bits |= static_cast<uint32_t>(is_tap) << bin;
      }
      present[t] = static_cast<uint16_t>(bits);
    }
    bins = static_cast<uint16_t>((1u << axis.bins()) - 1);
    count = most;
  }
};

// What the loops need to know of a box.
struct Tables {
  AxisTaps x;                     // offsets in the sums of columns
  AxisTaps y;                     // offsets in the features
  int32_t first_column, columns;  // all that any bin reads
  PaddedTaps padded;              // x again, for channels first
};

// What one thread needs; kept between calls, so that a stream of frames allocates once.
struct Workspace {
  Tables tables;
  std::vector<float> columns;
  std::vector<float> tile;
};

struct Job {
  const edgeseg::Pyramid* pyramid;
  const edgeseg::RoiPooling* pooling;
  edgeseg::LevelRule rule;
  const float* boxes;
  const int32_t* image_of;
  int64_t rois;
  float* output;
};

using Pool = void (*)(const Tables&, int32_t, int64_t, const float*, Workspace*, float*);

struct Code {
  Pool planes, pixels;
  int32_t lanes;
};

}  // namespace

#define EDGESEG_LOOPS "pyramid_roi_align_loops.h"
#include "each_isa.h"

namespace {

Code choose_code(int32_t flags) {
#if defined(__x86_64__)
  const edgeseg::Isa isa = edgeseg::chosen_isa(flags);
  if (isa == edgeseg::Isa::kAvx512)
    return {avx512::pool_planes, avx512::pool_pixels, avx512::kLanes};
  if (isa == edgeseg::Isa::kAvx2) return {avx2::pool_planes, avx2::pool_pixels, avx2::kLanes};
#else
  (void)flags;
#endif
  return {portable::pool_planes, portable::pool_pixels, portable::kLanes};
}

bool is_planar(const edgeseg::Features& level) { return level.pixel_stride == 1; }

// The tables of a box, for loops with `lanes` floats a vector; false where its output is all zeros.
bool fit_tables(const Job& job, const edgeseg::Roi& roi, int32_t lanes, Tables* tables) {
  const edgeseg::Features& level = job.pyramid->levels[roi.level];
  if (roi.is_empty) return false;
  tables->x.fit(roi.x, job.pooling->width, level.width);
  tables->y.fit(roi.y, job.pooling->height, level.height);
  if (tables->x.is_empty() || tables->y.is_empty()) return false;
  tables->first_column = tables->x.first();
  tables->columns = tables->x.last() - tables->x.first() + 1;
  if (is_planar(level)) {
    // Whole vectors, where the map has room for them: a few columns more cost less than a rest.
    const int32_t whole = (tables->columns + lanes - 1) / lanes * lanes;
    if (whole <= level.width) {
      tables->columns = whole;
      tables->first_column = std::min(tables->first_column, level.width - whole);
    }
  }
  tables->x.scale(tables->first_column, is_planar(level) ? 1 : kChannelsAtOnce);
  tables->y.scale(0, level.width * level.pixel_stride);
  if (is_planar(level)) tables->padded.fit(tables->x, tables->columns);
  return true;
}

// Units are boxes times blocks of channels, all boxes of one block after the other, so that the
// block's features stay in the cache. Does `begin` to `end` - 1 on the calling thread.
int32_t run_units(const Code& code, const Job& job, int64_t begin, int64_t end) {
  thread_local Workspace workspace;
  Workspace* work = &workspace;
  const Tables& tables = work->tables;
  const edgeseg::Pyramid& pyramid = *job.pyramid;
  const int32_t all_channels = pyramid.levels[0].channels;
  const int64_t bins = static_cast<int64_t>(job.pooling->height) * job.pooling->width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit % job.rois;
    const auto first = static_cast<int32_t>(unit / job.rois * kChannelsAtOnce);
    const int32_t channels = std::min(kChannelsAtOnce, all_channels - first);
    float* to = job.output + (index * all_channels + first) * bins;
    const edgeseg::Roi roi =
        edgeseg::make_roi(pyramid, job.rule, *job.pooling, job.boxes + 4 * index,
                          job.image_of != nullptr ? job.image_of[index] : 0);
    if (!fit_tables(job, roi, code.lanes, &work->tables)) {
      std::fill(to, to + channels * bins, 0.0f);
      continue;
    }
    const edgeseg::Features& level = pyramid.levels[roi.level];
    const float* from = static_cast<const float*>(level.data) +
                        roi.image * pyramid.image_strides[roi.level] + first * level.channel_stride;
    if (is_planar(level)) {
      work->columns.resize(std::max(tables.columns, kPaddedColumns));
      code.planes(tables, channels, level.channel_stride, from, work, to);
    } else {
      work->columns.resize(static_cast<size_t>(tables.columns) * kChannelsAtOnce);
      work->tile.resize(static_cast<size_t>(bins) * kChannelsAtOnce);
      code.pixels(tables, channels, level.pixel_stride, from, work, to);
    }
  }
  return kOk;
}

}  // namespace

// EdgeSegPyramidRoiAlign; the definition is in edgeseg/pyramid_roi_align.h.
//   pyramid   float32 levels in host memory, each channels first (pixel_stride 1) or channels last
//             (channel_stride 1)
//   boxes     (rois, 4) xyxy
//   image_of  (rois), or null for image 0
//   pooling   flags: kAligned | kPortableCode | kAvx2Code
//   output    (rois, channels, height, width) float32, written
//   threads   at least 1
// Returns 0, or 1 for an argument outside these bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_pyramid_roi_align(const edgeseg::Pyramid* pyramid,
                                                 const float* boxes, const int32_t* image_of,
                                                 int32_t rois, const edgeseg::RoiPooling* pooling,
                                                 float* output, int32_t threads) {
  if (pyramid == nullptr || pooling == nullptr || rois < 0 || threads < 1 ||
      !edgeseg::is_valid(*pyramid, *pooling, kKnownFlags) ||
      pyramid->levels[0].type != edgeseg::kFloat32) {
    return kBadArgument;
  }
  for (int32_t i = 0; i < pyramid->level_count; ++i) {
    if (pyramid->levels[i].pixel_stride != 1 && pyramid->levels[i].channel_stride != 1) {
      return kBadArgument;
    }
  }
  if (rois == 0) return kOk;
  if (boxes == nullptr || output == nullptr) return kBadArgument;
  const Code code = choose_code(pooling->flags);
  const Job job = {pyramid, pooling, edgeseg::LevelRule(*pyramid), boxes, image_of, rois, output};
  const int64_t blocks = (pyramid->levels[0].channels + kChannelsAtOnce - 1) / kChannelsAtOnce;
  const int64_t units = rois * blocks;
  // More chunks than threads, because boxes differ in size.
  const auto chunks =
      static_cast<int32_t>(threads == 1 ? 1 : std::min<int64_t>(units, 8L * threads));
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        return run_units(code, job, units * chunk / chunks, units * (chunk + 1) / chunks);
      },
      chunks, threads);
}
