// Copies from global to shared memory that go on while the thread does (sm_80: cp.async). Each thread
// commits and waits for groups of its own copies; others see them after a barrier. Or the copies
// themselves arrive at an mbarrier (sm_90), and nobody waits but who needs them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// 16 bytes, both addresses aligned to 16; zeros, and no read, when not `valid`.
inline void async_copy_16(void* shared, const void* global, bool valid, Here here = {}) {
  emulator::async_copy_16(shared, global, valid, here);
}
// The copies since the last commit become a group.
inline void async_copy_commit() { emulator::async_copy_commit(); }
// All groups but the last `kPending` have arrived.
template <int kPending>
void async_copy_wait() {
  emulator::async_copy_wait(kPending);
}
// One arrival at `barrier`, of those that it was initialised for, when all copies that this thread has
// issued until now have arrived. Only they are ordered by it, not the thread's ordinary stores. Before
// the async proxy (wgmma, bulk copies) reads them who waited for the phase needs fence_proxy_async.
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
// A kernel with mbarriers is compiled for older chips too, where it must not be launched.
__device__ inline void async_copy_arrive(uint64_t*) { __trap(); }
#else
__device__ inline void async_copy_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
#endif
#endif

}  // namespace fomoe::cuda
