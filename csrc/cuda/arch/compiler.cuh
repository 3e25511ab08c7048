// What the compiler does not find out by itself.
#pragma once

#include <cuda_runtime.h>

#ifdef FOMOE_EMULATED
#include "emulator.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// `value` is the same in all lanes, so that what follows from it can be computed once for the warp. The
// whole warp comes.
inline int warp_uniform(int value, Here here = {}) { return emulator::warp_uniform(value, here); }
// `pointer` is one number from here on: what it was summed up from is not taken apart again, to be
// summed up anew for each access.
inline void keep_whole(const unsigned char*&) {}

#else

__device__ inline int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ inline void keep_whole(const unsigned char*& pointer) {
  asm volatile("" : "+l"(pointer));
}

#endif

}  // namespace fomoe::cuda
