// Stands in for CUDA's header, so that g++ compiles csrc/cuda/*.cu as they are and the emulator runs
// them on the CPU. What is not here no kernel of ours uses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

// threadIdx and its like: objects whose members read the running thread.
#define FOMOE_BUILT_IN(name, member)                                           \
  inline constexpr struct {                                                    \
    struct {                                                                   \
      operator unsigned() const { return fomoe::emulator::current->member.x; } \
    } x;                                                                       \
    struct {                                                                   \
      operator unsigned() const { return fomoe::emulator::current->member.y; } \
    } y;                                                                       \
    struct {                                                                   \
      operator unsigned() const { return fomoe::emulator::current->member.z; } \
    } z;                                                                       \
  } name {                                                                     \
  }
FOMOE_BUILT_IN(threadIdx, index);
FOMOE_BUILT_IN(blockIdx, block_index);
FOMOE_BUILT_IN(blockDim, block_size);
FOMOE_BUILT_IN(gridDim, grid_size);
#undef FOMOE_BUILT_IN

using std::max;
using std::min;

// ---- vector types --------------------------------------------------------------------------------

#define FOMOE_VECTOR2(T, name)         \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define FOMOE_VECTOR4(T, name) \
  struct alignas(16) name {    \
    T x, y, z, w;              \
  };                           \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
FOMOE_VECTOR2(int, int2)
FOMOE_VECTOR2(unsigned, uint2)
FOMOE_VECTOR2(float, float2)
FOMOE_VECTOR4(int, int4)
FOMOE_VECTOR4(unsigned, uint4)
FOMOE_VECTOR4(float, float4)
#undef FOMOE_VECTOR2
#undef FOMOE_VECTOR4

// ---- threads that meet ---------------------------------------------------------------------------

inline void __syncthreads(Here here = {}) { fomoe::emulator::sync_block(here); }
inline void __syncwarp(unsigned mask = 0xffffffffu, Here here = {}) {
  fomoe::emulator::meet_warp(mask, "__syncwarp", nullptr, nullptr, true, here);
}
inline void __threadfence() {}

namespace fomoe::emulator {
template <class T>
T shuffle_to(unsigned mask, T value, int source, const char* name, Here here) {
  return from_bits<T>(shuffle(mask, to_bits(value), source, name, here));
}
inline int lane() { return int(current->lane); }
}  // namespace fomoe::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Here here = {}) {
  const int first = fomoe::emulator::lane() & ~(width - 1);
  return fomoe::emulator::shuffle_to(mask, value, first | (source & (width - 1)), "__shfl_sync",
                                     here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Here here = {}) {
  const int lane = fomoe::emulator::lane(), source = lane ^ bits;
  return fomoe::emulator::shuffle_to(mask, value, source / width <= lane / width ? source : lane,
                                     "__shfl_xor_sync", here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, Here here = {}) {
  const int lane = fomoe::emulator::lane(), source = lane - int(delta);
  return fomoe::emulator::shuffle_to(mask, value, source >= (lane & ~(width - 1)) ? source : lane,
                                     "__shfl_up_sync", here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, Here here = {}) {
  const int lane = fomoe::emulator::lane(), source = lane + int(delta);
  return fomoe::emulator::shuffle_to(mask, value, source <= (lane | (width - 1)) ? source : lane,
                                     "__shfl_down_sync", here);
}
inline unsigned __ballot_sync(unsigned mask, int vote, Here here = {}) {
  return fomoe::emulator::ballot(mask, vote != 0, here);
}
inline int __any_sync(unsigned mask, int vote, Here here = {}) {
  return fomoe::emulator::ballot(mask, vote != 0, here) != 0;
}
inline int __all_sync(unsigned mask, int vote, Here here = {}) {
  return fomoe::emulator::ballot(mask, vote == 0, here) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, Here here = {}) {
  return fomoe::emulator::match_any(mask, fomoe::emulator::to_bits(value), here);
}

#define FOMOE_REDUCE(name, T, expression)                                                \
  inline T name(unsigned mask, T value, Here here = {}) {                                \
    const auto fold = [](uint32_t left, uint32_t right) {                                \
      const T a = static_cast<T>(left), b = static_cast<T>(right);                       \
      return static_cast<uint32_t>(expression);                                          \
    };                                                                                   \
    return static_cast<T>(                                                               \
        fomoe::emulator::reduce(mask, static_cast<uint32_t>(value), fold, #name, here)); \
  }
FOMOE_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
FOMOE_REDUCE(__reduce_max_sync, int, a > b ? a : b)
FOMOE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
FOMOE_REDUCE(__reduce_min_sync, int, a < b ? a : b)
FOMOE_REDUCE(__reduce_add_sync, unsigned, a + b)
FOMOE_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
FOMOE_REDUCE(__reduce_and_sync, unsigned, a& b)
FOMOE_REDUCE(__reduce_or_sync, unsigned, a | b)
FOMOE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef FOMOE_REDUCE

// ---- arithmetic ----------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) {
  return fomoe::emulator::from_bits<unsigned>(fomoe::emulator::to_bits(x));
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __uint_as_float(unsigned x) {
  return fomoe::emulator::from_bits<float>(fomoe::emulator::to_bits(x));
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline long long __float2ll_rn(float x) { return (long long)std::nearbyint(x); }

// ---- memory --------------------------------------------------------------------------------------

// Hints to caches.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

namespace fomoe::emulator {
template <class T, class Change>
T change_atomically(T* p, const Change& change) {
  maybe_yield();
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Word));
  Word* word = reinterpret_cast<Word*>(p);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, Word(to_bits(change(from_bits<T>(old)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return from_bits<T>(old);
}
}  // namespace fomoe::emulator

#define FOMOE_ATOMIC(name, expression)                                                    \
  template <class T>                                                                      \
  T name(T* p, std::type_identity_t<T> value) {                                           \
    return fomoe::emulator::change_atomically(p, [=](T old) -> T { return expression; }); \
  }
FOMOE_ATOMIC(atomicAdd, old + value)
FOMOE_ATOMIC(atomicSub, old - value)
FOMOE_ATOMIC(atomicMax, old > value ? old : value)
FOMOE_ATOMIC(atomicMin, old < value ? old : value)
FOMOE_ATOMIC(atomicOr, old | value)
FOMOE_ATOMIC(atomicAnd, old& value)
FOMOE_ATOMIC(atomicExch, (void(old), value))
#undef FOMOE_ATOMIC
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return fomoe::emulator::change_atomically(
      p, [=](T old) -> T { return old == expected ? value : old; });
}

inline void __nanosleep(unsigned, Here here = {}) { fomoe::emulator::yield_polling(here); }

// ---- the runtime's functions ---------------------------------------------------------------------

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  uint3 clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fomoe::emulator {
// Blocks of a cluster; without the attribute every block is one.
inline dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const uint3 size = config.attrs[i].val.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  return cluster;
}
}  // namespace fomoe::emulator

// Runs the kernel before it returns; refuses what every CUDA device refuses.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cudaError_t(fomoe::emulator::launch(
      config->gridDim, config->blockDim, fomoe::emulator::cluster_of(*config),
      config->dynamicSmemBytes, kernel, std::forward<Arguments>(arguments)...));
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// One device: a Hopper of few multiprocessors.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*,
                                           const cudaLaunchConfig_t* config) {
  const int size = int(fomoe::emulator::cluster_of(*config).size());
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  *clusters = processors / size;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
namespace fomoe::emulator {
int allow_dynamic_shared(const void* kernel, int bytes);
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return cudaError_t(
      fomoe::emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), value));
}
