// The loops of refine_borders for one instruction set. Included by refine_borders.cpp only, once
// per set, with EDGESEG_ISA (the namespace) and EDGESEG_LANES (floats per vector); no include
// guard.

namespace {
namespace EDGESEG_ISA {

// Votes have 16 bits: all of a pixel's together are at most 35280.
constexpr int32_t kLanes = 2 * EDGESEG_LANES;
static_assert(kLanes <= kMostLanes, "margins are as wide as a block");

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Votes __attribute__((vector_size(2 * kLanes)));

EDGESEG_INLINE Shorts widened(const uint8_t* from) {
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Shorts);
}

EDGESEG_INLINE Shorts distance(Shorts a, Shorts b) {
  const Shorts difference = a - b;
  return difference < 0 ? -difference : difference;
}

// Marks in `present` the classes in `count` bytes at `classes`; `last` is the one seen last.
EDGESEG_INLINE void mark(const uint8_t* classes, int64_t count, bool* present, uint8_t& last) {
  int64_t i = 0;
  while (i < count) {
    if (i + 8 <= count) {
      uint64_t eight;
      memcpy(&eight, classes + i, 8);
      if (eight == last * 0x0101010101010101ull) {
        i += 8;
        continue;
      }
    }
    for (const int64_t end = std::min(i + 8, count); i < end; ++i) {
      last = classes[i];
      present[last] = true;
    }
  }
}

// The new classes of the kLanes pixels from column `x` of row `y` on.
EDGESEG_INLINE void refine_block(const Job& job, int64_t y, int64_t x, uint8_t* refined) {
  const Planes& planes = *job.planes;
  const int64_t centre = y * planes.row + planes.margin + x;
  const int16_t* inside = planes.inside.data() + planes.margin + x;
  const uint8_t* classes = planes.classes.data();
  const uint8_t* channels[3];
  Shorts colour[3];
  for (int32_t channel = 0; channel < 3; ++channel) {
    channels[channel] = planes.channels[channel].data();
    colour[channel] = widened(channels[channel] + centre);
  }

  // The weight of each vote, and where its class stands.
  Votes weights[kVoters];
  int64_t voters[kVoters];
  int32_t count = 0;
  bool present[256] = {};
  uint8_t last = classes[centre];
  present[last] = true;
  const int64_t reach = static_cast<int64_t>(kReach) * job.step_x;
  const int64_t first = std::max<int64_t>(x - reach, 0);
  const int64_t end = std::min<int64_t>(x + kLanes + reach, job.width);
  for (int32_t i = -kReach; i <= kReach; ++i) {
    const int64_t row = y + static_cast<int64_t>(i) * job.step_y;
    if (row < 0 || row >= job.height) continue;
    const int64_t start = row * planes.row + planes.margin;
    mark(classes + start + first, end - first, present, last);
    for (int32_t j = -kReach; j <= kReach; ++j) {
      const int64_t shift = static_cast<int64_t>(j) * job.step_x;
      const int64_t at = start + x + shift;
      const Shorts likeness = edgeseg::kLikeColours -
                              distance(widened(channels[0] + at), colour[0]) -
                              distance(widened(channels[1] + at), colour[1]) -
                              distance(widened(channels[2] + at), colour[2]);
      Shorts counts;
      memcpy(&counts, inside + shift, sizeof counts);
      counts = likeness > 0 ? counts : 0;
      const int16_t closeness = static_cast<int16_t>(edgeseg::kCloseSamples - i * i - j * j);
      weights[count] = reinterpret_cast<Votes>(likeness * closeness & counts);
      voters[count++] = at;
    }
  }

  // From the lowest class on, so that it wins a tie, unless the pixel had one of the others.
  const Shorts before = widened(classes + centre);
  Shorts best = before;
  Votes most = {};
  for (int32_t label = 0; label < 256; ++label) {
    if (!present[label]) continue;
    const Shorts wanted = Shorts{} + static_cast<int16_t>(label);
    Votes votes = {};
    for (int32_t voter = 0; voter < count; ++voter) {
      const Shorts agrees = widened(classes + voters[voter]) == wanted;
      votes += weights[voter] & reinterpret_cast<Votes>(agrees);
    }
    const Shorts wins = (votes > most) | ((votes == most) & (before == wanted));
    best = wins ? wanted : best;
    most = wins ? votes : most;
  }
  const Bytes narrow = __builtin_convertvector(best, Bytes);
  memcpy(refined, &narrow, sizeof narrow);
}

// Pixels `begin` to `end` - 1 of the uncertain ones.
int32_t refine_range(const Job& job, int64_t begin, int64_t end) {
  const int64_t pixels = static_cast<int64_t>(job.height) * job.width;
  uint8_t refined[kLanes];
  for (int64_t index = begin; index < end;) {
    const int64_t at = job.uncertain[index];
    if (at < 0 || at >= pixels) return kBadArgument;
    const int64_t x = at % job.width;
    refine_block(job, at / job.width, x, refined);
    const int64_t lanes = std::min<int64_t>(kLanes, job.width - x);
    for (; index < end; ++index) {
      const int64_t lane = job.uncertain[index] - at;
      if (lane < 0 || lane >= lanes) break;
      job.refined[at + lane] = refined[lane];
    }
  }
  return kOk;
}

}  // namespace EDGESEG_ISA
}  // namespace
