// Matrix products of a warpgroup, 128 threads from a multiple of 128 on (sm_90a: wgmma), and setmaxnreg.
// All threads of the warpgroup call each of these.
//
//   warpgroup_arrive();  warpgroup_multiply(acc, ...) ...;  warpgroup_commit();
//   warpgroup_wait<0>();  warpgroup_fence(acc);     now acc may be read, and operands overwritten
//
// Accumulators of m64nNk16: thread t of the warpgroup, with warp = t / 32, g = t % 32 / 4 and q = t % 4,
// has in acc[4 * j + 2 * h + e] row 16 * warp + 8 * h + g, column 8 * j + 2 * q + e.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../formats.cuh"
#include "shared_memory.cuh"

#ifdef FOMOE_EMULATED
#include "emulator_warpgroup.h"
#endif

namespace fomoe::cuda {

// A matrix descriptor with 128-byte swizzle whose pattern starts at multiples of 1024 bytes.
constexpr __host__ __device__ uint64_t matrix_descriptor(uint32_t address, unsigned leading_bytes,
                                                         unsigned stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto encode = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
  return encode(address) | encode(leading_bytes) << 16 | encode(stride_bytes) << 32 |
         kSwizzle128 << 62;
}

template <class Format, int kColumns>
constexpr bool kKnownProduct = (std::is_same_v<Format, Bf16x2> || std::is_same_v<Format, F16x2>) &&
                               (kColumns == 64 || kColumns == 128 || kColumns == 256);

template <int kRegisters>
constexpr bool kKnownRegisters = kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256;

#ifdef FOMOE_EMULATED

// The descriptor of an operand in shared memory, in tiles of 1024 bytes: 8 rows of 128 bytes, as
// tensor_load writes them. To move on by n bytes add n / 16.
//   K contiguous: row r of M or N, byte b of its 64 values along K, stands at
//     tile + r / 8 * stride + r % 8 * 128 + b. `leading_bytes` means nothing. 16 steps of K: 32 bytes.
//   M or N contiguous (transposed): value (mn, k) stands at
//     tile + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2. 16 steps of K: 2 strides.
inline uint64_t shared_matrix(const void* tile, unsigned leading_bytes, unsigned stride_bytes,
                              Here here = {}) {
  return matrix_descriptor(emulator::matrix_address(tile, here), leading_bytes, stride_bytes);
}

// wgmma.fence: needed before the first product of accumulators that were read or written.
inline void warpgroup_arrive(Here here = {}) { emulator::warpgroup_arrive(here); }

// acc (64 x kColumns) = a (64 x 16) . b (16 x kColumns), plus acc if `accumulate`; done by the async
// proxy before the warpgroup_wait for its group returns.
template <class Format, int kColumns, bool kTransposeA, bool kTransposeB>
void warpgroup_multiply(float (&acc)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate,
                        Here here = {}) {
  static_assert(kKnownProduct<Format, kColumns>);
  constexpr auto kElement =
      std::is_same_v<Format, Bf16x2> ? emulator::Element::bf16 : emulator::Element::f16;
  emulator::warpgroup_multiply(
      acc, {kElement, kColumns, kTransposeA, kTransposeB, a, b, accumulate}, here);
}
// Makes the products since the last commit a group.
inline void warpgroup_commit(Here here = {}) { emulator::warpgroup_commit(here); }
// Waits until all groups but the last `kPending` have read their operands and written accumulators.
template <int kPending>
void warpgroup_wait(Here here = {}) {
  emulator::warpgroup_wait(kPending, here);
}
// The compiler moves no access to `acc` across this: before warpgroup_arrive where they have been written,
// after a wait before they are read. They must stay in registers, so index them by constants only: loops
// over them are unrolled.
template <int N>
void warpgroup_fence(float (&)[N]) {}

// setmaxnreg: sets the number of registers of the warpgroup's threads.
template <int kRegisters>
void registers_raise(Here here = {}) {
  static_assert(kKnownRegisters<kRegisters>);
  emulator::registers_change("setmaxnreg.inc", kRegisters, here);
}
template <int kRegisters>
void registers_lower(Here here = {}) {
  static_assert(kKnownRegisters<kRegisters>);
  emulator::registers_change("setmaxnreg.dec", kRegisters, here);
}

#elif defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Kernels for warpgroups are compiled for other architectures too, and must not be launched there.
__device__ inline uint64_t shared_matrix(const void*, unsigned, unsigned) { __trap(); }
__device__ inline void warpgroup_arrive() { __trap(); }
template <class Format, int kColumns, bool kTransposeA, bool kTransposeB>
__device__ void warpgroup_multiply(float (&)[kColumns / 2], uint64_t, uint64_t, bool) {
  static_assert(kKnownProduct<Format, kColumns>);
  __trap();
}
__device__ inline void warpgroup_commit() { __trap(); }
template <int kPending>
__device__ void warpgroup_wait() {
  __trap();
}
template <int N>
__device__ void warpgroup_fence(float (&)[N]) {
  __trap();
}
template <int kRegisters>
__device__ void registers_raise() {
  static_assert(kKnownRegisters<kRegisters>);
  __trap();
}
template <int kRegisters>
__device__ void registers_lower() {
  static_assert(kKnownRegisters<kRegisters>);
  __trap();
}

#else

__device__ inline uint64_t shared_matrix(const void* tile, unsigned leading_bytes,
                                         unsigned stride_bytes) {
  return matrix_descriptor(shared_address(tile), leading_bytes, stride_bytes);
}

__device__ inline void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int N>
__device__ void warpgroup_fence(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}
template <int kRegisters>
__device__ void registers_raise() {
  static_assert(kKnownRegisters<kRegisters>);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void registers_lower() {
  static_assert(kKnownRegisters<kRegisters>);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Names %0, %1 ... of the accumulators and the accumulators themselves, as operands of assembly.
// clang-format off
#define FOMOE_TEN(tens) \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, " \
  "%" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define FOMOE_THIRTY FOMOE_TEN() FOMOE_TEN(1) FOMOE_TEN(2)
#define FOMOE_SIXTY FOMOE_THIRTY FOMOE_TEN(3) FOMOE_TEN(4) FOMOE_TEN(5)
#define FOMOE_HUNDRED FOMOE_SIXTY FOMOE_TEN(6) FOMOE_TEN(7) FOMOE_TEN(8) FOMOE_TEN(9)
#define FOMOE_NAMES_32 FOMOE_THIRTY "%30, %31"
#define FOMOE_NAMES_64 FOMOE_SIXTY "%60, %61, %62, %63"
#define FOMOE_NAMES_128 \
  FOMOE_HUNDRED FOMOE_TEN(10) FOMOE_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define FOMOE_VALUES_4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define FOMOE_VALUES_16(i) \
  FOMOE_VALUES_4(i), FOMOE_VALUES_4(i + 4), FOMOE_VALUES_4(i + 8), FOMOE_VALUES_4(i + 12)
#define FOMOE_VALUES_32 FOMOE_VALUES_16(0), FOMOE_VALUES_16(16)
#define FOMOE_VALUES_64 FOMOE_VALUES_32, FOMOE_VALUES_16(32), FOMOE_VALUES_16(48)
#define FOMOE_VALUES_128 \
  FOMOE_VALUES_64, \
  FOMOE_VALUES_16(64), FOMOE_VALUES_16(80), FOMOE_VALUES_16(96), FOMOE_VALUES_16(112)

// `a` ... `transpose_b`: the numbers of the operands after `registers` accumulators.
#define FOMOE_MULTIPLY(columns, type, registers, a, b, add, transpose_a, transpose_b)         \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred accumulate;\n"                                                              \
      "setp.ne.b32 accumulate, %" #add ", 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " "               \
      "{" FOMOE_NAMES_##registers "}, "                                                       \
      "%" #a ", %" #b ", accumulate, 1, 1, %" #transpose_a ", %" #transpose_b ";\n"           \
      "}"                                                                                     \
      : FOMOE_VALUES_##registers                                                              \
      : "l"(a_descriptor), "l"(b_descriptor), "r"(int(accumulate)), "n"(int(kTransposeA)),    \
        "n"(int(kTransposeB)))
// clang-format on

template <class Format, int kColumns, bool kTransposeA, bool kTransposeB>
__device__ void warpgroup_multiply(float (&acc)[kColumns / 2], uint64_t a_descriptor,
                                   uint64_t b_descriptor, bool accumulate) {
  static_assert(kKnownProduct<Format, kColumns>);
  constexpr bool kBf16 = std::is_same_v<Format, Bf16x2>;
  if constexpr (kColumns == 64 && kBf16) FOMOE_MULTIPLY(64, "bf16", 32, 32, 33, 34, 35, 36);
  if constexpr (kColumns == 64 && !kBf16) FOMOE_MULTIPLY(64, "f16", 32, 32, 33, 34, 35, 36);
  if constexpr (kColumns == 128 && kBf16) FOMOE_MULTIPLY(128, "bf16", 64, 64, 65, 66, 67, 68);
  if constexpr (kColumns == 128 && !kBf16) FOMOE_MULTIPLY(128, "f16", 64, 64, 65, 66, 67, 68);
  if constexpr (kColumns == 256 && kBf16) FOMOE_MULTIPLY(256, "bf16", 128, 128, 129, 130, 131, 132);
  if constexpr (kColumns == 256 && !kBf16) FOMOE_MULTIPLY(256, "f16", 128, 128, 129, 130, 131, 132);
}

#undef FOMOE_MULTIPLY
#undef FOMOE_VALUES_128
#undef FOMOE_VALUES_64
#undef FOMOE_VALUES_32
#undef FOMOE_VALUES_16
#undef FOMOE_VALUES_4
#undef FOMOE_NAMES_128
#undef FOMOE_NAMES_64
#undef FOMOE_NAMES_32
#undef FOMOE_HUNDRED
#undef FOMOE_SIXTY
#undef FOMOE_THIRTY
#undef FOMOE_TEN

#endif

}  // namespace fomoe::cuda
