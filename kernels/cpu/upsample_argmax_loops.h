// The loops of EdgeSegUpsampleArgmax for one instruction set. Included by upsample_argmax.cpp only,
// once per set, with EDGESEG_ISA (the namespace) and EDGESEG_LANES (floats per vector); no include
// guard.

namespace {
namespace EDGESEG_ISA {

#undef EDGESEG_UPSAMPLE_ARGMAX_H_
#include "edgeseg/upsample_argmax.h"

constexpr int32_t kLanes = EDGESEG_LANES;

typedef float Floats __attribute__((vector_size(4 * EDGESEG_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * EDGESEG_LANES)));

namespace edgeseg {
template <>
struct Lanes<Floats> {
  using Int = Ints;
  static EDGESEG_HD Ints truncate(Floats x) { return __builtin_convertvector(x, Ints); }
  static EDGESEG_HD Floats convert(Ints x) { return __builtin_convertvector(x, Floats); }
  static EDGESEG_HD Floats from_bits(Ints bits) { return reinterpret_cast<Floats>(bits); }
};
}  // namespace edgeseg

using Winner = edgeseg::Winner<Floats>;

EDGESEG_INLINE Floats load(const float* from) {
  Floats values;
  memcpy(&values, from, sizeof values);
  return values;
}

template <class Vector, class Element>
EDGESEG_INLINE void store(Vector values, Element* to) {
  memcpy(to, &values, sizeof values);
}

// Winner and state of N * kLanes samples that lie side by side.
template <int N>
EDGESEG_INLINE void find_winners(const float* samples, int64_t plane, int32_t classes,
                                 bool with_confidence, uint8_t* winner, uint8_t* state) {
  Winner best[N];
  Floats lower[N];  // the largest value among classes below the winner
  for (int n = 0; n < N; ++n) {
    best[n].start();
    lower[n] = best[n].value;
  }
  for (int32_t c = 0; c < classes; ++c) {
    for (int n = 0; n < N; ++n) {
      const Floats value = load(samples + c * plane + n * kLanes);
      lower[n] = value > best[n].value ? best[n].value : lower[n];
      best[n].offer(value, c);
    }
  }
  Floats sum[N] = {};
  if (with_confidence) {
    for (int32_t c = 0; c < classes; ++c) {
      for (int n = 0; n < N; ++n) {
        const Floats value = load(samples + c * plane + n * kLanes);
        sum[n] += edgeseg::exp_nonpositive(value - best[n].value);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int32_t i = 0; i < kLanes; ++i) {
      const float limit = edgeseg::beaten_below(best[n].value[i]);
      const bool clear = lower[n][i] < limit;
      const bool saturated = edgeseg::is_saturated(best[n].value[i], sum[n][i]);
      winner[n * kLanes + i] = static_cast<uint8_t>(best[n].index[i]);
      state[n * kLanes + i] = (clear ? kClear : 0) | (saturated ? kSaturated : 0);
    }
  }
}

EDGESEG_INLINE void fill_sample_row(const Job& job, int32_t y, SampleRow* row) {
  const int64_t plane = static_cast<int64_t>(job.height) * job.width;
  const float* samples = job.logits + static_cast<int64_t>(y) * job.width;
  const bool with_confidence = job.confidence != nullptr;
  uint8_t* winner = row->winner.data();
  uint8_t* state = row->state.data();
  row->y = y;
  if (job.width < kLanes) {
    float padded[edgeseg::kMaxClasses * kLanes] = {};
    for (int32_t c = 0; c < job.classes; ++c) {
      memcpy(padded + c * kLanes, samples + c * plane, sizeof(float) * job.width);
    }
    find_winners<1>(padded, kLanes, job.classes, with_confidence, winner, state);
    return;
  }
  int32_t x = 0;
  for (; x + 2 * kLanes <= job.width; x += 2 * kLanes) {
    find_winners<2>(samples + x, plane, job.classes, with_confidence, winner + x, state + x);
  }
  while (x < job.width) {
    // The last vector overlaps the one before rather than reach past the row.
    x = std::min(x, job.width - kLanes);
    find_winners<1>(samples + x, plane, job.classes, with_confidence, winner + x, state + x);
    x += kLanes;
  }
}

// Column x of the samples, rows y_near and y_far, all classes.
EDGESEG_INLINE void gather(const Job& job, int32_t x, int32_t y_near, int32_t y_far, float* top,
                           float* bottom) {
  const int64_t plane = static_cast<int64_t>(job.height) * job.width;
  const float* near = job.logits + static_cast<int64_t>(y_near) * job.width + x;
  const float* far = job.logits + static_cast<int64_t>(y_far) * job.width + x;
  for (int32_t c = 0; c < job.classes; ++c) {
    top[c] = near[c * plane];
    bottom[c] = far[c * plane];
  }
}

// Keeps the classes that no corner winner beats in the whole cell; returns how many, in rising
// order of class.
EDGESEG_INLINE int32_t keep_candidates(const Corners& all, int32_t classes,
                                       const uint8_t corner_winner[4], Workspace* work) {
  for (int32_t c = 0; c < classes; c += kLanes) store(Ints{}, work->beaten + c);
  for (int32_t w = 0; w < 4; ++w) {
    const int32_t rival = corner_winner[w];
    bool seen = false;
    for (int32_t before = 0; before < w; ++before) seen |= corner_winner[before] == rival;
    if (seen) continue;
    const Floats top_left = edgeseg::splat<Floats>(edgeseg::beaten_below(all.top_left[rival]));
    const Floats top_right = edgeseg::splat<Floats>(edgeseg::beaten_below(all.top_right[rival]));
    const Floats bottom_left =
        edgeseg::splat<Floats>(edgeseg::beaten_below(all.bottom_left[rival]));
    const Floats bottom_right =
        edgeseg::splat<Floats>(edgeseg::beaten_below(all.bottom_right[rival]));
    for (int32_t c = 0; c < classes; c += kLanes) {
      Ints beaten;
      memcpy(&beaten, work->beaten + c, sizeof beaten);
      beaten |= (load(all.top_left + c) < top_left) & (load(all.top_right + c) < top_right) &
                (load(all.bottom_left + c) < bottom_left) &
                (load(all.bottom_right + c) < bottom_right);
      store(beaten, work->beaten + c);
    }
  }
  Corners& kept = work->corners[1];
  int32_t count = 0;
  for (int32_t c = 0; c < classes; ++c) {
    // Written always, kept by moving on: a branch here would be a coin toss.
    work->candidate[count] = c;
    kept.top_left[count] = all.top_left[c];
    kept.top_right[count] = all.top_right[c];
    kept.bottom_left[count] = all.bottom_left[c];
    kept.bottom_right[count] = all.bottom_right[c];
    count += 1 + work->beaten[c];  // beaten is 0 or -1
  }
  return count;
}

EDGESEG_INLINE void set_tile(const Job& job, int32_t row, int32_t rows, int32_t column,
                             int32_t columns, Tile* tile) {
  const float* x_near = job.x_axis->near_weight.data() + column;
  const float* x_far = job.x_axis->far_weight.data() + column;
  // Neighbouring cells of an integer factor have the same weights: the tables of the last one
  // serve as they are.
  const bool same_shape = tile->row == row && tile->rows == rows && tile->columns == columns;
  if (same_shape &&
      (tile->column == column || (memcmp(x_near, tile->x_near, sizeof(float) * columns) == 0 &&
                                  memcmp(x_far, tile->x_far, sizeof(float) * columns) == 0))) {
    tile->column = column;
    return;
  }
  int32_t pixel = 0;
  for (int32_t r = 0; r < rows; ++r) {
    const float y_near = job.y_axis->near_weight[row + r];
    const float y_far = job.y_axis->far_weight[row + r];
    for (int32_t i = 0; i < columns; ++i, ++pixel) {
      tile->x_near[pixel] = x_near[i];
      tile->x_far[pixel] = x_far[i];
      tile->y_near[pixel] = y_near;
      tile->y_far[pixel] = y_far;
    }
  }
  for (const int32_t end = round_up(pixel, kMaxLanes); pixel < end; ++pixel) {
    tile->x_near[pixel] = tile->x_far[pixel] = tile->y_near[pixel] = tile->y_far[pixel] = 0.0f;
  }
  tile->row = row;
  tile->rows = rows;
  tile->column = column;
  tile->columns = columns;
}

// The four corners of one class, interpolated along x.
struct Edges {
  Floats top;
  Floats bottom;

  EDGESEG_INLINE Edges(const Corners& corners, int32_t k, Floats x_near, Floats x_far)
      : top(edgeseg::lerp(x_near, edgeseg::splat<Floats>(corners.top_left[k]), x_far,
                          edgeseg::splat<Floats>(corners.top_right[k]))),
        bottom(edgeseg::lerp(x_near, edgeseg::splat<Floats>(corners.bottom_left[k]), x_far,
                             edgeseg::splat<Floats>(corners.bottom_right[k]))) {}
};

// N vectors of a tile that have the same x weights: `first`, `first + stride`, ... in pixels.
// `candidate_count` of the classes can win; the softmax needs all of them.
template <int N>
EDGESEG_INLINE void compute_vectors(const Job& job, int32_t first, int32_t stride,
                                    int32_t candidate_count, Workspace* work) {
  const Tile& tile = work->tile;
  const Corners& candidates = job.short_cut ? work->corners[1] : work->corners[0];
  const Floats x_near = load(tile.x_near + first);
  const Floats x_far = load(tile.x_far + first);
  Winner best[N];
  for (int n = 0; n < N; ++n) best[n].start();
  for (int32_t k = 0; k < candidate_count; ++k) {
    const Edges edges(candidates, k, x_near, x_far);
    for (int n = 0; n < N; ++n) {
      best[n].offer(edgeseg::lerp(load(tile.y_near + first + n * stride), edges.top,
                                  load(tile.y_far + first + n * stride), edges.bottom),
                    work->candidate[k]);
    }
  }
  for (int n = 0; n < N; ++n) store(best[n].index, work->winner + first + n * stride);
  if (job.confidence == nullptr) return;
  Floats sum[N] = {};
  for (int32_t c = 0; c < job.classes; ++c) {
    const Edges edges(work->corners[0], c, x_near, x_far);
    for (int n = 0; n < N; ++n) {
      const Floats value = edgeseg::lerp(load(tile.y_near + first + n * stride), edges.top,
                                         load(tile.y_far + first + n * stride), edges.bottom);
      sum[n] += edgeseg::exp_nonpositive(value - best[n].value);
    }
  }
  for (int n = 0; n < N; ++n) {
    store(edgeseg::confidence_level(sum[n]), work->level + first + n * stride);
  }
}

// Winner, and on request the confidence, of all pixels of the tile.
EDGESEG_INLINE void compute_tile(const Job& job, int32_t candidate_count, Workspace* work) {
  const int32_t vectors = round_up(work->tile.rows * work->tile.columns, kLanes) / kLanes;
  // Pixels run through the tile row by row, so after `period` vectors the columns come again.
  int32_t common = work->tile.columns;
  for (int32_t rest = kLanes; rest != 0;) {
    const int32_t next = common % rest;
    common = rest;
    rest = next;
  }
  const int32_t period = work->tile.columns / common;
  for (int32_t phase = 0; phase < std::min(period, vectors); ++phase) {
    int32_t v = phase;
    for (; v + 3 * period < vectors; v += 4 * period) {
      compute_vectors<4>(job, v * kLanes, period * kLanes, candidate_count, work);
    }
    for (; v < vectors; v += period) {
      compute_vectors<1>(job, v * kLanes, period * kLanes, candidate_count, work);
    }
  }
}

EDGESEG_INLINE void store_tile(const Tile& tile, const int32_t* values, int32_t width,
                               uint8_t* target) {
  for (int32_t r = 0; r < tile.rows; ++r) {
    uint8_t* out = target + static_cast<int64_t>(tile.row + r) * width + tile.column;
    const int32_t* in = values + r * tile.columns;
    for (int32_t i = 0; i < tile.columns; ++i) out[i] = static_cast<uint8_t>(in[i]);
  }
}

// All output rows between sample rows y and y + 1.
EDGESEG_INLINE void compute_strip(const Job& job, int32_t y, const SampleRow& top,
                                  const SampleRow& bottom, Workspace* work) {
  const Axis& x_axis = *job.x_axis;
  const int32_t row = job.y_axis->begin[y];
  const int32_t row_end = job.y_axis->begin[y + 1];
  const int32_t y_far = job.y_axis->far(y);
  const int32_t width = x_axis.grid.target;
  uint8_t* first_classes = job.class_map + static_cast<int64_t>(row) * width;
  uint8_t* first_levels =
      job.confidence ? job.confidence + static_cast<int64_t>(row) * width : nullptr;

  // First the cells that one class wins outright, drawn in the strip's first row and copied down;
  // the others are then drawn over it.
  if (job.short_cut) {
    int32_t x = 0;
    while (x < job.width) {
      const uint8_t winner = top.winner[x];
      const int32_t start = x;
      while (x < job.width && top.winner[x] == winner) ++x;
      memset(first_classes + x_axis.begin[start], winner, x_axis.begin[x] - x_axis.begin[start]);
    }
    if (first_levels) memset(first_levels, 255, width);
    for (int32_t r = row + 1; r < row_end; ++r) {
      memcpy(job.class_map + static_cast<int64_t>(r) * width, first_classes, width);
      if (first_levels) {
        memcpy(job.confidence + static_cast<int64_t>(r) * width, first_levels, width);
      }
    }
  }

  Corners& all = work->corners[0];
  int32_t gathered = -1;  // the sample column in all.top_right and all.bottom_right
  const uint8_t wanted = job.confidence ? kClear | kSaturated : kClear;
  for (int32_t x = 0; x < job.width; ++x) {
    const int32_t column_end = x_axis.begin[x + 1];
    if (x_axis.begin[x] == column_end) continue;
    const int32_t x_far = x_axis.far(x);
    const uint8_t winners[4] = {top.winner[x], top.winner[x_far], bottom.winner[x],
                                bottom.winner[x_far]};
    if (job.short_cut) {
      const bool agree =
          winners[0] == winners[1] && winners[0] == winners[2] && winners[0] == winners[3];
      const uint8_t state = top.state[x] & top.state[x_far] & bottom.state[x] & bottom.state[x_far];
      if (agree && (state & wanted) == wanted) continue;
    }
    if (gathered == x) {
      memcpy(all.top_left, all.top_right, sizeof(float) * job.classes);
      memcpy(all.bottom_left, all.bottom_right, sizeof(float) * job.classes);
    } else {
      gather(job, x, y, y_far, all.top_left, all.bottom_left);
    }
    gather(job, x_far, y, y_far, all.top_right, all.bottom_right);
    gathered = x_far;

    int32_t count = job.classes;
    if (job.short_cut) {
      count = keep_candidates(all, job.classes, winners, work);
    } else {
      for (int32_t c = 0; c < count; ++c) work->candidate[c] = c;
    }
    for (int32_t r = row; r < row_end; r += kTileSide) {
      for (int32_t column = x_axis.begin[x]; column < column_end; column += kTileSide) {
        set_tile(job, r, std::min(kTileSide, row_end - r), column,
                 std::min(kTileSide, column_end - column), &work->tile);
        compute_tile(job, count, work);
        store_tile(work->tile, work->winner, width, job.class_map);
        if (job.confidence) store_tile(work->tile, work->level, width, job.confidence);
      }
    }
  }
}

// Strips begin to end - 1 on this thread.
void compute_strips(const Job& job, int32_t begin, int32_t end, Workspace* work) {
  for (int32_t y = begin; y < end; ++y) {
    if (job.y_axis->begin[y] == job.y_axis->begin[y + 1]) continue;
    const int32_t y_far = job.y_axis->far(y);
    SampleRow* top = &work->rows[0];
    SampleRow* bottom = &work->rows[1];
    if (job.short_cut) {
      if (bottom->y == y) std::swap(top, bottom);
      if (top->y != y) fill_sample_row(job, y, top);
      if (y_far == y) {
        bottom = top;
      } else {
        fill_sample_row(job, y_far, bottom);
      }
      if (top == &work->rows[1]) std::swap(work->rows[0], work->rows[1]);
      top = &work->rows[0];
      bottom = y_far == y ? top : &work->rows[1];
    }
    compute_strip(job, y, *top, *bottom, work);
  }
}

}  // namespace EDGESEG_ISA
}  // namespace
