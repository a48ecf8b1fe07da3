// Work cut into chunks that the calling thread and a pool of helpers take.

#ifndef EDGESEG_CPU_THREADS_H_
#define EDGESEG_CPU_THREADS_H_

#include <stdint.h>

namespace edgeseg {

// Does chunk `chunk` of the work at `job`; returns kOk or another code of exports.h.
using DoChunk = int32_t (*)(const void* job, int32_t chunk);

// Runs chunks 0 to chunks - 1 on at most `threads` threads, the caller's among them, and returns
// when all are done: kOk, or the code of a chunk that failed. Exceptions of `work` other than
// std::bad_alloc (kOutOfMemory) end the process.
int32_t run_chunks(DoChunk work, const void* job, int32_t chunks, int32_t threads) noexcept;

// The same for a callable: int32_t (int32_t chunk) const.
template <class Work>
int32_t for_chunks(const Work& work, int32_t chunks, int32_t threads) noexcept {
  return run_chunks(
      [](const void* job, int32_t chunk) { return (*static_cast<const Work*>(job))(chunk); }, &work,
      chunks, threads);
}

}  // namespace edgeseg

#endif  // EDGESEG_CPU_THREADS_H_
