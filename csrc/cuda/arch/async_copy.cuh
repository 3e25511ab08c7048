// Asynchronous copies from global to shared memory (sm_80: cp.async). Each thread commits and waits for
// groups of its own copies; other threads see them after a barrier. Or the copies themselves arrive at
// an mbarrier (sm_90), and only the threads that need the data wait.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// Copies 16 bytes, both addresses aligned to 16; writes zeros without a read if not `valid`.
inline void async_copy_16(void* shared, const void* global, bool valid, Here here = {}) {
  emulator::async_copy_16(shared, global, valid, here);
}
// Makes the copies since the last commit a group.
inline void async_copy_commit() { emulator::async_copy_commit(); }
// Waits until all groups but the last `kPending` have arrived.
template <int kPending>
void async_copy_wait() {
  emulator::async_copy_wait(kPending);
}
// Arrives once at `barrier` (an arrival that it was initialised for) when all copies issued by this
// thread so far have arrived. This orders the copies only, not the thread's ordinary stores. A thread
// that waited for the phase needs fence_proxy_async before the async proxy (wgmma, bulk copies) reads
// the data.
inline void async_copy_arrive(uint64_t* barrier, Here here = {}) {
  emulator::async_copy_arrive(barrier, here);
}

#else

__device__ inline void async_copy_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// Kernels with mbarriers are compiled for older architectures too, and must not be launched there.
__device__ inline void async_copy_arrive(uint64_t*) { __trap(); }
#else
__device__ inline void async_copy_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
#endif
#endif

}  // namespace fomoe::cuda
