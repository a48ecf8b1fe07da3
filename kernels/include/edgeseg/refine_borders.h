// The arithmetic of refine_borders: the classes of uncertain pixels, decided again by the picture.
//
// Everything that decides a result is here, once, and all of it is integers.
//
// Definition, for an uncertain pixel: each of the (2 kReach + 1)^2 samples around it, step_y rows
// and step_x columns apart, votes for the class that it had before, with the weight
//   max(60 - |db| - |dg| - |dr|, 0) * (20 - i * i - j * j)
// where db, dg, dr are the differences of the colours and i, j count steps. Samples outside of the
// picture do not vote. The class with most votes wins; on a tie the one that the pixel had, if it
// is among the best, and otherwise the lowest.
//
// This is the joint bilateral filter of the one-hot class maps (Petschnig et al., 2004, "Digital
// Photography with Flash and No-Flash Image Pairs"), sampled, with piecewise linear weights in
// place of Gaussians.

#ifndef EDGESEG_REFINE_BORDERS_H_
#define EDGESEG_REFINE_BORDERS_H_

#include <stdint.h>

#include "edgeseg/host_device.h"

namespace edgeseg {

constexpr int32_t kReach = 3;          // samples to each side
constexpr int32_t kLikeColours = 60;   // the distance of colours from which on a sample is no kin
constexpr int32_t kCloseSamples = 20;  // above the largest i * i + j * j, so that all samples vote
constexpr int32_t kVoters = (2 * kReach + 1) * (2 * kReach + 1);

// Distance of two BGR colours, 0 to 765.
EDGESEG_HD int32_t colour_distance(const uint8_t* a, const uint8_t* b) {
  int32_t distance = 0;
  for (int32_t channel = 0; channel < 3; ++channel) {
    const int32_t difference = a[channel] - b[channel];
    distance += difference < 0 ? -difference : difference;
  }
  return distance;
}

// The weight of a vote; `i` and `j` from -kReach to kReach.
EDGESEG_HD int32_t vote_weight(int32_t distance, int32_t i, int32_t j) {
  return distance < kLikeColours ? (kLikeColours - distance) * (kCloseSamples - i * i - j * j) : 0;
}

// Whether `candidate` takes the place of `best` as the class of a pixel that was `before`.
EDGESEG_HD bool wins(int32_t candidate_votes, int32_t candidate, int32_t best_votes, int32_t best,
                     int32_t before) {
  if (candidate_votes != best_votes) return candidate_votes > best_votes;
  return best != before && (candidate == before || candidate < best);
}

}  // namespace edgeseg

#endif  // EDGESEG_REFINE_BORDERS_H_
