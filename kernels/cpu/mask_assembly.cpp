// EdgeSegMaskAssembly on the CPU: masks at the size of the prototypes, packed bits at frame size,
// or COCO's run lengths; and the way of finished masks (levels 0 to 255) to frame size. The loops,
// in mask_assembly_loops.h, are compiled once per instruction set, so one portable binary uses AVX2
// or AVX-512 where they are.

#include "edgeseg/mask_assembly.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "edgeseg/launchers.h"
#include "exports.h"
#include "threads.h"

namespace {

using edgeseg::Crop;
using edgeseg::FrameAxis;
using edgeseg::Instances;
using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kOutOfMemory;
using edgeseg::Span;

// The widest vector in floats: tables and rows are padded to a multiple of this.
constexpr int32_t kMaxLanes = 16;

// Rows of a strip that are drawn together for run lengths, so that they stay in L1.
constexpr int32_t kStripRows = 32;

constexpr int32_t kKnownFlags = edgeseg::kNoShortCut | edgeseg::kPortableCode | edgeseg::kAvx2Code;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The prototypes with the samples of a row side by side: sample (y, x) of channel c is at
// data[c * channel_stride + (y - top) * row_stride + x - left]. A vector may be read from any
// offset within a channel up to `last_vector`.
struct Planes {
  const float* data;
  int32_t channels;
  int64_t channel_stride, row_stride;
  int32_t top, left;
  int64_t last_vector;
};

// One axis as tables, kept between calls. In tables by position, each eight are in reverse order:
// the first pixel of a byte of packed bits is its highest bit, but the first lane of a vector is
// the lowest bit of its mask.
struct Axis {
  FrameAxis axis = {};
  int32_t first = 0;           // positions before it are in no cell
  std::vector<int32_t> begin;  // FrameAxis::begin of each cell, and the end
  std::vector<int32_t> cell;
  std::vector<float> near_weight;
  std::vector<float> far_weight;

  void fit(const FrameAxis& wanted, int32_t wanted_first, bool reversed) {
    if (axis.samples == wanted.samples && axis.positions == wanted.positions &&
        axis.step == wanted.step && axis.offset == wanted.offset &&
        axis.denominator == wanted.denominator && first == wanted_first) {
      return;
    }
    axis.samples = 0;  // a failed allocation below must not leave tables that look right
    first = wanted_first;
    const int64_t padded = round_up(wanted.positions, kMaxLanes);
    begin.resize(static_cast<size_t>(wanted.samples) + 1);
    // Beyond the last pixel both weights are 0, and so is the value.
    cell.assign(padded, 0);
    near_weight.assign(padded, 0.0f);
    far_weight.assign(padded, 0.0f);
    begin[0] = first;
    for (int32_t c = 0; c < wanted.samples; ++c) {
      begin[c + 1] = std::max(first, wanted.begin(c + 1));
      for (int32_t position = begin[c]; position < begin[c + 1]; ++position) {
        const int32_t at = reversed ? position ^ 7 : position;
        cell[at] = c;
        near_weight[at] = wanted.near_weight(position, c);
        far_weight[at] = wanted.far_weight(position, c);
      }
    }
    axis = wanted;
  }

  // The positions whose interpolation sees a sample of `span`, which is not empty.
  Span positions_of(Span span) const {
    return {begin[std::max(span.begin - 1, 0)], begin[span.end]};
  }
};

// Where a mask goes from one row of bits to the next: pixel (y, x) begins or ends a run in x.
struct Turn {
  int32_t y, x;
};

// What one thread needs; kept between calls, so that a stream of frames allocates once.
struct Workspace {
  std::vector<float> probability;  // of one crop, with a border: see Patch
  std::vector<uint64_t> above, below;
  std::vector<uint64_t> set, mixed;  // cells of one strip
  std::vector<int32_t> groups;       // pixel groups of one strip that hold a mixed cell
  std::vector<uint8_t> base;         // a row of bits of one strip, without mixed cells
  std::vector<uint8_t> rows;         // bits of a strip, for run lengths
  std::vector<Turn> turns;
  std::vector<int64_t> column_begin;  // of `sorted`
  std::vector<int32_t> sorted;        // rows of turns, column by column
  std::vector<int64_t> borders;       // where runs begin, in pixels counted down the columns
  std::vector<uint8_t> text;
};

Workspace* workspace() {
  thread_local std::vector<Workspace> own;
  if (own.empty()) own.resize(1);
  return &own[0];
}

// The probabilities of one crop with a border around it: (row, i) is sample (top + row, left + i).
// There is one row of border above and below and two columns at either side, so that cells outside
// of the crop can be read too. The border is 0, or repeats the last sample at the map's own end,
// where the last cell has it at both sides.
struct Patch {
  Crop crop;
  int32_t top, left;
  int32_t rows, columns;  // of the crop
  int64_t pitch;          // floats
  int64_t words;          // of 64 cells, per row
  float* probability;
  uint64_t* above;  // bit i of a row: the sample's probability is beyond the limit
  uint64_t* below;

