// Small matrices in a warp's registers (sm_80): ldmatrix and mma.sync; stmatrix (sm_90).
// Lane l holds of each 8 x 8 matrix of 16-bit elements those at row l / 4, columns 2 (l % 4) and the next.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../formats.cuh"
#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_matrix.h"
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

// Four 8 x 8 matrices from shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes.
inline void load_matrices(uint32_t (&matrices)[4], const void* row, Here here = {}) {
  emulator::load_matrices(matrices, row, false, here);
}
// The same, each matrix transposed.
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row, Here here = {}) {
  emulator::load_matrices(matrices, row, true, here);
}
// Four 8 x 8 matrices to shared memory, rows named as by load_matrices.
inline void store_matrices(const uint32_t (&matrices)[4], void* row, Here here = {}) {
  emulator::store_matrices(matrices, row, here);
}
// c += a . b in fp32. a: 16 x 16, matrices (upper left, lower left, upper right, lower right);
// b: 16 x 8, given by its transpose, matrices (left, right); c: 16 x 8, c[0..1] of row l / 4 and
// c[2..3] of row l / 4 + 8.
template <class Format>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b_left, uint32_t b_right,
                  Here here = {}) {
  emulator::multiply_add(c, a, {b_left, b_right}, Format::unpack, here);
}

#else

__device__ inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// Kernels that store matrices are compiled for older architectures too, and must not be launched there.
__device__ inline void store_matrices(const uint32_t (&)[4], void*) { __trap(); }
#else
__device__ inline void store_matrices(const uint32_t (&matrices)[4], void* row) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}
#endif

#define FOMOE_MMA(type)                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "            \
               "{%8, %9}, {%0, %1, %2, %3};"                          \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_left), "r"(b_right))

template <class Format>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b_left,
                                    uint32_t b_right) {
  if constexpr (std::is_same_v<Format, Bf16x2>) {
    FOMOE_MMA("bf16");
  } else {
    static_assert(std::is_same_v<Format, F16x2>);
    FOMOE_MMA("f16");
  }
}
#undef FOMOE_MMA

#endif

}  // namespace fomoe::cuda
