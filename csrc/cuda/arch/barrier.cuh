// Barriers for a part of a block: numbered ones, and mbarriers in shared memory (sm_90), which also
// count the bytes of bulk copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// bar.sync: waits until `threads` threads (a multiple of 32) have arrived at barrier 1 .. 15.
inline void barrier_sync(unsigned id, unsigned threads, Here here = {}) {
  emulator::named_barrier(id, threads, true, here);
}
// bar.arrive: arrives without waiting.
inline void barrier_arrive(unsigned id, unsigned threads, Here here = {}) {
  emulator::named_barrier(id, threads, false, here);
}

// Initialises an mbarrier for `count` arrivals per phase. Called by one thread, followed by
// mbarrier_init_fence and a barrier.
inline void mbarrier_init(uint64_t* barrier, unsigned count, Here here = {}) {
  emulator::mbarrier_init(barrier, count, here);
}
// Makes initialised mbarriers visible to the async proxy.
inline void mbarrier_init_fence() {}
// One arrival.
inline void mbarrier_arrive(uint64_t* barrier, Here here = {}) {
  emulator::mbarrier_arrive(barrier, 0, here);
}
// One arrival; the phase also waits for `bytes` more bytes of bulk copies.
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, Here here = {}) {
  emulator::mbarrier_arrive(barrier, bytes, here);
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 ...
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, Here here = {}) {
  emulator::mbarrier_wait(barrier, parity, here);
}

#else

__device__ inline void barrier_sync(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// Kernels with mbarriers are compiled for older architectures too, and must not be launched there.
__device__ inline void mbarrier_init(uint64_t*, unsigned) { __trap(); }
__device__ inline void mbarrier_init_fence() { __trap(); }
__device__ inline void mbarrier_arrive(uint64_t*) { __trap(); }
__device__ inline void mbarrier_arrive_expect(uint64_t*, unsigned) { __trap(); }
__device__ inline void mbarrier_wait(uint64_t*, unsigned) { __trap(); }

#else

__device__ inline void mbarrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#endif
#endif

}  // namespace fomoe::cuda
