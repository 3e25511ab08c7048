// float16 as CUDA's header has it: round to nearest even, NaN becomes 0x7fff.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31;
  const int fraction = value.bits & 0x3ff;
  float magnitude = std::ldexp(float(fraction), -24);
  if (exponent == 31) magnitude = fraction == 0 ? INFINITY : NAN;
  if (exponent > 0 && exponent < 31) magnitude = std::ldexp(float(1024 + fraction), exponent - 25);
  return std::copysign(magnitude, value.bits & 0x8000 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude == 0.0f) return {static_cast<uint16_t>(sign)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // One step of float16 near this value; nearbyint rounds to nearest even.
  const int step = std::max(exponent - 11, -24);
  const int steps = int(std::nearbyint(std::ldexp(magnitude, -step)));
  // A subnormal is its step count. A normal is 1024 + fraction steps, up to 2048 when the
  // rounding carried; adding them to the exponent field lets the carry do the right thing.
  const int bits = step == -24 ? steps : ((step + 24) << 10) + steps;
  return {static_cast<uint16_t>(sign | bits)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
