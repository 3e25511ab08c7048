// Prefetches.
#pragma once

#include <cuda_runtime.h>

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// Prefetches the line at this address of global memory, which must be valid, into L2.
inline void prefetch_l2(const void* global, Here here = {}) { emulator::prefetch(global, here); }

#else

__device__ inline void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

#endif

}  // namespace fomoe::cuda
