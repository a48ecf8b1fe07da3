// The rule of refine_borders: the classes of uncertain pixels, decided again by the picture. All of
// it is integers, so that every way to compute it gives the same.
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

namespace edgeseg {

constexpr int32_t kReach = 3;          // samples to each side
constexpr int32_t kLikeColours = 60;   // the distance of colours from which on a sample is no kin
constexpr int32_t kCloseSamples = 20;  // above the largest i * i + j * j, so that all samples vote
constexpr int32_t kVoters = (2 * kReach + 1) * (2 * kReach + 1);

}  // namespace edgeseg

#endif  // EDGESEG_REFINE_BORDERS_H_
