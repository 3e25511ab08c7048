// Ordered accesses between blocks of one launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef FOMOE_EMULATED
#include "emulator.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// ld.acquire.gpu: writes before the matching store_release are visible after it.
inline uint32_t load_acquire(const uint32_t* p) {
  emulator::maybe_yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline uint64_t load_acquire(const uint64_t* p) {
  emulator::maybe_yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
// st.release.gpu
inline void store_release(uint32_t* p, uint32_t value) {
  emulator::maybe_yield();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
inline void store_release(uint64_t* p, uint64_t value) {
  emulator::maybe_yield();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
// For use in a polling loop.
inline void polling_pause(Here here = {}) { emulator::yield_polling(here); }

#else

__device__ inline uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline uint64_t load_acquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ inline void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ inline void polling_pause() { __nanosleep(32); }

#endif

}  // namespace fomoe::cuda
