// What the CUDA library says about itself.

#include "edgeseg/launchers.h"

namespace {
constexpr int32_t kAbiVersion = 2;  // kernels/launchers.py has the same number
}

EDGESEG_LAUNCHER edgeseg_cuda_abi_version(void) { return kAbiVersion; }
