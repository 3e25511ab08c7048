// Loads of boxes of a tensor from global to shared memory by the async proxy (sm_90: TMA,
// cp.async.bulk.tensor). A tensor map, made on the host, describes the tensor and the size of a box.
#pragma once

#include <cuda_runtime.h>

#include "../../kernels.h"
#include "barrier.cuh"
#include "shared_memory.cuh"

#ifndef FOMOE_EMULATED
#include <cuda.h>  // for types: the driver's library is not linked
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// The reason why a tensor cannot be mapped with 128-byte swizzle, or null. The conditions are those of
// cuda.h, of which the driver checks only some (each stride is the one before, times the size with its
// padding), and whole chunks of 16 bytes: a last chunk that is not whole is unspecified.
inline const char* mapping_fault(DType dtype, const void* base, const int64_t (&sizes)[3],
                                 const int64_t (&strides)[2], const int (&box)[3]) {
  constexpr int64_t kLargestSize = int64_t(1) << 32, kStrideLimit = int64_t(1) << 40;
  constexpr int64_t kElementBytes = 2, kChunkBytes = 16;
  constexpr int kRowElements = 64, kLargestBox = 256;
  if (dtype != DType::bf16 && dtype != DType::f16) return "dtype must be bf16 or f16";
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % kChunkBytes != 0)
    return "base must be a multiple of 16";
  for (const int64_t size : sizes)
    if (size <= 0 || size > kLargestSize) return "sizes must be in 1 .. 2^32";
  if (sizes[0] * kElementBytes % kChunkBytes != 0) return "sizes[0] must be a multiple of 16 bytes";
  for (const int64_t stride : strides)
    if (stride <= 0 || stride >= kStrideLimit || stride % kChunkBytes != 0)
      return "strides must be positive multiples of 16 below 2^40";
  if (strides[0] < sizes[0] * kElementBytes) return "strides[0] must be at least a row";
  if (strides[1] % strides[0] != 0) return "strides[1] must be a multiple of strides[0]";
  if (strides[1] / strides[0] < sizes[1]) return "strides[1] must be at least a plane";
  if (box[0] != kRowElements) return "box[0] must be 64";
  for (const int size : box)
    if (size <= 0 || size > kLargestBox) return "box must be in 1 .. 256";
  return nullptr;
}

// Maps a row-major tensor of bf16 or f16: `sizes` in elements, innermost dimension first; `strides` of
// dimensions 1 and 2 in bytes; `box` in elements, box[0] = 64. In shared memory a row of a box takes
// 128 bytes, its 16-byte chunks in 128-byte swizzle: chunk c of row r stands at c ^ (r % 8).
// cudaErrorInvalidValue for what mapping_fault or the driver refuses.
inline cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* base,
                                   const int64_t (&sizes)[3], const int64_t (&strides)[2],
                                   const int (&box)[3]) {
  if (mapping_fault(dtype, base, sizes, strides, box) != nullptr) return cudaErrorInvalidValue;
#ifdef FOMOE_EMULATED
  *map = {emulator::kTensorMapWord,
          static_cast<const unsigned char*>(base),
          2,
          {sizes[0], sizes[1], sizes[2]},
          {strides[0], strides[1]},
          {box[0], box[1], box[2]}};
  return cudaSuccess;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(good ? found : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t map_sizes[3] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]),
                                   cuuint64_t(sizes[2])};
  const cuuint64_t map_strides[2] = {cuuint64_t(strides[0]), cuuint64_t(strides[1])};
  const cuuint32_t map_box[3] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 3, const_cast<void*>(base), map_sizes, map_strides, map_box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

#ifdef FOMOE_EMULATED

// Loads the box at (c0, c1, c2), innermost first, into shared memory aligned to 1024 bytes. Elements
// outside the tensor, on either side, become zeros; `barrier` always gets the bytes of the whole box.
// c0 must be a multiple of 8: the hardware refuses a load that does not begin at a multiple of 16 bytes.
inline void tensor_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                        int c2, Here here = {}) {
  emulator::tensor_load(shared, map, barrier, c0, c1, c2, here);
}
// To the same place in every block of the cluster that has a bit in `blocks`; the mbarrier at the place
// of `barrier` in each gets the bytes.
inline void tensor_load_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int c0,
                                  int c1, int c2, unsigned blocks, Here here = {}) {
  emulator::tensor_load_to_blocks(shared, map, barrier, c0, c1, c2, blocks, here);
}
// Prefetches the map.
inline void prefetch_tensor_map(const TensorMap* map, Here here = {}) {
  emulator::prefetch_tensor_map(map, here);
}

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// Kernels with tensor maps are compiled for older architectures too, and must not be launched there.
__device__ inline void tensor_load(void*, const TensorMap*, uint64_t*, int, int, int) { __trap(); }
__device__ inline void tensor_load_to_blocks(void*, const TensorMap*, uint64_t*, int, int, int,
                                             unsigned) {
  __trap();
}
__device__ inline void prefetch_tensor_map(const TensorMap*) { __trap(); }

#else

// For newer architectures ptxas turns a target that may be in another block into a call with a stack.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 900
#define FOMOE_TARGET "shared::cta"
#else
#define FOMOE_TARGET "shared::cluster"
#endif

__device__ inline void tensor_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0,
                                   int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d." FOMOE_TARGET
               ".global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                   shared_address(shared)),
               "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
#undef FOMOE_TARGET

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 900
// No kernel for these has clusters, and ptxas warns of what they would make of it.
__device__ inline void tensor_load_to_blocks(void*, const TensorMap*, uint64_t*, int, int, int,
                                             unsigned) {
  __trap();
}
#else
__device__ inline void tensor_load_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier,
                                             int c0, int c1, int c2, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(uint16_t(blocks))
      : "memory");
}
#endif

__device__ inline void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#endif

}  // namespace fomoe::cuda
