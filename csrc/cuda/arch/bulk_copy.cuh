// Bulk copies between global and shared memory by the async proxy (sm_90: cp.async.bulk). Addresses
// are aligned to 16 bytes, sizes are multiples of 16. One thread issues a copy for the whole block.
#pragma once

#include <cuda_runtime.h>

#include "barrier.cuh"
#include "shared_memory.cuh"

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// global -> shared; `bytes` are taken from what `barrier` expects when they have arrived.
inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier,
                      Here here = {}) {
  emulator::bulk_load(shared, global, bytes, barrier, here);
}
// shared -> global; belongs to the thread's next bulk_commit.
inline void bulk_store(void* global, const void* shared, unsigned bytes, Here here = {}) {
  emulator::bulk_store(global, shared, bytes, here);
}
// The stores since the last commit become a group.
inline void bulk_commit() { emulator::bulk_commit(); }
// All groups but the last `kPending` have read their shared memory: it may be written again.
template <int kPending>
void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}
// All groups but the last `kPending` have been written.
template <int kPending>
void bulk_wait() {
  emulator::bulk_wait(kPending);
}
// fence.proxy.async: this thread's ordinary accesses to shared memory come before bulk copies that
// are issued later. Every thread that wrote what a bulk_store reads needs one, before the barrier.
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// A kernel with bulk copies is compiled for older chips too, where it must not be launched.
__device__ inline void bulk_load(void*, const void*, unsigned, uint64_t*) { __trap(); }
__device__ inline void bulk_store(void*, const void*, unsigned) { __trap(); }
__device__ inline void bulk_commit() { __trap(); }
template <int kPending>
__device__ void bulk_wait_read() {
  __trap();
}
template <int kPending>
__device__ void bulk_wait() {
  __trap();
}
__device__ inline void fence_proxy_async() { __trap(); }

#else

__device__ inline void bulk_load(void* shared, const void* global, unsigned bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline void bulk_store(void* global, const void* shared, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace fomoe::cuda
