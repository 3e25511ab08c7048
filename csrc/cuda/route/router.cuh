// Shared by route and its backward: scores with the same bits as on the CPU (csrc/cpu/simd.h), and a
// token's logits distributed over the lanes of a warp.
//
// Compiled with -fmad=false: a multiply-add is fused only where fmaf says so.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../arch/approximate.cuh"
#include "../arch/shared_memory.cuh"
#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {

// ---- scores --------------------------------------------------------------------------------------

// exp by 2^n * p(r), |r| <= ln2/2, p the Taylor polynomial of degree 7. Arguments are clamped to
// where the result is a normal float.
__device__ inline float exp_exact(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = fmaf(x, 1.44269504f, kShift);
  const float n = shifted - kShift;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.0f / 5040.0f;
  p = fmaf(p, r, 1.0f / 720.0f);
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  // The low bits of `shifted` are n: into the exponent with them.
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp_exact(-x)); }

// Below, what the compiler makes of 1 / d and of a / b, without the branch to its general code that
// every division of its own has: the same bits, where neither result nor remainders are denormal.

// 1 / d for d in 1 .. 2^125.
__device__ inline float reciprocal(float d) {
  const float guess = reciprocal_approximate(d);
  return fmaf(guess, -fmaf(d, guess, -1.0f), guess);
}

// a / b for b in 1 .. 2^20 and a = 0 or in 2^-80 .. 1, given 1 / b.
__device__ inline float quotient(float a, float b, float one_over_b) {
  float q = a * one_over_b;
  q = fmaf(one_over_b, fmaf(-b, q, a), q);
  return fmaf(one_over_b, fmaf(-b, q, a), q);
}

template <int kCount>
__device__ void sigmoids(const float (&x)[kCount], float (&scores)[kCount]) {
  float largest = 1.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    scores[i] = 1.0f + exp_exact(-x[i]);
    largest = fmaxf(largest, scores[i]);
  }
  if (largest <= 0x1p125f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = reciprocal(scores[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = 1.0f / scores[i];
  }
}

// Divides scores in 0 .. 1 by their total, 1 .. 1024 and a little.
template <int kCount>
__device__ void divide(float (&scores)[kCount], float total) {
  float least = 1.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) least = fminf(least, scores[i] > 0.0f ? scores[i] : 1.0f);
  if (least >= 0x1p-80f) {
    const float inverse = reciprocal(total);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = quotient(scores[i], total, inverse);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = scores[i] / total;
  }
}

// ---- an order on floats as unsigned integers -----------------------------------------------------

constexpr uint32_t kNever = 0;                   // below every float: may not be chosen
constexpr uint32_t kLowestFinite = 0x00800000u;  // order_of(-FLT_MAX)

