// Enough of CUDA to run the .cu files on a CPU, one block after the other: each thread is a fiber
// that runs to its next warp-wide or block-wide call, where it waits for the others. A thread that
// leaves early, or meets the others at a different call, ends the program: on a GPU that would hang
// or be undefined.
//
// kernels/cuda/launch.h includes this where EDGESEG_CUDA_EMULATION is defined
// (g++ -x c++ -DEDGESEG_CUDA_EMULATION -Itests/kernels).

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

using std::max;
using std::min;

#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned its_x = 1, unsigned its_y = 1, unsigned its_z = 1)
      : x(its_x), y(its_y), z(its_z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
// One block at a time on one processor, so that grid-stride loops go round.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1, cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 3, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
typedef void* cudaStream_t;
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_emulation {

constexpr int kWarp = 32;

enum class Call { kNone, kBallot, kShuffle, kWarpSync, kBlockSync };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Call call = Call::kNone;
  uint32_t given = 0;
  bool done = false;
  static constexpr size_t kStack = 128 * 1024;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int running;
inline std::function<void()> body;

inline void fail(const char* what) {
  fprintf(stderr, "cuda_emulation: %s\n", what);
  abort();
}

inline void meet(Call call, uint32_t given = 0) {
  Thread& self = threads[running];
  self.call = call;
  if (call == Call::kBallot || call == Call::kShuffle) self.given = given;
  swapcontext(&self.context, &scheduler);
}

inline uint32_t given_by(int lane) { return threads[running / kWarp * kWarp + lane].given; }

inline int lanes_here() {
  return std::min(kWarp, static_cast<int>(threads.size()) - running / kWarp * kWarp);
}

inline void start() {
  body();
  threads[running].done = true;
}

// Lets each thread of a warp run to its next meeting; false once they have all left.
inline bool advance_warp(int first, int last) {
  int finished = 0;
  for (running = first; running < last; ++running) {
    threadIdx.x = static_cast<unsigned>(running);
    threads[running].call = Call::kNone;
    if (!threads[running].done) swapcontext(&scheduler, &threads[running].context);
    finished += threads[running].done;
    if (threads[running].call != threads[first].call) fail("lanes meet at different calls");
  }
  if (finished != 0 && finished != last - first) fail("a lane left while others wait");
  return finished == 0;
}

inline void run_block() {
  const int count = static_cast<int>(threads.size());
  for (Thread& thread : threads) {
    thread.done = false;
    thread.call = Call::kNone;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, start, 0);
  }
  for (;;) {
    int warps = 0;
    int left = 0;
    for (int first = 0; first < count; first += kWarp, ++warps) {
      const int last = std::min(first + kWarp, count);
      bool here = true;
      do {
        here = advance_warp(first, last);
      } while (here && threads[first].call != Call::kBlockSync);
      left += !here;
    }
    if (left == warps) return;
    if (left != 0) fail("a warp left while others wait");
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 blocks, dim3 block, const Arguments&... arguments) {
  body = [&] { kernel(arguments...); };
  threads = std::vector<Thread>(block.x);
  gridDim = blocks;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) run_block();
    }
  }
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline uint32_t bits_of(uint32_t value) { return value; }
inline uint32_t bits_of(int32_t value) { return static_cast<uint32_t>(value); }

// What a call gives back must be read before any lane reaches its next call and gives anew, and
// that lane may run first: hence a second meeting.
template <class Value>
Value shuffled(Value value, int source) {
  meet(Call::kShuffle, bits_of(value));
  const uint32_t bits = given_by(source % kWarp);
  meet(Call::kWarpSync);
  Value result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace cuda_emulation

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  using namespace cuda_emulation;
  meet(Call::kBallot, vote);
  uint32_t result = 0;
  for (int i = 0; i < lanes_here(); ++i) result |= given_by(i) << i;
  meet(Call::kWarpSync);
  return result;
}
inline int __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }

template <class Value>
Value __shfl_sync(uint32_t, Value value, int source) {
  return cuda_emulation::shuffled(value, source);
}
template <class Value>
Value __shfl_xor_sync(uint32_t, Value value, int other) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_emulation::kWarp;
  return cuda_emulation::shuffled(value, lane ^ other);
}
template <class Value>
Value __shfl_down_sync(uint32_t, Value value, int by) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_emulation::kWarp;
  return cuda_emulation::shuffled(value, lane + by < cuda_emulation::kWarp ? lane + by : lane);
}

inline void __syncwarp() { cuda_emulation::meet(cuda_emulation::Call::kWarpSync); }
inline void __syncthreads() { cuda_emulation::meet(cuda_emulation::Call::kBlockSync); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  }
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __dp2a_lo(uint32_t pair, uint32_t bytes, uint32_t sum) {
  return (pair & 0xffff) * (bytes & 255) + (pair >> 16) * (bytes >> 8 & 255) + sum;
}
inline uint32_t __dp2a_hi(uint32_t pair, uint32_t bytes, uint32_t sum) {
  return __dp2a_lo(pair, bytes >> 16, sum);
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
template <class Value>
Value __ldg(const Value* from) {
  return *from;
}
inline float __saturatef(float value) {
  return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}

template <class Value>
Value atomicAdd(Value* to, Value value) {
  const Value old = *to;
  *to = old + value;
  return old;
}
inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
  const uint32_t old = *to;
  *to = old | bits;
  return old;
}
template <class Value>
Value atomicMin(Value* to, Value value) {
  const Value old = *to;
  *to = std::min(old, value);
  return old;
}
template <class Value>
Value atomicMax(Value* to, Value value) {
  const Value old = *to;
  *to = std::max(old, value);
  return old;
}
