// The loops of EdgeSegMaskAssembly for one instruction set. Included by mask_assembly.cpp only,
// once per set, with EDGESEG_ISA (the namespace) and EDGESEG_LANES (floats per vector); no include
// guard.

namespace {
namespace EDGESEG_ISA {

#undef EDGESEG_MASK_ASSEMBLY_H_
#undef EDGESEG_UPSAMPLE_ARGMAX_H_
#include "edgeseg/mask_assembly.h"

constexpr int32_t kLanes = EDGESEG_LANES;

typedef float Floats __attribute__((vector_size(4 * EDGESEG_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * EDGESEG_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(EDGESEG_LANES)));

namespace edgeseg {
template <>
struct Lanes<Floats> {
  using Int = Ints;
  static EDGESEG_HD Ints truncate(Floats x) { return __builtin_convertvector(x, Ints); }
  static EDGESEG_HD Floats convert(Ints x) { return __builtin_convertvector(x, Floats); }
  static EDGESEG_HD Floats from_bits(Ints bits) { return reinterpret_cast<Floats>(bits); }
};
}  // namespace edgeseg

template <class Vector, class Element>
EDGESEG_INLINE Vector load(const Element* from) {
  Vector values;
  memcpy(&values, from, sizeof values);
  return values;
}

template <class Vector, class Element>
EDGESEG_INLINE void store(Vector values, Element* to) {
  memcpy(to, &values, sizeof values);
}

// One bit per lane of a comparison's result, lane 0 the lowest.
EDGESEG_INLINE uint32_t to_bits(Ints mask) {
#if defined(__x86_64__) && EDGESEG_LANES == 16
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__x86_64__) && EDGESEG_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#elif defined(__aarch64__)
  const Ints weights = {1, 2, 4, 8};
  return static_cast<uint32_t>(vaddvq_s32(reinterpret_cast<int32x4_t>(mask & weights)));
#else
  uint32_t bits = 0;
  for (int32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

EDGESEG_INLINE Floats gather(const float* from, Ints index) {
#if defined(__x86_64__) && EDGESEG_LANES == 16
  // With all lanes asked for by name: GCC 12 warns about the plain one's undefined source.
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, reinterpret_cast<__m512i>(index),
                                  from, 4);
#elif defined(__x86_64__) && EDGESEG_LANES == 8
  return _mm256_i32gather_ps(from, reinterpret_cast<__m256i>(index), 4);
#else
  Floats values;
  for (int32_t i = 0; i < kLanes; ++i) values[i] = from[index[i]];
  return values;
#endif
}

// Pixels whose bits are computed together: whole bytes.
constexpr int32_t kGroup = kLanes < 8 ? 8 : kLanes;
constexpr int32_t kGroupBytes = kGroup / 8;
constexpr int32_t kGroupVectors = kGroup / kLanes;

// Probabilities of a vector of samples in N rows, from column `i` of the crop, row r on.
template <int N>
EDGESEG_INLINE void fill_vectors(const Job& job, const float* coefficients, int32_t r, int32_t i,
                                 const Patch& patch) {
  const Planes& planes = job.planes;
  const float* samples[N];
  int64_t excess[N];  // how far before the wanted sample the vector starts
  for (int n = 0; n < N; ++n) {
    const int64_t offset = (patch.crop.y.begin + r + n - planes.top) * planes.row_stride +
                           patch.crop.x.begin + i - planes.left;
    const int64_t start = std::min(offset, planes.last_vector);
    samples[n] = planes.data + start;
    excess[n] = offset - start;
  }
  Floats logit[N] = {};
  for (int32_t c = 0; c < planes.channels; ++c) {
    const Floats coefficient = edgeseg::splat<Floats>(coefficients[c]);
    for (int n = 0; n < N; ++n) {
      logit[n] += load<Floats>(samples[n] + c * planes.channel_stride) * coefficient;
    }
  }
  for (int n = 0; n < N; ++n) {
    const Floats probability = edgeseg::sigmoid(logit[n]);
    float* to = patch.row(1 + r + n) + 2 + i;
    if (excess[n] == 0) {
      store(probability, to);
    } else {
      float values[kLanes];
      store(probability, values);
      memcpy(to, values + excess[n], sizeof(float) * (kLanes - excess[n]));
    }
  }
}

// Which samples of row r of the patch lie beyond the limits.
EDGESEG_INLINE void mark_row(const Job& job, int32_t r, const Patch& patch) {
  const Floats above_limit = edgeseg::splat<Floats>(job.limits.above);
  const Floats below_limit = edgeseg::splat<Floats>(job.limits.below);
  const float* row = patch.row(r);
  for (int64_t w = 0; w < patch.words; ++w) {
    uint64_t above = 0;
    uint64_t below = 0;
    const int64_t end = std::min<int64_t>(patch.pitch, (w + 1) * 64);
    for (int64_t i = w * 64; i < end; i += kLanes) {
      const Floats probability = load<Floats>(row + i);
      above |= static_cast<uint64_t>(to_bits(probability > above_limit)) << (i % 64);
      below |= static_cast<uint64_t>(to_bits(probability < below_limit)) << (i % 64);
    }
    patch.above[r * patch.words + w] = above;
    patch.below[r * patch.words + w] = below;
  }
}

// The probabilities of instance k in its crop.
void fill_patch(const Job& job, int32_t k, Patch* patch) {
  constexpr int32_t kRows = 4;  // sums side by side, so that additions need not wait
  const float* coefficients = job.coefficients + static_cast<int64_t>(k) * job.planes.channels;
  for (int32_t i = 0; i < patch->columns; i += kLanes) {
    if (patch->rows < kRows) {
      for (int32_t r = 0; r < patch->rows; ++r) fill_vectors<1>(job, coefficients, r, i, *patch);
      continue;
    }
    for (int32_t r = 0; r < patch->rows; r += kRows) {
      // The last rows overlap the ones before rather than reach past the crop.
      fill_vectors<kRows>(job, coefficients, std::min(r, patch->rows - kRows), i, *patch);
    }
  }
  patch->close(job.height, job.width);
}

// Row r of the patch as levels 0 to 255.
void store_levels(const Patch& patch, int32_t r, uint8_t* to) {
  const float* row = patch.row(r) + 2;
  int32_t i = 0;
  for (; i + kLanes <= patch.columns; i += kLanes) {
    const Ints levels = edgeseg::mask_level(load<Floats>(row + i));
    store(__builtin_convertvector(levels, Bytes), to + i);
  }
  for (; i < patch.columns; ++i) to[i] = static_cast<uint8_t>(edgeseg::mask_level(row[i]));
}

// The bits of one group of pixels in `rows` rows from `row` on, between sample rows r and r + 1.
EDGESEG_INLINE void draw_group(const Job& job, const Patch& patch, int32_t r, int64_t group,
                               int32_t row, int32_t rows, const BitRows& target) {
  const float* near_row = patch.row(r);
  const float* far_row = patch.row(r + 1);
  Floats top[kGroupVectors];
  Floats bottom[kGroupVectors];
  for (int v = 0; v < kGroupVectors; ++v) {
    const int64_t at = group * kGroup + v * kLanes;
    Ints cell = load<Ints>(job.x_axis->cell.data() + at) - patch.left;
    // Cells outside of the crop have two samples of the border.
    const Ints last = Ints{} + (patch.columns + 2);
    cell = cell < 0 ? Ints{} : cell;
    cell = cell > last ? last : cell;
    const Floats near = load<Floats>(job.x_axis->near_weight.data() + at);
    const Floats far = load<Floats>(job.x_axis->far_weight.data() + at);
    top[v] = edgeseg::lerp(near, gather(near_row, cell), far, gather(near_row + 1, cell));
    bottom[v] = edgeseg::lerp(near, gather(far_row, cell), far, gather(far_row + 1, cell));
  }
  const float* y_near = job.y_axis->near_weight.data() + row;
  const float* y_far = job.y_axis->far_weight.data() + row;
  const Floats threshold = edgeseg::splat<Floats>(job.threshold);
  const int64_t byte = group * kGroupBytes - target.first_byte;
  const bool is_whole = group * kGroupBytes + kGroupBytes <= target.end_byte;
  for (int32_t i = 0; i < rows; ++i) {
    const Floats near = edgeseg::splat<Floats>(y_near[i]);
    const Floats far = edgeseg::splat<Floats>(y_far[i]);
    uint32_t bits = 0;
    for (int v = 0; v < kGroupVectors; ++v) {
      bits |= to_bits(edgeseg::lerp(near, top[v], far, bottom[v]) > threshold) << (v * kLanes);
    }
    uint8_t* to = target.row(i) + byte;
    to[0] = static_cast<uint8_t>(bits);
    if (kGroupBytes > 1 && is_whole) to[1] = static_cast<uint8_t>(bits >> 8);
  }
}

// What is known of a strip, the pixels between sample rows r and r + 1, before any arithmetic: a
// row of bits with the cells that are set (work->base), and the groups that need more.
EDGESEG_INLINE void decide_strip(const Job& job, const Patch& patch, int32_t r,
                                 const BitRows& target, Workspace* work) {
  const std::vector<int32_t>& begin = job.x_axis->begin;
  const int64_t words = patch.words;
  // The cells that see a sample of the crop, of those that there are.
  const int64_t first = std::max(1, -patch.left);
  const int64_t end = std::min(patch.columns + 2, job.width - patch.left);
  const uint64_t* above = patch.above + r * words;
  const uint64_t* below = patch.below + r * words;
  work->base.assign(target.end_byte - target.first_byte, 0);
  work->groups.clear();
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t cells = bits_between(w, first, end);
    uint64_t set = 0;
    uint64_t mixed = cells;
    if (job.short_cut) {
      const bool more = w + 1 < words;
      const uint64_t both_above = above[w] & above[w + words];
      const uint64_t both_below = below[w] & below[w + words];
      const uint64_t next_above = more ? above[w + 1] & above[w + 1 + words] : 0;
      const uint64_t next_below = more ? below[w + 1] & below[w + 1 + words] : 0;
      set = both_above & (both_above >> 1 | next_above << 63) & cells;
      mixed = cells & ~set & ~(both_below & (both_below >> 1 | next_below << 63));
    }
    work->set[w] = set;
    work->mixed[w] = mixed;
  }
  for_runs(work->set.data(), words, [&](int64_t from, int64_t to) {
    set_bits(work->base.data(), begin[from + patch.left] - target.first_byte * 8,
             begin[to + patch.left] - target.first_byte * 8);
  });
  int32_t next = 0;
  for_runs(work->mixed.data(), words, [&](int64_t from, int64_t to) {
    const int32_t from_column = begin[from + patch.left];
    const int32_t to_column = begin[to + patch.left];
    if (from_column == to_column) return;
    next = std::max(next, from_column / kGroup);
    for (; next * kGroup < to_column; ++next) work->groups.push_back(next);
  });
}

EDGESEG_INLINE void mark_patch(const Job& job, const Patch& patch, Workspace* work) {
  if (static_cast<int64_t>(work->set.size()) < patch.words) {
    work->set.resize(patch.words);
    work->mixed.resize(patch.words);
  }
  if (!job.short_cut) return;
  for (int32_t r = 0; r < patch.rows + 2; ++r) mark_row(job, r, patch);
}

// The mask's bits in the rows and bytes that it can reach, which `target` has.
void draw_bits(const Job& job, const Patch& patch, const BitRows& target, Workspace* work) {
  mark_patch(job, patch, work);
  const int32_t end = std::min(patch.crop.y.end, job.height);
  for (int32_t cell = std::max(patch.top, 0); cell < end; ++cell) {
    const int32_t row = job.y_axis->begin[cell];
    const int32_t rows = job.y_axis->begin[cell + 1] - row;
    if (rows == 0) continue;
    decide_strip(job, patch, cell - patch.top, target, work);
    BitRows strip = target;
    strip.data = target.row(row);
    strip.first_row = 0;
    for (int32_t i = 0; i < rows; ++i) {
      memcpy(strip.row(i), work->base.data(), work->base.size());
    }
    for (const int32_t group : work->groups) {
      draw_group(job, patch, cell - patch.top, group, row, rows, strip);
    }
  }
}

// Adds the turns between two rows in `count` bytes, a multiple of kStep; the first of them is pixel
// x of row y.
template <int32_t kStep>
EDGESEG_INLINE void add_turns(const uint8_t* before, const uint8_t* row, int64_t count, int32_t y,
                              int32_t x, std::vector<Turn>* turns) {
  static_assert(kStep <= 8, "as many bytes as a word has");
  for (int64_t byte = 0; byte < count; byte += kStep) {
    uint64_t old_bits = 0;
    uint64_t new_bits = 0;
    memcpy(&old_bits, before + byte, kStep);
    memcpy(&new_bits, row + byte, kStep);
    uint64_t changed = old_bits ^ new_bits;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    changed = __builtin_bswap64(changed);
#endif
    while (changed != 0) {
      const int32_t bit = __builtin_clzll(changed);
      changed &= ~(uint64_t{1} << (63 - bit));
      turns->push_back({y, static_cast<int32_t>(x + byte * 8 + bit)});
    }
  }
}

// All turns of the mask; those of a column from top to bottom.
void find_turns(const Job& job, const Patch& patch, Workspace* work) {
  mark_patch(job, patch, work);
  const Span columns = job.x_axis->axis.positions_of(patch.crop.x);
  const int64_t first = columns.begin / kGroup * kGroupBytes;
  const int64_t bytes = round_up(round_up(columns.end, kGroup) / 8 - first, 8);
  const int32_t x = static_cast<int32_t>(first * 8);
  // Row 0 is the one above the strip.
  work->rows.assign((kStripRows + 1) * bytes, 0);
  const BitRows strip = {work->rows.data() + bytes, bytes, first, first + bytes, 0};
  const int32_t end = std::min(patch.crop.y.end, job.height);
  int32_t row = 0;
  for (int32_t cell = std::max(patch.top, 0); cell < end; ++cell) {
    const int32_t row_end = job.y_axis->begin[cell + 1];
    row = job.y_axis->begin[cell];
    if (row == row_end) continue;
    decide_strip(job, patch, cell - patch.top, strip, work);
    // Below a strip's first row, only groups with a mixed cell change.
    for (int32_t begin = 1; row < row_end; begin = 0) {
      const int32_t rows = std::min(row_end - row, kStripRows);
      for (int32_t i = 0; i < rows; ++i) {
        memcpy(strip.row(i), work->base.data(), work->base.size());
      }
      for (const int32_t group : work->groups) {
        draw_group(job, patch, cell - patch.top, group, row, rows, strip);
      }
      if (begin == 1) add_turns<8>(strip.row(-1), strip.row(0), bytes, row, x, &work->turns);
      for (const int32_t group : work->groups) {
        const int64_t byte = group * kGroupBytes - first;
        for (int32_t i = begin; i < rows; ++i) {
          add_turns<kGroupBytes>(strip.row(i - 1) + byte, strip.row(i) + byte, kGroupBytes, row + i,
                                 group * kGroup, &work->turns);
        }
      }
      memcpy(strip.row(-1), strip.row(rows - 1), bytes);
      row += rows;
    }
  }
  memset(strip.row(0), 0, bytes);
  add_turns<8>(strip.row(-1), strip.row(0), bytes, row, x, &work->turns);
}

constexpr Loops kLoops = {kLanes, fill_patch, store_levels, draw_bits, find_turns};

}  // namespace EDGESEG_ISA
}  // namespace
