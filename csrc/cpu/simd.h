// Vectors of floats for one instruction set, written once with GCC vector extensions.
//
// Every translation unit that includes this file defines FOMOE_ISA (a namespace name) first and is
// compiled with that instruction set's flags; everything lives in that namespace, so that the
// linker never mixes code of two instruction sets. FOMOE_VECTOR_BYTES overrides the width, which
// lets a narrower machine run the code of a wider one (tests/native).
#pragma once

#ifndef FOMOE_ISA
#error "define FOMOE_ISA before including simd.h"
#endif

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#ifndef FOMOE_VECTOR_BYTES
#if defined(__AVX512F__)
#define FOMOE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FOMOE_VECTOR_BYTES 32
#else
#define FOMOE_VECTOR_BYTES 16
#endif
#endif

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kLanes = FOMOE_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(FOMOE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FOMOE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FOMOE_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FOMOE_VECTOR_BYTES / 2)));
typedef float vf_unaligned __attribute__((vector_size(FOMOE_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vh_unaligned
    __attribute__((vector_size(FOMOE_VECTOR_BYTES / 2), aligned(2), may_alias));

#define FOMOE_INLINE static inline __attribute__((always_inline))

FOMOE_INLINE vf splat(float x) { return x - vf{}; }
FOMOE_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
FOMOE_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }

FOMOE_INLINE vf fmadd(vf a, vf b, vf c) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && FOMOE_VECTOR_BYTES == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a * b + c rounded once on every machine: for results that must not depend on the instruction set.
FOMOE_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__FMA__)
  return fmadd(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

FOMOE_INLINE bool any(vi mask) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && FOMOE_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// ---- storage types -----------------------------------------------------------------------------

struct F32 {
  using type = float;
};
struct BF16 {
  using type = uint16_t;
};
struct F16 {
  using type = uint16_t;
};

FOMOE_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {
    // Exact also for subnormals: the float unit does the normalisation.
    const uint32_t shifted = magnitude << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

FOMOE_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                  // subnormal half: the FPU rounds
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return uint16_t(sign | (bits >> 13));
#endif
}

FOMOE_INLINE uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FOMOE_INLINE float to_float(F32, float x) { return x; }
FOMOE_INLINE float to_float(F16, uint16_t h) { return half_to_float(h); }
FOMOE_INLINE float to_float(BF16, uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
FOMOE_INLINE void from_float(F32, float* p, float x) { *p = x; }
FOMOE_INLINE void from_float(BF16, uint16_t* p, float x) { *p = float_to_bfloat(x); }
FOMOE_INLINE void from_float(F16, uint16_t* p, float x) { *p = float_to_half(x); }

FOMOE_INLINE vf load_as(F32, const float* p) { return load(p); }
FOMOE_INLINE vf load_as(BF16, const uint16_t* p) {
  const vh half = *reinterpret_cast<const vh_unaligned*>(p);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
FOMOE_INLINE vf load_as(F16, const uint16_t* p) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && FOMOE_VECTOR_BYTES == 32
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(p[i]);
  return out;
#endif
}

FOMOE_INLINE void store_as(F32, float* p, vf v) { store(p, v); }
FOMOE_INLINE void store_as(BF16, uint16_t* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vi is_nan = (vi)((bits & 0x7fffffffu) > 0x7f800000u);
  const vu chosen = (vu)((is_nan & (vi)quiet) | (~is_nan & (vi)rounded));
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(chosen, vh);
}
FOMOE_INLINE void store_as(F16, uint16_t* p, vf v) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FOMOE_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
}

// ---- the first `count` lanes (count < kLanes), through memory: only at the ends of rows ----------

template <class S>
FOMOE_INLINE vf load_part(S s, const typename S::type* p, int64_t count) {
  typename S::type lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(lanes[0]));
  return load_as(s, lanes);
}
template <class S>
FOMOE_INLINE void store_part(S s, typename S::type* p, vf v, int64_t count) {
  typename S::type lanes[kLanes];
  store_as(s, lanes, v);
  std::memcpy(p, lanes, size_t(count) * sizeof(lanes[0]));
}

// ---- functions -----------------------------------------------------------------------------------

FOMOE_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// exp by 2^n * p(r), |r| <= ln2/2, p the Taylor polynomial of degree 7 (error below 2 ulp).
// Arguments are clamped to where the result is a normal float.
FOMOE_INLINE vf exp(vf x) {
  x = select(x < -87.3f, splat(-87.3f), x);
  x = select(x > 88.3f, splat(88.3f), x);
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = fused(x, splat(1.44269504f), shift) - shift;
  vf r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  vf p = splat(1.0f / 5040.0f);
  p = fused(p, r, splat(1.0f / 720.0f));
  p = fused(p, r, splat(1.0f / 120.0f));
  p = fused(p, r, splat(1.0f / 24.0f));
  p = fused(p, r, splat(1.0f / 6.0f));
  p = fused(p, r, splat(0.5f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  const vi exponent = __builtin_convertvector(n, vi) << 23;
  return (vf)((vi)p + exponent);
}

// The natural logarithm of positive normal numbers: x = m * 2^n, m around 1, and a polynomial of
// degree 8 in m - 1 (error below 2 ulp away from 1).
FOMOE_INLINE vf log(vf x) {
  const vi bits = (vi)x;
  const vi n = (bits - 0x3f3504f3) >> 23;  // m from sqrt(1/2) to sqrt(2)
  const vf f = (vf)(bits - (n << 23)) - 1.0f;
  const vf exponent = __builtin_convertvector(n, vf);
  const vf square = f * f;
  vf p = splat(7.0376836292e-2f);
  p = fused(p, f, splat(-1.1514610310e-1f));
  p = fused(p, f, splat(1.1676998740e-1f));
  p = fused(p, f, splat(-1.2420140846e-1f));
  p = fused(p, f, splat(1.4249322787e-1f));
  p = fused(p, f, splat(-1.6668057665e-1f));
  p = fused(p, f, splat(2.0000714765e-1f));
  p = fused(p, f, splat(-2.4999993993e-1f));
  p = fused(p, f, splat(3.3333331174e-1f));
  p = p * f * square;
  p = fused(exponent, splat(-2.12194440e-4f), p);
  p = fused(square, splat(-0.5f), p);
  return fused(exponent, splat(0.693359375f), f + p);
}

FOMOE_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Sums in kSumLanes interleaved partial sums, element i into partial sum i % kSumLanes, added up in
// order at the end: the same bits for every vector width up to 16 lanes.
constexpr int kSumLanes = 16;
constexpr int kSumVectors = kSumLanes / kLanes;
struct WideSum {
  vf part[kSumVectors] = {};
  float total() const {
    float lanes[kSumLanes];
    for (int i = 0; i < kSumVectors; ++i) store(lanes + i * kLanes, part[i]);
    float sum = lanes[0];
    for (int i = 1; i < kSumLanes; ++i) sum += lanes[i];
    return sum;
  }
};

FOMOE_INLINE float sum_lanes(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

}  // namespace fomoe::cpu::FOMOE_ISA
