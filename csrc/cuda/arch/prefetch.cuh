// Hints about what will be read.
#pragma once

#include <cuda_runtime.h>

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// The line at this address of global memory, which must exist, will soon be read: let L2 have it.
inline void prefetch_l2(const void* global, Here here = {}) { emulator::prefetch(global, here); }

#else

__device__ inline void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

#endif

}  // namespace fomoe::cuda