  float* row(int32_t r) const { return probability + r * pitch; }

  void place(const Crop& its_crop, Workspace* work) {
    crop = its_crop;
    top = crop.y.begin - 1;
    left = crop.x.begin - 2;
    rows = crop.y.end - crop.y.begin;
    columns = crop.x.end - crop.x.begin;
    // A vector that starts within the crop may reach past it.
    pitch = round_up(columns + 4 + kMaxLanes, kMaxLanes);
    words = (pitch + 63) / 64;
    work->probability.resize(std::max<size_t>(work->probability.size(), (rows + 2) * pitch));
    work->above.resize(std::max<size_t>(work->above.size(), (rows + 2) * words));
    work->below.resize(std::max<size_t>(work->below.size(), (rows + 2) * words));
    probability = work->probability.data();
    above = work->above.data();
    below = work->below.data();
  }

  // Writes the border around the crop of a map of height x width samples.
  void close(int32_t height, int32_t width) const {
    const bool at_right_end = crop.x.end == width;
    for (int32_t r = 1; r <= rows; ++r) {
      float* own = row(r);
      own[0] = own[1] = 0.0f;
      float* border = own + 2 + columns;
      border[0] = at_right_end ? border[-1] : 0.0f;
      for (float* rest = border + 1; rest < own + pitch; ++rest) *rest = 0.0f;
    }
    memset(row(0), 0, sizeof(float) * pitch);
    float* last = row(rows + 1);
    if (crop.y.end == height) {
      memcpy(last, row(rows), sizeof(float) * pitch);
    } else {
      memset(last, 0, sizeof(float) * pitch);
    }
  }
};

struct Job {
  Planes planes;
  int32_t height, width;  // of the prototypes
  const float* coefficients;
  const Crop* crops;  // one for each instance, none from count on
  edgeseg::Limits limits;
  float threshold;
  const Axis* x_axis;
  const Axis* y_axis;
  bool short_cut;
};

// Rows of packed bits from first_row on, of the bytes from first_byte to end_byte of a frame's row.
struct BitRows {
  uint8_t* data;
  int64_t pitch;
  int64_t first_byte, end_byte;
  int32_t first_row;

