// How stored elements travel: in units of one register (or of one element where rows leave no
// better alignment), N units to a vector that moves in one access of up to 16 bytes. Values are
// unpacked where they are used, so that a load waits for nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fomoe::cuda {

template <class Unit, int N>
struct alignas(N * sizeof(Unit)) Vector {
  Unit unit[N];
};

template <class To, class From>
__device__ inline To reinterpret_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Each format: Unit, what a register or element holds; kValues, how many values that is.

struct F32 {
  using Unit = float;
  static constexpr int kValues = 1;
  __device__ static void unpack(Unit unit, float* values) { values[0] = unit; }
  __device__ static Unit pack(const float* values) { return values[0]; }
};

struct Bf16 {
  using Unit = uint16_t;
  static constexpr int kValues = 1;
  __device__ static void unpack(Unit unit, float* values) {
    values[0] = __bfloat162float(reinterpret_bits<__nv_bfloat16>(unit));
  }
  __device__ static Unit pack(const float* values) {
    return reinterpret_bits<Unit>(__float2bfloat16_rn(values[0]));
  }
};

struct Bf16x2 {
  using Unit = uint32_t;
  static constexpr int kValues = 2;
  __device__ static void unpack(Unit unit, float* values) {
    const float2 pair = __bfloat1622float2(reinterpret_bits<__nv_bfloat162>(unit));
    values[0] = pair.x;
    values[1] = pair.y;
  }
  __device__ static Unit pack(const float* values) {
    return reinterpret_bits<Unit>(__floats2bfloat162_rn(values[0], values[1]));
  }
};

struct F16 {
  using Unit = uint16_t;
  static constexpr int kValues = 1;
  __device__ static void unpack(Unit unit, float* values) {
    values[0] = __half2float(reinterpret_bits<__half>(unit));
  }
  __device__ static Unit pack(const float* values) {
    return reinterpret_bits<Unit>(__float2half_rn(values[0]));
  }
};

struct F16x2 {
  using Unit = uint32_t;
  static constexpr int kValues = 2;
  __device__ static void unpack(Unit unit, float* values) {
    const float2 pair = __half22float2(reinterpret_bits<__half2>(unit));
    values[0] = pair.x;
    values[1] = pair.y;
  }
  __device__ static Unit pack(const float* values) {
    return reinterpret_bits<Unit>(__floats2half2_rn(values[0], values[1]));
  }
};

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace fomoe::cuda
