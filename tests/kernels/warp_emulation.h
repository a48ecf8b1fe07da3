// Enough of CUDA to run upsample_argmax.cu on a CPU, one warp per block: each lane is a fiber that
// runs to its next warp-wide call, where it waits for the other 31. A lane that leaves early, or
// meets the others at a different call, ends the program: on a GPU that would hang or be undefined.
//
// Include before the .cu file (g++ -x c++ -include warp_emulation.h).

#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace warp_emulation {

constexpr int kLanes = 32;

enum class Call { kNone, kBallot, kShuffle, kSync };

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  Call call = Call::kNone;
  uint32_t given = 0;
  bool done = false;
};

inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int running;
inline std::function<void()> body;

inline void fail(const char* what) {
  fprintf(stderr, "warp_emulation: %s\n", what);
  abort();
}

inline void meet(Call call, uint32_t given = 0) {
  const int self = running;
  lanes[self].call = call;
  if (call != Call::kSync) lanes[self].given = given;
  swapcontext(&lanes[self].context, &scheduler);
}

inline void start() {
  body();
  lanes[running].done = true;
}

inline void run_block() {
  for (Lane& lane : lanes) {
    lane.done = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, start, 0);
  }
  for (;;) {
    int finished = 0;
    for (running = 0; running < kLanes; ++running) {
      threadIdx.x = static_cast<unsigned>(running);
      lanes[running].call = Call::kNone;
      swapcontext(&scheduler, &lanes[running].context);
      finished += lanes[running].done;
      if (lanes[running].call != lanes[0].call) fail("lanes meet at different calls");
    }
    if (finished == kLanes) return;
    if (finished != 0) fail("a lane left while others wait");
  }
}

template <class Body>
void launch(unsigned blocks, Body kernel) {
  body = kernel;
  gridDim.x = blocks;
  blockDim.x = kLanes;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block();
}

}  // namespace warp_emulation

// What a call gives back must be read before any lane reaches its next call and gives anew, and
// that lane may run first: hence a second meeting.
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  using namespace warp_emulation;
  meet(Call::kBallot, vote);
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= lanes[i].given << i;
  meet(Call::kSync);
  return result;
}

inline uint32_t __shfl_sync(uint32_t, uint32_t value, int source) {
  using namespace warp_emulation;
  meet(Call::kShuffle, value);
  const uint32_t result = lanes[source].given;
  meet(Call::kSync);
  return result;
}

inline void __syncwarp() { warp_emulation::meet(warp_emulation::Call::kSync); }

inline int __ffs(int value) { return __builtin_ffs(value); }