  uint8_t* row(int32_t r) const { return data + (r - first_row) * pitch; }
};

void set_bits(uint8_t* row, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin / 8;
  const int64_t last = (end - 1) / 8;
  const uint8_t head = static_cast<uint8_t>(0xff >> (begin % 8));
  const uint8_t tail = static_cast<uint8_t>(0xff << (7 - (end - 1) % 8));
  if (first == last) {
    row[first] |= head & tail;
    return;
  }
  row[first] |= head;
  memset(row + first + 1, 0xff, last - first - 1);
  row[last] |= tail;
}

// Calls visit(begin, end) for each run of set bits among `words` of 64.
template <class Visit>
EDGESEG_INLINE void for_runs(const uint64_t* bits, int64_t words, const Visit& visit) {
  int64_t begin = -1;  // of the run that is open
  for (int64_t w = 0; w < words; ++w) {
    uint64_t left = bits[w];
    int32_t done = 0;
    while (done < 64) {
      if (begin < 0) {
        if (left == 0) break;
        const int32_t skip = __builtin_ctzll(left);
        begin = w * 64 + done + skip;
        left >>= skip;
        done += skip;
      }
      const int32_t run = ~left == 0 ? 64 : __builtin_ctzll(~left);
      if (done + run >= 64) break;  // goes on in the next word
      visit(begin, w * 64 + done + run);
      begin = -1;
      left >>= run;
      done += run;
    }
  }
  if (begin >= 0) visit(begin, words * 64);
}

// Bits first to end - 1 of `words` of 64.
EDGESEG_INLINE uint64_t bits_between(int64_t word, int64_t first, int64_t end) {
  const int64_t low = std::clamp<int64_t>(first - word * 64, 0, 64);
  const int64_t high = std::clamp<int64_t>(end - word * 64, 0, 64);
  const uint64_t below_high = high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  const uint64_t below_low = low == 64 ? ~uint64_t{0} : (uint64_t{1} << low) - 1;
  return below_high & ~below_low;
}

// Appends COCO's text of one run length, or of its difference to the one before the last.
void append_count(int64_t value, std::vector<uint8_t>* text) {
  bool more = true;
  while (more) {
    int64_t digit = value & 0x1f;
    value >>= 5;
    more = (digit & 0x10) != 0 ? value != -1 : value != 0;
    if (more) digit |= 0x20;
    text->push_back(static_cast<uint8_t>(digit + 48));
  }
}

// COCO's run lengths from the turns of a mask, those of a column in order: down the columns, zeros
// first, each length from the fourth on less the one two before it, five bits to a letter
// (cocodataset/cocoapi, common/maskApi.c).
void encode_runs(int32_t height, int32_t width, Span columns, Workspace* work) {
  const int32_t count = columns.is_empty() ? 0 : columns.end - columns.begin;
  work->column_begin.assign(static_cast<size_t>(count) + 1, 0);
  int64_t* begin = work->column_begin.data();
  for (const Turn& turn : work->turns) ++begin[turn.x - columns.begin];
  int64_t before = 0;
  for (int32_t i = 0; i <= count; ++i) {
    const int64_t own = begin[i];
    begin[i] = before;
    before += own;
  }
  work->sorted.resize(work->turns.size());
  for (const Turn& turn : work->turns) work->sorted[begin[turn.x - columns.begin]++] = turn.y;

  // begin[i] is now where column i ends.
  work->borders.clear();
  int64_t at = 0;
  for (int32_t i = 0; i < count; ++i) {
    for (; at < begin[i]; ++at) {
      const int64_t border = static_cast<int64_t>(columns.begin + i) * height + work->sorted[at];
      // A run that ends at the frame's bottom goes on where the next column begins with one.
      if (!work->borders.empty() && work->borders.back() == border) {
        work->borders.pop_back();
      } else {
        work->borders.push_back(border);
      }
    }
  }
  const int64_t area = static_cast<int64_t>(height) * width;
  if (!work->borders.empty() && work->borders.back() == area) work->borders.pop_back();
  work->borders.push_back(area);

  work->text.clear();
  int64_t lengths[2] = {0, 0};  // the last but one and the last
  int64_t start = 0;
  for (size_t i = 0; i < work->borders.size(); ++i) {
    const int64_t length = work->borders[i] - start;
    append_count(i > 2 ? length - lengths[0] : length, &work->text);
    start = work->borders[i];
    lengths[0] = lengths[1];
    lengths[1] = length;
  }
}

// Texts of run lengths that several threads write: in any order, as far as `room` bytes go.
struct RunTexts {
  uint8_t* text;
  int64_t room;
  int64_t* spans;  // of each mask: where its text begins and ends
  std::atomic<int64_t> used{0};

  // The text of mask `k`, whose turns are in `work`.
  void add(int32_t k, const edgeseg::FrameFit& fit, Span columns, Workspace* work) {
    encode_runs(fit.frame_height, fit.frame_width, columns, work);
    const int64_t size = static_cast<int64_t>(work->text.size());
    const int64_t begin = used.fetch_add(size);
    if (begin + size <= room) memcpy(text + begin, work->text.data(), size);
    spans[2 * k] = begin;
    spans[2 * k + 1] = begin + size;
  }
};

// The loops of one instruction set.
struct Loops {
  int32_t lanes;
  void (*fill_patch)(const Job&, int32_t, Patch*);
  void (*store_levels)(const Patch&, int32_t, uint8_t*);
  void (*draw_bits)(const Job&, const Patch&, const BitRows&, Workspace*);
  void (*find_turns)(const Job&, const Patch&, Workspace*);
};

}  // namespace

#define EDGESEG_LOOPS "mask_assembly_loops.h"
#include "each_isa.h"

