// refine_borders on the CPU: uncertain pixels one after the other, each with its own small poll.

#include "edgeseg/refine_borders.h"

#include <stdint.h>

#include <algorithm>

#include "exports.h"
#include "threads.h"

namespace {

using edgeseg::kBadArgument;
using edgeseg::kOk;
using edgeseg::kReach;
using edgeseg::kVoters;

constexpr int32_t kMaxSide = 1 << 22;

struct Job {
  const uint8_t* class_map;  // (height, width)
  const uint8_t* frame;      // (height, width, 3), rows `pitch` bytes apart
  int64_t pitch;
  int32_t height, width, step_y, step_x;
  const int64_t* uncertain;
  uint8_t* refined;
};

// Pixels `begin` to `end` - 1 of the uncertain ones.
int32_t refine(const Job& job, int64_t begin, int64_t end) {
  int32_t votes[256] = {};
  uint8_t candidates[kVoters];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t at = job.uncertain[index];
    if (at < 0 || at >= static_cast<int64_t>(job.height) * job.width) return kBadArgument;
    const int64_t y = at / job.width, x = at % job.width;
    const uint8_t* colour = job.frame + y * job.pitch + 3 * x;
    int32_t count = 0;
    for (int32_t i = -kReach; i <= kReach; ++i) {
      const int64_t row = y + static_cast<int64_t>(i) * job.step_y;
      if (row < 0 || row >= job.height) continue;
      const uint8_t* classes = job.class_map + row * job.width;
      const uint8_t* colours = job.frame + row * job.pitch;
      for (int32_t j = -kReach; j <= kReach; ++j) {
        const int64_t column = x + static_cast<int64_t>(j) * job.step_x;
        if (column < 0 || column >= job.width) continue;
        const int32_t distance = edgeseg::colour_distance(colour, colours + 3 * column);
        const int32_t weight = edgeseg::vote_weight(distance, i, j);
        const uint8_t label = classes[column];
        // A class that nobody has voted for yet is a new candidate.
        candidates[count] = label;
        count += weight > 0 && votes[label] == 0 ? 1 : 0;
        votes[label] += weight;
      }
    }
    const uint8_t before = job.class_map[at];
    // The pixel is its own neighbour, so that its class has votes.
    uint8_t best = before;
    for (int32_t i = 0; i < count; ++i) {
      const uint8_t candidate = candidates[i];
      if (edgeseg::wins(votes[candidate], candidate, votes[best], best, before)) best = candidate;
    }
    for (int32_t i = 0; i < count; ++i) votes[candidates[i]] = 0;
    job.refined[at] = best;
  }
  return kOk;
}

}  // namespace

// refine_borders; the definition is in edgeseg/refine_borders.h.
//   class_map  (height, width) uint8, contiguous
//   frame      (height, width, 3) uint8 BGR, rows `pitch` bytes apart
//   step_y, step_x  1 to kMaxSide, rows and columns from one sample to the next
//   uncertain  (count,) positions in the class map, row after row, each at most once
//   refined    (height, width) uint8, contiguous; written where the positions are
//   threads    at least 1
// Returns 0, or 1 for an argument outside its bounds.
EDGESEG_EXPORT int32_t edgeseg_refine_borders(const uint8_t* class_map, const uint8_t* frame,
                                              int64_t pitch, int32_t height, int32_t width,
                                              int32_t step_y, int32_t step_x,
                                              const int64_t* uncertain, int64_t count,
                                              uint8_t* refined, int32_t threads) {
  if (class_map == nullptr || frame == nullptr || refined == nullptr || height < 1 || width < 1 ||
      height > kMaxSide || width > kMaxSide || pitch < 3 * static_cast<int64_t>(width) ||
      step_y < 1 || step_x < 1 || step_y > kMaxSide || step_x > kMaxSide || count < 0 ||
      (count > 0 && uncertain == nullptr) || threads < 1) {
    return kBadArgument;
  }
  const Job job = {class_map, frame, pitch, height, width, step_y, step_x, uncertain, refined};
  // A few pixels are not worth another thread.
  const int64_t wanted = std::min<int64_t>(count / 1024 + 1, 4LL * threads);
  const int32_t chunks = threads == 1 ? 1 : static_cast<int32_t>(wanted);
  return edgeseg::for_chunks(
      [&](int32_t chunk) {
        return refine(job, count * chunk / chunks, count * (chunk + 1) / chunks);
      },
      chunks, threads);
}
