// Includes the file named by EDGESEG_LOOPS once per instruction set, with EDGESEG_ISA (the
// namespace it puts its code in: portable, avx2, avx512) and EDGESEG_LANES (floats per vector). No
// include guard.
//
// The arithmetic's headers are included again each time, by the loops, because GCC takes vectors
// apart in functions that were defined outside the target region, even when they are inlined into
// it.

#include "exports.h"

#define EDGESEG_ISA portable
#define EDGESEG_LANES 4
#include EDGESEG_LOOPS
#undef EDGESEG_ISA
#undef EDGESEG_LANES

#if defined(__x86_64__)
EDGESEG_TARGET("avx2")
#define EDGESEG_ISA avx2
#define EDGESEG_LANES 8
#include EDGESEG_LOOPS
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END

EDGESEG_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#define EDGESEG_ISA avx512
#define EDGESEG_LANES 16
#include EDGESEG_LOOPS
#undef EDGESEG_ISA
#undef EDGESEG_LANES
EDGESEG_TARGET_END
#endif

#undef EDGESEG_LOOPS
