// Clusters (sm_90): blocks that run together, meet at a barrier, and reach each other's shared memory. A
// kernel is launched in clusters by an attribute of cudaLaunchKernelEx.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_async.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// The block's number in its cluster.
inline unsigned cluster_rank() { return emulator::cluster_rank(); }
// barrier.cluster: all threads of the cluster that have not left their kernel arrive, and then wait. What
// a thread has written before it arrives is seen by those who have waited, in shared memory of the cluster
// too. Whole warps. A block ends only when no other block can reach its shared memory any more.
inline void cluster_arrive(Here here = {}) { emulator::cluster_arrive(here); }
inline void cluster_wait(Here here = {}) { emulator::cluster_wait(here); }

// A place in the shared memory of some block of the cluster.
struct RemoteShared {
  void* at;
};
// The place in block `rank` at which this block has `shared`.
inline RemoteShared remote_shared(const void* shared, unsigned rank, Here here = {}) {
  return {emulator::remote_shared(shared, rank, "mapa", here)};
}
inline uint32_t remote_load(RemoteShared word, Here here = {}) {
  return *emulator::remote_word(word.at, "ld.shared::cluster", here);
}
inline void remote_store(RemoteShared word, uint32_t value, Here here = {}) {
  *emulator::remote_word(word.at, "st.shared::cluster", here) = value;
}
// One arrival at another block's mbarrier. It says that the thread is done with what it has read, also by
// products that it has waited for, and shows nobody what it has written: a fence for that would wait, for
// every arrival, until all stores of the thread are in L2.
inline void remote_arrive(RemoteShared barrier, Here here = {}) {
  emulator::remote_arrive(barrier.at, here);
}

#else

struct RemoteShared {
  uint32_t at;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// Kernels with clusters are compiled for older architectures too, and must not be launched there.
__device__ inline unsigned cluster_rank() {
  __trap();
  return 0;
}
__device__ inline void cluster_arrive() { __trap(); }
__device__ inline void cluster_wait() { __trap(); }
__device__ inline RemoteShared remote_shared(const void*, unsigned) {
  __trap();
  return {0};
}
__device__ inline uint32_t remote_load(RemoteShared) {
  __trap();
  return 0;
}
__device__ inline void remote_store(RemoteShared, uint32_t) { __trap(); }
__device__ inline void remote_arrive(RemoteShared) { __trap(); }

#else

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline RemoteShared remote_shared(const void* shared, unsigned rank) {
  RemoteShared there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there.at)
               : "r"(shared_address(shared)), "r"(rank));
  return there;
}
__device__ inline uint32_t remote_load(RemoteShared word) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(word.at) : "memory");
  return value;
}
__device__ inline void remote_store(RemoteShared word, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(word.at), "r"(value) : "memory");
}
__device__ inline void remote_arrive(RemoteShared barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier.at) : "memory");
}

#endif
#endif

}  // namespace fomoe::cuda
