// Facts that the compiler does not derive by itself.
#pragma once

#include <cuda_runtime.h>

#ifdef FOMOE_EMULATED
#include "emulator.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// Tells that `value` is the same in all lanes, so that code that depends on it runs once for the warp.
// Called by the whole warp.
inline int warp_uniform(int value, Here here = {}) { return emulator::warp_uniform(value, here); }
// Makes `pointer` opaque: the compiler does not recompute it from its summands for each access.
inline void keep_whole(const unsigned char*&) {}

#else

__device__ inline int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ inline void keep_whole(const unsigned char*& pointer) {
  asm volatile("" : "+l"(pointer));
}

#endif

}  // namespace fomoe::cuda
