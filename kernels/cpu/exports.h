// What every source of the CPU library has in common.

#ifndef EDGESEG_CPU_EXPORTS_H_
#define EDGESEG_CPU_EXPORTS_H_

#include <stdint.h>

#if !defined(__GNUC__)
#error "EdgeSeg's CPU library needs GCC or Clang"
#endif

#define EDGESEG_EXPORT extern "C" __attribute__((visibility("default")))
#define EDGESEG_INLINE inline __attribute__((always_inline))

// Between the two, functions are compiled for one instruction set of x86-64.
#if defined(__x86_64__)
#define EDGESEG_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EDGESEG_TARGET(isa) \
  EDGESEG_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(clang attribute pop)
#else
#define EDGESEG_TARGET(isa) EDGESEG_PRAGMA(GCC push_options) EDGESEG_PRAGMA(GCC target(isa))
#define EDGESEG_TARGET_END EDGESEG_PRAGMA(GCC pop_options)
#endif
#endif

namespace edgeseg {

// What an entry point returns.
constexpr int32_t kOk = 0;
constexpr int32_t kBadArgument = 1;
constexpr int32_t kOutOfMemory = 2;

// Flags that choose the code of an entry point, for tests; the fastest otherwise.
constexpr int32_t kPortableCode = 4;  // the code that runs anywhere
constexpr int32_t kAvx2Code = 8;      // at most AVX2

enum class Isa { kPortable, kAvx2, kAvx512 };

// The widest instruction set that this processor has and the flags allow.
Isa chosen_isa(int32_t flags);

}  // namespace edgeseg

#endif  // EDGESEG_CPU_EXPORTS_H_