namespace {

const Loops& choose_loops(int32_t flags) {
#if defined(__x86_64__)
  const edgeseg::Isa isa = edgeseg::chosen_isa(flags);
  if (isa == edgeseg::Isa::kAvx512) return avx512::kLoops;
  if (isa == edgeseg::Isa::kAvx2) return avx2::kLoops;
#else
  (void)flags;
#endif
  return portable::kLoops;
}

bool is_side(int32_t side) { return side >= 1 && side <= edgeseg::kMaxMaskSide; }

bool is_good(const edgeseg::Features* prototypes, const Instances* instances, int32_t flags,
             int32_t threads) {
  return prototypes != nullptr && prototypes->data != nullptr &&
         prototypes->type == edgeseg::kFloat32 && prototypes->channels >= 1 &&
         prototypes->channels <= edgeseg::kMaxPrototypes && is_side(prototypes->height) &&
         is_side(prototypes->width) && prototypes->channel_stride >= 1 &&
         prototypes->pixel_stride >= 1 && instances != nullptr && instances->capacity >= 0 &&
         (instances->capacity == 0 ||
          (instances->coefficients != nullptr && instances->boxes != nullptr)) &&
         is_side(instances->network_height) && is_side(instances->network_width) && threads >= 1 &&
         (flags & ~kKnownFlags) == 0;
}

bool is_good(const edgeseg::FrameFit* fit) {
  return fit != nullptr && is_side(fit->frame_height) && is_side(fit->frame_width) &&
         is_side(fit->height) && is_side(fit->width) && fit->top >= 0 && fit->left >= 0 &&
         fit->inner_height >= 1 && fit->inner_width >= 1 &&
         fit->inner_height <= fit->height - fit->top && fit->inner_width <= fit->width - fit->left;
}

bool is_good(const edgeseg::FrameFit* fit, const Instances& instances, float threshold) {
  return is_good(fit) && fit->height == instances.network_height &&
         fit->width == instances.network_width && edgeseg::is_threshold(threshold);
}

int32_t count_of(const Instances& instances) {
  return instances.count == nullptr ? instances.capacity
                                    : std::clamp(*instances.count, 0, instances.capacity);
}

std::vector<Crop> crops_of(const edgeseg::Features& prototypes, const Instances& instances) {
  std::vector<Crop> crops(instances.capacity, Crop{});
  for (int32_t k = 0; k < count_of(instances); ++k) {
    crops[k] =
        edgeseg::crop_of(instances.boxes + 4 * static_cast<int64_t>(k), prototypes.height,
                         prototypes.width, instances.network_height, instances.network_width);
  }
  return crops;
}

Span joined(Span a, Span b) { return {std::min(a.begin, b.begin), std::max(a.end, b.end)}; }

// The prototypes as planes whose rows can be read in vectors: as they are where they allow it, else
// copied, as far as a crop reaches.
int32_t arrange_planes(const edgeseg::Features& prototypes, const std::vector<Crop>& crops,
                       int32_t lanes, int32_t threads, std::vector<float>* copied, Planes* planes) {
  const float* data = static_cast<const float*>(prototypes.data);
  const int64_t plane = static_cast<int64_t>(prototypes.height) * prototypes.width;
  if (prototypes.pixel_stride == 1 && plane >= lanes) {
    *planes = {data, prototypes.channels, prototypes.channel_stride, prototypes.width, 0,
               0,    plane - lanes};
    return kOk;
  }
  Crop all = {};
  for (const Crop& crop : crops) {
    if (crop.is_empty()) continue;
    all = all.is_empty() ? crop : Crop{joined(all.y, crop.y), joined(all.x, crop.x)};
  }
  const int32_t rows = all.y.end - all.y.begin;
  const int64_t columns = all.x.end - all.x.begin;
  const int64_t stride = rows * columns;
  try {
    copied->resize(std::max<size_t>(copied->size(), prototypes.channels * stride + kMaxLanes));
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  float* target = copied->data();
  *planes = {target,
             prototypes.channels,
             stride,
             columns,
             all.y.begin,
             all.x.begin,
             std::numeric_limits<int64_t>::max()};
  return edgeseg::for_chunks(
      [&](int32_t row) {
        const int64_t first =
            static_cast<int64_t>(all.y.begin + row) * prototypes.width + all.x.begin;
        // In blocks of samples, so that what is read in strides stays in L1 for the next channel.
        for (int64_t begin = 0; begin < columns; begin += kMaxLanes) {
          const int64_t count = std::min<int64_t>(columns - begin, kMaxLanes);
          const float* from = data + (first + begin) * prototypes.pixel_stride;
          float* to = target + row * columns + begin;
          for (int32_t c = 0; c < prototypes.channels; ++c) {
            for (int64_t i = 0; i < count; ++i) {
              to[c * stride + i] =
                  from[c * prototypes.channel_stride + i * prototypes.pixel_stride];
            }
          }
        }
        return kOk;
      },
      rows, threads);
}

// Runs `mask(job, instance)` for every instance.
template <class Mask>
int32_t for_instances(const edgeseg::Features& prototypes, const Instances& instances,
                      const edgeseg::FrameFit* fit, float threshold, int32_t flags, int32_t threads,
                      const Mask& mask) {
  thread_local std::vector<float> copied;
  thread_local Axis x_axis;
  thread_local Axis y_axis;
  std::vector<Crop> crops;
  Job job = {};
  try {
    crops = crops_of(prototypes, instances);
    if (fit != nullptr) {
      x_axis.fit(edgeseg::frame_axis(prototypes.width, fit->width, fit->left, fit->inner_width,
                                     fit->frame_width),
                 0, true);
      y_axis.fit(edgeseg::frame_axis(prototypes.height, fit->height, fit->top, fit->inner_height,
                                     fit->frame_height),
                 0, false);
    }
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  const Loops& loops = choose_loops(flags);
  const int32_t status =
      arrange_planes(prototypes, crops, loops.lanes, threads, &copied, &job.planes);
  if (status != kOk) return status;
  job.height = prototypes.height;
  job.width = prototypes.width;
  job.coefficients = static_cast<const float*>(instances.coefficients);
  job.crops = crops.data();
  job.limits = edgeseg::limits_of(threshold);
  job.threshold = threshold;
  job.x_axis = &x_axis;
  job.y_axis = &y_axis;
  job.short_cut = (flags & edgeseg::kNoShortCut) == 0;
  return edgeseg::for_chunks([&](int32_t k) { return mask(job, loops, k); }, instances.capacity,
                             threads);
}

// Finished masks: levels 0 to 255 at samples that span the network's input (`boxes`), or that, in a
// border of one empty sample, span a rectangle of the frame each (`pastes`); one of the two is
// null.
struct LevelMasks {
  const uint8_t* levels;  // (capacity, height, width)
  const float* boxes;     // (capacity, 4) xyxy in network pixels: samples outside count as 0
  const int32_t* pastes;  // (capacity, 4) first column and row, last column and row
  int32_t capacity, height, width;
};

// A level is "on" where the probability is above a half.
constexpr float kHalfLevel = 127.5f;

// Far outside of any frame, and small enough for every product in FrameAxis.
constexpr int32_t kFarthest = 1 << 24;

bool is_good(const LevelMasks* masks, const edgeseg::FrameFit* fit) {
  if (masks == nullptr || !is_good(fit) || masks->capacity < 0 || !is_side(masks->height) ||
      !is_side(masks->width)) {
    return false;
  }
  if (masks->capacity == 0) return true;
  if (masks->levels == nullptr || (masks->boxes == nullptr) == (masks->pastes == nullptr)) {
    return false;
  }
  if (masks->pastes != nullptr) {
    for (int64_t i = 0; i < int64_t{4} * masks->capacity; ++i) {
      if (masks->pastes[i] < -kFarthest || masks->pastes[i] > kFarthest) return false;
    }
  }
  return true;
}

// Pixels `first` to `last` of an axis of `frame` are `samples` samples with an empty one at either
// end. Beyond `last` there is nothing to see, so that positions end there.
FrameAxis paste_axis(int32_t samples, int32_t first, int32_t last, int32_t frame) {
  const int64_t size = int64_t{last} - first + 1;
  const int64_t all = int64_t{samples} + 2;
  // (position - first + 1/2) * all / size - 1/2.
  const int64_t denominator = 2 * size;
  const int64_t step = 2 * all;
  const int64_t offset = all - size - 2 * all * first;
  const int64_t common = std::gcd(std::gcd(step, denominator), offset);
  return {samples + 2, std::clamp(last + 1, 0, frame), step / common, offset / common,
          denominator / common};
}

// One mask: its samples among the job's, and the pixels that it can reach.
struct Placed {
  Crop crop;
  Span rows, columns;

  bool is_empty() const { return rows.is_empty() || columns.is_empty(); }
};

// The masks of a call, placed one by one.
struct LevelJob {
  const LevelMasks& masks;
  const edgeseg::FrameFit& fit;
  Job job;

  LevelJob(const LevelMasks& its_masks, const edgeseg::FrameFit& its_fit, int32_t flags,
           Axis* x_axis, Axis* y_axis)
      : masks(its_masks), fit(its_fit), job() {
    job.limits = edgeseg::limits_of(kHalfLevel);
    job.threshold = kHalfLevel;
    job.short_cut = (flags & edgeseg::kNoShortCut) == 0;
    job.height = masks.height;
    job.width = masks.width;
    if (masks.boxes == nullptr) {
      job.height += 2;
      job.width += 2;
      return;
    }
    x_axis->fit(
        edgeseg::frame_axis(masks.width, fit.width, fit.left, fit.inner_width, fit.frame_width), 0,
        true);
    y_axis->fit(
        edgeseg::frame_axis(masks.height, fit.height, fit.top, fit.inner_height, fit.frame_height),
        0, false);
    job.x_axis = x_axis;
    job.y_axis = y_axis;
  }

  // Places mask k; where it has axes of its own, they are made in x_axis and y_axis.
  Placed place(int32_t k, Axis* x_axis, Axis* y_axis, Job* own) const {
    *own = job;
    Placed placed = {};
    if (masks.boxes != nullptr) {
      placed.crop = edgeseg::crop_of(masks.boxes + int64_t{4} * k, masks.height, masks.width,
                                     fit.height, fit.width);
    } else {
      const int32_t* paste = masks.pastes + int64_t{4} * k;
      const bool is_seen = paste[0] <= paste[2] && paste[1] <= paste[3] && paste[2] >= 0 &&
                           paste[3] >= 0 && paste[0] < fit.frame_width &&
                           paste[1] < fit.frame_height;
      if (!is_seen) return placed;
      placed.crop = {{1, masks.height + 1}, {1, masks.width + 1}};
      x_axis->fit(paste_axis(masks.width, paste[0], paste[2], fit.frame_width),
                  std::max(paste[0], 0), true);
      y_axis->fit(paste_axis(masks.height, paste[1], paste[3], fit.frame_height),
                  std::max(paste[1], 0), false);
      own->x_axis = x_axis;
      own->y_axis = y_axis;
    }
    if (placed.crop.is_empty()) return placed;
    placed.rows = own->y_axis->positions_of(placed.crop.y);
    placed.columns = own->x_axis->positions_of(placed.crop.x);
    return placed;
  }

  // The samples of mask k as a patch.
  void fill(int32_t k, Patch* patch) const {
    const int32_t border = masks.boxes == nullptr ? 1 : 0;
    const uint8_t* mask = masks.levels + int64_t{k} * masks.height * masks.width;
    for (int32_t r = 0; r < patch->rows; ++r) {
      const uint8_t* from = mask + int64_t{patch->crop.y.begin + r - border} * masks.width +
                            (patch->crop.x.begin - border);
      float* to = patch->row(1 + r) + 2;
      for (int32_t i = 0; i < patch->columns; ++i) to[i] = from[i];
    }
    patch->close(job.height, job.width);
  }
};

// The bytes of a frame's row that a mask can reach, in whole vectors.
struct ByteSpan {
  int32_t begin, end;
};

ByteSpan bytes_of(Span columns, int32_t frame_width) {
  const int64_t end = round_up(columns.end, kMaxLanes) / 8;
  return {columns.begin / kMaxLanes * (kMaxLanes / 8),
          static_cast<int32_t>(std::min<int64_t>(end, (int64_t{frame_width} + 7) / 8))};
}

// Runs `mask(level_job, job, loops, k, placed)` for every mask.
template <class Mask>
int32_t for_levels(const LevelMasks& masks, const edgeseg::FrameFit& fit, int32_t flags,
                   int32_t threads, const Mask& mask) {
  thread_local Axis x_axis;
  thread_local Axis y_axis;
  try {
    const LevelJob levels(masks, fit, flags, &x_axis, &y_axis);
    const Loops& loops = choose_loops(flags);
    return edgeseg::for_chunks(
        [&](int32_t k) {
          thread_local Axis own_x;
          thread_local Axis own_y;
          Job job;
          const Placed placed = levels.place(k, &own_x, &own_y, &job);
          return mask(levels, job, loops, k, placed);
        },
        masks.capacity, threads);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

}  // namespace

// EdgeSegMaskAssembly; the definition is in edgeseg/mask_assembly.h, the structs are those of the
// CUDA library's interface, with host pointers and float32 prototypes.
//   masks    (capacity, height, width) uint8, written: levels 0 to 255
//   flags    kNoShortCut (nothing to cut here) | kPortableCode | kAvx2Code
//   threads  at least 1
// Returns 0, or 1 for an argument outside these bounds, or 2 without memory.
EDGESEG_EXPORT int32_t edgeseg_mask_assembly(const edgeseg::Features* prototypes,
                                             const Instances* instances, uint8_t* masks,
                                             int32_t flags, int32_t threads) {
  if (!is_good(prototypes, instances, flags, threads) || masks == nullptr) return kBadArgument;
  const int64_t plane = static_cast<int64_t>(prototypes->height) * prototypes->width;
  return for_instances(*prototypes, *instances, nullptr, 0.5f, flags, threads,
                       [&](const Job& job, const Loops& loops, int32_t k) {
                         uint8_t* mask = masks + k * plane;
                         const Crop crop = job.crops[k];
                         if (crop.is_empty()) {
                           memset(mask, 0, plane);
                           return kOk;
                         }
                         Workspace* work = workspace();
                         Patch patch;
                         patch.place(crop, work);
                         loops.fill_patch(job, k, &patch);
                         const int64_t width = job.width;
                         memset(mask, 0, crop.y.begin * width);
                         for (int32_t y = crop.y.begin; y < crop.y.end; ++y) {
                           uint8_t* row = mask + y * width;
                           memset(row, 0, crop.x.begin);
                           loops.store_levels(patch, y - patch.top, row + crop.x.begin);
                           memset(row + crop.x.end, 0, width - crop.x.end);
                         }
                         memset(mask + crop.y.end * width, 0, (job.height - crop.y.end) * width);
                         return kOk;
                       });
}

// The same at frame size.
//   fit        the network's size is that of the instances
//   threshold  above 0 and below 1
//   bits       (capacity, frame_height, ceil(frame_width / 8)) uint8, written
//   flags      kNoShortCut: every pixel of the box
EDGESEG_EXPORT int32_t edgeseg_mask_bits(const edgeseg::Features* prototypes,
                                         const Instances* instances, const edgeseg::FrameFit* fit,
                                         float threshold, uint8_t* bits, int32_t flags,
                                         int32_t threads) {
  if (!is_good(prototypes, instances, flags, threads) || !is_good(fit, *instances, threshold) ||
      bits == nullptr) {
    return kBadArgument;
  }
  const int64_t pitch = (static_cast<int64_t>(fit->frame_width) + 7) / 8;
  return for_instances(
      *prototypes, *instances, fit, threshold, flags, threads,
      [&](const Job& job, const Loops& loops, int32_t k) {
        uint8_t* mask = bits + k * fit->frame_height * pitch;
        const Crop crop = job.crops[k];
        const Span rows = crop.is_empty() ? Span{0, 0} : job.y_axis->positions_of(crop.y);
        const Span columns = crop.is_empty() ? Span{0, 0} : job.x_axis->positions_of(crop.x);
        memset(mask, 0, fit->frame_height * pitch);
        if (rows.is_empty() || columns.is_empty()) return kOk;
        Workspace* work = workspace();
        Patch patch;
        patch.place(crop, work);
        loops.fill_patch(job, k, &patch);
        // The bytes that the mask can reach, in whole vectors.
        const int64_t first = columns.begin / kMaxLanes * (kMaxLanes / 8);
        const int64_t end = std::min<int64_t>(round_up(columns.end, kMaxLanes) / 8, pitch);
        loops.draw_bits(job, patch, {mask + first, pitch, first, end, 0}, work);
        return kOk;
      });
}

// The same as COCO's compressed run lengths, one text for each instance.
//   text      the texts, in any order, as far as `room` bytes go
//   spans     (capacity, 2) int64, written: where each text begins and ends
//   needed    written: bytes that all texts take; above `room`, some are missing
// The frame's area is below 2^32, as the format's readers need.
EDGESEG_EXPORT int32_t edgeseg_mask_runs(const edgeseg::Features* prototypes,
                                         const Instances* instances, const edgeseg::FrameFit* fit,
                                         float threshold, uint8_t* text, int64_t room,
                                         int64_t* spans, int64_t* needed, int32_t flags,
                                         int32_t threads) {
  if (!is_good(prototypes, instances, flags, threads) || !is_good(fit, *instances, threshold) ||
      room < 0 || (text == nullptr && room > 0) || (spans == nullptr && instances->capacity > 0) ||
      needed == nullptr ||
      static_cast<int64_t>(fit->frame_height) * fit->frame_width >= int64_t{1} << 32) {
    return kBadArgument;
  }
  RunTexts texts{text, room, spans};
  const int32_t status = for_instances(
      *prototypes, *instances, fit, threshold, flags, threads,
      [&](const Job& job, const Loops& loops, int32_t k) {
        Workspace* work = workspace();
        work->turns.clear();
        const Crop crop = job.crops[k];
        const Span rows = crop.is_empty() ? Span{0, 0} : job.y_axis->positions_of(crop.y);
        const Span columns = crop.is_empty() ? Span{0, 0} : job.x_axis->positions_of(crop.x);
        if (!rows.is_empty() && !columns.is_empty()) {
          Patch patch;
          patch.place(crop, work);
          loops.fill_patch(job, k, &patch);
          loops.find_turns(job, patch, work);
        }
        texts.add(k, *fit, columns, work);
        return kOk;
      });
  *needed = texts.used.load();
  return status;
}

// Finished masks at frame size: each pixel whose centre, interpolated bilinearly among the levels,
// is above 127.5. First the parts of the frame that the masks can reach.
//   regions  (capacity, 4) int32, written: first row, end of rows, first byte, end of bytes of a
//   row
//            of packed bits; zeros for a mask that reaches no pixel
// Returns as above.
EDGESEG_EXPORT int32_t edgeseg_level_regions(const LevelMasks* masks, const edgeseg::FrameFit* fit,
                                             int32_t* regions, int32_t threads) {
  if (!is_good(masks, fit) || (regions == nullptr && masks->capacity > 0) || threads < 1) {
    return kBadArgument;
  }
  return for_levels(
      *masks, *fit, 0, threads,
      [&](const LevelJob&, const Job&, const Loops&, int32_t k, const Placed& placed) {
        int32_t* region = regions + int64_t{4} * k;
        memset(region, 0, 4 * sizeof *region);
        if (placed.is_empty()) return kOk;
        const ByteSpan bytes = bytes_of(placed.columns, fit->frame_width);
        region[0] = placed.rows.begin;
        region[1] = placed.rows.end;
        region[2] = bytes.begin;
        region[3] = bytes.end;
        return kOk;
      });
}

// Then their bits.
//   begins  (capacity) int64: where in `bits` the region of each mask begins
//   bits    written: each region's rows, one after the other; the first pixel of a byte is its
//           highest bit
//   flags   kNoShortCut | kPortableCode | kAvx2Code
EDGESEG_EXPORT int32_t edgeseg_level_bits(const LevelMasks* masks, const edgeseg::FrameFit* fit,
                                          const int64_t* begins, uint8_t* bits, int32_t flags,
                                          int32_t threads) {
  if (!is_good(masks, fit) || threads < 1 || (flags & ~kKnownFlags) != 0 ||
      (masks->capacity > 0 && (begins == nullptr || bits == nullptr))) {
    return kBadArgument;
  }
  return for_levels(
      *masks, *fit, flags, threads,
      [&](const LevelJob& levels, const Job& job, const Loops& loops, int32_t k,
          const Placed& placed) {
        if (placed.is_empty()) return kOk;
        const ByteSpan bytes = bytes_of(placed.columns, fit->frame_width);
        const int64_t pitch = bytes.end - bytes.begin;
        Workspace* work = workspace();
        Patch patch;
        patch.place(placed.crop, work);
        levels.fill(k, &patch);
        loops.draw_bits(job, patch,
                        {bits + begins[k], pitch, bytes.begin, bytes.end, placed.rows.begin}, work);
        return kOk;
      });
}

// The same pixels as COCO's compressed run lengths; arguments as those of edgeseg_mask_runs.
EDGESEG_EXPORT int32_t edgeseg_level_runs(const LevelMasks* masks, const edgeseg::FrameFit* fit,
                                          uint8_t* text, int64_t room, int64_t* spans,
                                          int64_t* needed, int32_t flags, int32_t threads) {
  if (!is_good(masks, fit) || threads < 1 || (flags & ~kKnownFlags) != 0 || room < 0 ||
      (text == nullptr && room > 0) || (spans == nullptr && masks->capacity > 0) ||
      needed == nullptr ||
      static_cast<int64_t>(fit->frame_height) * fit->frame_width >= int64_t{1} << 32) {
    return kBadArgument;
  }
  RunTexts texts{text, room, spans};
  const int32_t status = for_levels(*masks, *fit, flags, threads,
                                    [&](const LevelJob& levels, const Job& job, const Loops& loops,
                                        int32_t k, const Placed& placed) {
                                      Workspace* work = workspace();
                                      work->turns.clear();
                                      Span columns = {0, 0};
                                      if (!placed.is_empty()) {
                                        columns = placed.columns;
                                        Patch patch;
                                        patch.place(placed.crop, work);
                                        levels.fill(k, &patch);
                                        loops.find_turns(job, patch, work);
                                      }
                                      texts.add(k, *fit, columns, work);
                                      return kOk;
                                    });
  *needed = texts.used.load();
  return status;
}
