// The loops of EdgeSegPyramidRoiAlign for one instruction set. Included by pyramid_roi_align.cpp
// only, once per set, with EDGESEG_ISA (the namespace) and EDGESEG_LANES (floats per vector); no
// include guard.

namespace {
namespace EDGESEG_ISA {

constexpr int32_t kLanes = EDGESEG_LANES;

typedef float Floats __attribute__((vector_size(4 * EDGESEG_LANES)));
typedef float Quad __attribute__((vector_size(16)));

// to[0] to to[N * lanes - 1]: the sum over `taps` of weight * source[tap], each sum from 0.
template <class Vector, int N>
EDGESEG_INLINE void mix_vectors(const float* source, const Tap* taps, int32_t count, float* to) {
  constexpr int32_t kWide = sizeof(Vector) / sizeof(float);
  Vector sum[N] = {};
  for (int32_t t = 0; t < count; ++t) {
    const float* from = source + taps[t].offset;
    for (int n = 0; n < N; ++n) {
      Vector values;
      memcpy(&values, from + n * kWide, sizeof values);
      sum[n] += taps[t].weight * values;
    }
  }
  memcpy(to, sum, sizeof sum);
}

// The same for any number of neighbours; reads nothing after them.
EDGESEG_INLINE void mix(const float* source, const Tap* taps, int32_t count, int32_t neighbours,
                        float* to) {
  int32_t i = 0;
  for (; i + 2 * kLanes <= neighbours; i += 2 * kLanes) {
    mix_vectors<Floats, 2>(source + i, taps, count, to + i);
  }
  for (; i + kLanes <= neighbours; i += kLanes) {
    mix_vectors<Floats, 1>(source + i, taps, count, to + i);
  }
  for (; i + 4 <= neighbours; i += 4) mix_vectors<Quad, 1>(source + i, taps, count, to + i);
  for (; i < neighbours; ++i) {
    float sum = 0.0f;
    for (int32_t t = 0; t < count; ++t) sum += taps[t].weight * source[taps[t].offset + i];
    to[i] = sum;
  }
}

#if EDGESEG_LANES == 16
// A row of at most 16 bins from at most 32 columns, which are in two registers: a permutation picks
// the columns of all bins at once.
EDGESEG_INLINE void mix_row(const PaddedTaps& taps, const float* columns, float* to) {
  const __m512 low = _mm512_loadu_ps(columns);
  const __m512 high = _mm512_loadu_ps(columns + 16);
  __m512 sum = _mm512_setzero_ps();
  for (int32_t t = 0; t < taps.count; ++t) {
    const __m512i column = _mm512_load_si512(taps.column + t * kPaddedBins);
    // A bin without this tap gets 0 times 0, whatever is in the columns.
    const __m512 picked = _mm512_maskz_permutex2var_ps(taps.present[t], low, column, high);
    const __m512 weight = _mm512_load_ps(taps.weight + t * kPaddedBins);
    sum = _mm512_add_ps(sum, _mm512_mul_ps(weight, picked));
  }
  _mm512_mask_storeu_ps(to, taps.bins, sum);
}
#endif

// Channels first: each channel is a plane. Columns are summed over their rows, all columns side by
// side, and bins then over their columns.
void pool_planes(const Tables& roi, int32_t channels, int64_t channel_stride, const float* from,
                 Workspace* work, float* to) {
  float* columns = work->columns.data();
  const int32_t bins = roi.x.bins();
#if EDGESEG_LANES == 16
  const bool fits = roi.padded.count > 0;
#endif
  for (int32_t c = 0; c < channels; ++c) {
    const float* plane = from + c * channel_stride;
    for (int32_t row = 0; row < roi.y.bins(); ++row, to += bins) {
      mix(plane + roi.first_column, roi.y.taps(row), roi.y.count(row), roi.columns, columns);
#if EDGESEG_LANES == 16
      if (fits) {
        mix_row(roi.padded, columns, to);
        continue;
      }
#endif
      for (int32_t bin = 0; bin < bins; ++bin) {
        const Tap* taps = roi.x.taps(bin);
        float sum = 0.0f;
        for (int32_t t = 0; t < roi.x.count(bin); ++t) {
          sum += taps[t].weight * columns[taps[t].offset];
        }
        to[bin] = sum;
      }
    }
  }
}

// Channels last: the same sums, for all channels side by side, then turned to channels first.
void pool_pixels(const Tables& roi, int32_t channels, int64_t pixel_stride, const float* from,
                 Workspace* work, float* to) {
  float* columns = work->columns.data();
  float* tile = work->tile.data();
  const int32_t bins = roi.x.bins() * roi.y.bins();
  for (int32_t row = 0; row < roi.y.bins(); ++row) {
    for (int32_t x = 0; x < roi.columns; ++x) {
      mix(from + (roi.first_column + x) * pixel_stride, roi.y.taps(row), roi.y.count(row), channels,
          columns + x * kChannelsAtOnce);
    }
    for (int32_t bin = 0; bin < roi.x.bins(); ++bin) {
      mix(columns, roi.x.taps(bin), roi.x.count(bin), channels,
          tile + (row * roi.x.bins() + bin) * kChannelsAtOnce);
    }
  }
  for (int32_t c = 0; c < channels; ++c) {
    for (int32_t bin = 0; bin < bins; ++bin) *to++ = tile[bin * kChannelsAtOnce + c];
  }
}

}  // namespace EDGESEG_ISA
}  // namespace
