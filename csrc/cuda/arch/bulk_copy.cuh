// Bulk copies between global and shared memory by the async proxy (sm_90: cp.async.bulk). Addresses
// are aligned to 16 bytes, sizes are multiples of 16. One thread issues a copy for the whole block.
#pragma once

#include <cuda_runtime.h>

#include "barrier.cuh"
#include "shared_memory.cuh"

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// global -> shared; on arrival `bytes` are subtracted from the bytes that `barrier` expects.
inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier,
                      Here here = {}) {
  emulator::bulk_load(shared, global, bytes, barrier, here);
}
// shared -> global; part of the thread's next bulk_commit.
inline void bulk_store(void* global, const void* shared, unsigned bytes, Here here = {}) {
  emulator::bulk_store(global, shared, bytes, here);
}
// Makes the stores since the last commit a group.
inline void bulk_commit() { emulator::bulk_commit(); }
// Waits until all groups but the last `kPending` have read their shared memory: it may be overwritten.
template <int kPending>
void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}
// Waits until all groups but the last `kPending` have been written.
template <int kPending>
void bulk_wait() {
  emulator::bulk_wait(kPending);
}
// fence.proxy.async: orders this thread's ordinary accesses to shared memory before bulk copies that
// are issued later. Every thread that wrote data of a bulk_store needs one, before the barrier.
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// Kernels with bulk copies are compiled for older architectures too, and must not be launched there.
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
