// What every launcher has in common: sizes of grids, and the launch itself.
//
// The .cu files also compile as plain C++ on an emulation of CUDA, for tests on a machine without a
// GPU: whoever does that defines EDGESEG_CUDA_EMULATION and gives cuda_emulation.h.

#ifndef EDGESEG_CUDA_LAUNCH_H_
#define EDGESEG_CUDA_LAUNCH_H_

#include <stdint.h>

#include <algorithm>
#include <atomic>

#include "edgeseg/host_device.h"
#include "edgeseg/launchers.h"

#if defined(EDGESEG_CUDA_EMULATION)
#include "cuda_emulation.h"
#define EDGESEG_LAUNCH(kernel, blocks, threads, stream, ...) \
  cuda_emulation::launch(kernel, blocks, threads, __VA_ARGS__)
#else
#include <cuda_runtime.h>
#define EDGESEG_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace edgeseg {

constexpr int kMaxDevices = 64;

// Multiprocessors of the current device, which is asked once.
inline cudaError_t processors_here(int32_t* processors) {
  static std::atomic<int32_t> processors_of[kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  *processors = device < kMaxDevices ? processors_of[device].load() : 0;
  if (*processors != 0) return cudaSuccess;
  int found = 0;
  error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  *processors = std::max(found, 1);
  if (device < kMaxDevices) processors_of[device].store(*processors);
  return cudaSuccess;
}

// Blocks of `threads` for a kernel with grid-stride loops: `wanted`, or fewer when the device
// cannot hold so many at once. The device is asked once for each kernel.
template <auto Kernel>
cudaError_t blocks_for(int64_t wanted, int32_t threads, unsigned* blocks) {
  static std::atomic<int32_t> most_on[kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  int32_t most = device < kMaxDevices ? most_on[device].load() : 0;
  if (most == 0) {
    int32_t processors = 0;
    int blocks_each = 0;
    error = processors_here(&processors);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, Kernel, threads, 0);
    if (error != cudaSuccess) return error;
    most = std::max(processors * blocks_each, 1);
    if (device < kMaxDevices) most_on[device].store(most);
  }
  *blocks = static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, most));
  return cudaSuccess;
}

EDGESEG_HD int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Queues a kernel with as many blocks as `wanted` and the device allow; returns what CUDA says. A
// pending error of someone else's call is not reported as this one's. With Rounds, there may be so
// many times the blocks that the device can hold: for blocks of uneven work, which the device then
// hands out as processors become free.
template <auto Kernel, int Rounds = 1, class... Arguments>
int32_t launch(int64_t wanted, int32_t threads, void* stream, const Arguments&... arguments) {
  (void)stream;
  unsigned most = 0;
  const cudaError_t error = blocks_for<Kernel>(INT64_MAX, threads, &most);
  if (error != cudaSuccess) return error;
  const unsigned blocks =
      static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, int64_t{most} * Rounds));
  (void)cudaGetLastError();
  EDGESEG_LAUNCH(Kernel, blocks, static_cast<unsigned>(threads), stream, arguments...);
  return cudaGetLastError();
}

}  // namespace edgeseg

#endif  // EDGESEG_CUDA_LAUNCH_H_
