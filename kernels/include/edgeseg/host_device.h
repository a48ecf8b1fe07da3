// How the arithmetic is written once for the CPU and the GPU.

#ifndef EDGESEG_HOST_DEVICE_H_
#define EDGESEG_HOST_DEVICE_H_

#if defined(__CUDACC__)
#define EDGESEG_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined, so that the code takes on the instruction set of the loop that calls it.
#define EDGESEG_HD inline __attribute__((always_inline))
#else
#define EDGESEG_HD inline
#endif

#endif  // EDGESEG_HOST_DEVICE_H_
