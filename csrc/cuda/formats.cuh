// Access to stored elements in units of one register (or of one element where rows allow no better
// alignment). N units are a vector, which moves in one access of up to 16 bytes. Values are unpacked at
// their use, so that nothing waits for a load earlier.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace fomoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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

// How a kernel reaches rows of `dtype`: vectors of kUnits units of Format.
template <class Format_, int kUnits_>
struct Access {
  using Format = Format_;
  static constexpr int kUnits = kUnits_;
  static constexpr int kValues = Format::kValues;  // to a unit
  static constexpr int kWidth = kUnits * kValues;  // values to a vector
  using V = Vector<typename Format::Unit, kUnits>;

  __device__ static void unpack(const V& vector, float (&values)[kWidth]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) Format::unpack(vector.unit[u], values + u * kValues);
  }
  __device__ static V pack(const float (&values)[kWidth]) {
    V vector;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) vector.unit[u] = Format::pack(values + u * kValues);
    return vector;
  }
};

// Calls body(Access) with the widest access for which every row of `width` elements is aligned in
// each of the tensors that start at `pointers` (null ones are aligned).
template <class Element, class Pair, class Body, class... Pointers>
cudaError_t with_widest_access(const Body& body, int64_t width, const Pointers... pointers) {
  const auto fits = [&](int64_t bytes) {
    const int64_t row_bytes = width * int64_t(sizeof(typename Element::Unit));
    return row_bytes % bytes == 0 && (is_aligned(pointers, bytes) && ...);
  };
  if (fits(16)) return body(Access<Pair, 4>{});
  if (fits(4)) return body(Access<Pair, 1>{});
  return body(Access<Element, 1>{});
}

template <class Body, class... Pointers>
cudaError_t for_widest_access(DType dtype, const Body& body, int64_t width,
                              const Pointers... pointers) {
  switch (dtype) {
    case DType::f32: return with_widest_access<F32, F32>(body, width, pointers...);
    case DType::bf16: return with_widest_access<Bf16, Bf16x2>(body, width, pointers...);
    case DType::f16: return with_widest_access<F16, F16x2>(body, width, pointers...);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda
