// Copies from global to shared memory that go on while the thread does (sm_80: cp.async). Each thread
// commits and waits for groups of its own copies; others see them after a barrier.
#pragma once

#include <cuda_runtime.h>

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

#endif

}  // namespace fomoe::cuda