// a < b exactly when order_of(a) < order_of(b); -0 counts as +0. Not for NaN.
__device__ inline uint32_t order_of(float value) {
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

__device__ inline float value_of(uint32_t order) {
  return __uint_as_float(order ^ (order >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// ---- a token's experts over the lanes of a warp --------------------------------------------------

template <class Element>
struct PairOf;
template <>
struct PairOf<F32> {
  using type = F32;
};
template <>
struct PairOf<Bf16> {
  using type = Bf16x2;
};
template <>
struct PairOf<F16> {
  using type = F16x2;
};

// A lane holds kPerLane experts in vectors of up to 16 bytes; neighbouring lanes hold neighbouring
// vectors. Within a lane experts ascend.
template <class Element, int kPerLane>
struct Lanes {
  using Unit = typename Element::Unit;
  static constexpr int kWidest = 16 / int(sizeof(Unit));
  static constexpr int kVector = kPerLane < kWidest ? kPerLane : kWidest;
  using Format = std::conditional_t<kVector % PairOf<Element>::type::kValues == 0,
                                    typename PairOf<Element>::type, Element>;
  static constexpr int kUnits = kVector / Format::kValues;
  using Whole = Access<Format, kUnits>;
  // Of 32-bit numbers in shared memory.
  static constexpr int kPlaces = kVector < 4 ? kVector : 4;
  template <class T>
  struct alignas(sizeof(T) * kPlaces) Vector {
    T of[kPlaces];
  };

  __device__ static int expert(int lane, int i) {
    return (i / kVector * kWarp + lane) * kVector + i % kVector;
  }

  // values[i] of experts that exist; the others keep what they have. `whole`: a row is made of
  // whole aligned vectors.
  __device__ static void load(const void* row, int experts, bool whole, int lane,
                              float (&values)[kPerLane]) {
    const Unit* at = static_cast<const Unit*>(row);
#pragma unroll
    for (int first = 0; first < kPerLane; first += kVector) {
      const int begin = expert(lane, first);
      if (whole) {
        if (begin >= experts) continue;
        float vector[kVector];
        // By value: one access, not one per unit.
        const typename Whole::V access = *reinterpret_cast<const typename Whole::V*>(at + begin);
        Whole::unpack(access, vector);
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[first + j] = vector[j];
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          if (begin + j < experts) Element::unpack(at[begin + j], values + first + j);
      }
    }
  }

  __device__ static void store(void* row, int experts, bool whole, int lane,
                               const float (&values)[kPerLane]) {
    Unit* at = static_cast<Unit*>(row);
#pragma unroll
    for (int first = 0; first < kPerLane; first += kVector) {
      const int begin = expert(lane, first);
      if (whole) {
        if (begin >= experts) continue;
        float vector[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) vector[j] = values[first + j];
        *reinterpret_cast<typename Whole::V*>(at + begin) = Whole::pack(vector);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          if (begin + j < experts) at[begin + j] = Element::pack(values + first + j);
      }
    }
  }

  // Copies between values[] and an array of all places, [kWarp * kPerLane, 16-byte aligned], in
  // shared memory.
  template <class T>
  __device__ static void put(T* array, int lane, const T (&values)[kPerLane]) {
    using V = Vector<T>;
#pragma unroll
    for (int first = 0; first < kPerLane; first += kPlaces) {
      V vector;
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) vector.of[j] = values[first + j];
      *reinterpret_cast<V*>(array + expert(lane, first)) = vector;
    }
  }
  template <class T>
  __device__ static void get(const T* array, int lane, T (&values)[kPerLane]) {
    using V = Vector<T>;
#pragma unroll
    for (int first = 0; first < kPerLane; first += kPlaces) {
      const V vector = *reinterpret_cast<const V*>(array + expert(lane, first));
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) values[first + j] = vector.of[j];
    }
  }

  static bool whole_vectors(const void* rows, int experts) {
    return experts % kVector == 0 && is_aligned(rows, kVector * int64_t(sizeof(Unit)));
  }
};

// The sum of a token's scores: 16 partial sums, expert e into partial sum e % 16 in ascending order,
// added up in order. `scores` [experts] and `partial` [16, 16-byte aligned] are shared memory of the
// warp; the scores were written by other lanes.
__device__ inline float sum_of_scores(const float* scores, int experts, int lane, float* partial) {
  constexpr int kPartials = 16;
  __syncwarp();
  if (lane < kPartials) {
    float sum = 0.0f;
    for (int e = lane; e < experts; e += kPartials) sum += scores[e];
    partial[lane] = sum;
  }
  __syncwarp();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartials; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(partial + i);
    total = i == 0 ? four.x : total + four.x;
    total += four.y;
    total += four.z;
    total += four.w;
  }
  return total;
}

// ---- launching -----------------------------------------------------------------------------------

// Calls body(element, per_lane): the format of the dtype, and as a constant the least power of two
// that gives every expert a place.
template <class Body>
cudaError_t for_logits(DType dtype, int experts, const Body& body) {
  const auto with_places = [&](auto element) {
    if (experts <= 32) return body(element, std::integral_constant<int, 1>{});
    if (experts <= 64) return body(element, std::integral_constant<int, 2>{});
    if (experts <= 128) return body(element, std::integral_constant<int, 4>{});
    if (experts <= 256) return body(element, std::integral_constant<int, 8>{});
    if (experts <= 512) return body(element, std::integral_constant<int, 16>{});
    if (experts <= kMaxExperts) return body(element, std::integral_constant<int, 32>{});
    return cudaErrorInvalidValue;
  };
  switch (dtype) {
    case DType::f32: return with_places(F32{});
    case DType::bf16: return with_places(Bf16{});
    case DType::f16: return with_places(F16{});
  }
  return cudaErrorInvalidValue;
}

// A warp per token, `warps` to a block.
inline cudaLaunchConfig_t warp_per_token(int64_t tokens, int warps, int64_t most_blocks,
                                         void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(tokens, warps, most_blocks));
  config.blockDim = dim3(kWarp, static_cast<unsigned>(warps));
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

}  // namespace fomoe::cuda
