// Functions that the hardware computes in one instruction: relative error about 2^-22; denormal arguments
// and results are replaced by zeros of the same sign.
#pragma once

#include <cuda_runtime.h>

#ifdef FOMOE_EMULATED
#include <cmath>
#include <limits>
#endif

namespace fomoe::cuda {

#ifdef FOMOE_EMULATED

inline float denormal_to_zero(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
// 2^x. 0 for -inf; inf for inf and on overflow.
inline float exp2_approximate(float x) { return denormal_to_zero(std::exp2(x)); }
// 1 / x. +-inf for +-0 and denormals, +-0 for +-inf and beyond 2^126.
inline float reciprocal_approximate(float x) {
  return denormal_to_zero(1.0f / denormal_to_zero(x));
}
// log2(x), between 0.5 and 2 with an absolute error of 2^-22. -inf for +-0 and denormals, NaN below.
inline float log2_approximate(float x) { return std::log2(denormal_to_zero(x)); }

#else

__device__ inline float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ inline float reciprocal_approximate(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
__device__ inline float log2_approximate(float x) {
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
}

#endif

}  // namespace fomoe::cuda
