// The activations of experts on pre-activations gate and up, and their slopes. The activation is a
// template parameter, so that kernels have no branch per element.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../kernels.h"
#include "../arch/approximate.cuh"

namespace fomoe::cuda {

// kExact: fp32 precision; else precise enough for 16-bit results.
template <bool kExact>
__device__ inline float sigmoid(float x) {
  if constexpr (kExact) return 1.0f / (1.0f + expf(-x));
  constexpr float kLog2E = 1.4426950408889634f;
  return reciprocal_approximate(1.0f + exp2_approximate(x * -kLog2E));
}

struct Curve {
  float value, slope;
};

// x * sigmoid(steepness * x)
template <bool kExact>
__device__ inline Curve swish(float x, float steepness) {
  const float s = sigmoid<kExact>(steepness * x);
  const float value = x * s;
  return {value, fmaf(steepness * value, 1.0f - s, s)};
}

// 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3)
template <bool kExact>
__device__ inline Curve gelu(float x) {
  constexpr float kTwoZ = 1.5957691216057308f, kCube = 0.044715f;
  const float square = kCube * x * x;
  const float s = sigmoid<kExact>(kTwoZ * fmaf(square, x, x));
  const float value = x * s;
  return {value, fmaf(value * (1.0f - s), kTwoZ * fmaf(3.0f, square, 1.0f), s)};
}

// An activation and its derivatives.
struct Activated {
  float act, gate_slope, up_slope;
};

// Activations that are not gated ignore `up`.
template <Activation kActivation, bool kExact>
__device__ inline Activated activate(float gate, float up) {
  if constexpr (kActivation == Activation::clamped_swiglu) {
    constexpr float kLimit = kClampedSwigluLimit;  // compared so that NaN stays NaN
    const float lower = gate > kLimit ? kLimit : gate;
    const float factor = (up > kLimit ? kLimit : up < -kLimit ? -kLimit : up) + 1.0f;
    const Curve curve = swish<kExact>(lower, kClampedSwigluSlope);
    return {curve.value * factor, gate > kLimit ? 0.0f : curve.slope * factor,
            fabsf(up) > kLimit ? 0.0f : curve.value};
  } else if constexpr (kActivation == Activation::relu2) {
    const float positive = fmaxf(gate, 0.0f);
    return {positive * positive, 2.0f * positive, 0.0f};
  } else {
    constexpr bool kSwish = kActivation == Activation::swiglu || kActivation == Activation::silu;
    const Curve curve = kSwish ? swish<kExact>(gate, 1.0f) : gelu<kExact>(gate);
    if constexpr (is_gated(kActivation))
      return {curve.value * up, curve.slope * up, curve.value};
    else
      return {curve.value, curve.slope, 0.0f};
  }
}

// X(name, ...) for every activation (kernels.h) that kernels are compiled for.
#ifdef FOMOE_FEW_KERNELS  // tests leave out activations that differ only by a formula
#define FOMOE_FOR_ACTIVATIONS(X, ...) \
  X(swiglu, __VA_ARGS__) X(clamped_swiglu, __VA_ARGS__) X(relu2, __VA_ARGS__)
#else
#define FOMOE_FOR_ACTIVATIONS(X, ...) \
  X(swiglu, __VA_ARGS__)              \
  X(geglu, __VA_ARGS__)               \
  X(clamped_swiglu, __VA_ARGS__) X(silu, __VA_ARGS__) X(relu2, __VA_ARGS__) X(gelu, __VA_ARGS__)
#endif

// Calls body(std::integral_constant<Activation, activation>), which returns a cudaError_t.
template <class Body>
cudaError_t with_activation(Activation activation, const Body& body) {
  switch (activation) {
#define FOMOE_CASE(name, ...) \
  case Activation::name: return body(std::integral_constant<Activation, Activation::name>{});
    FOMOE_FOR_ACTIVATIONS(FOMOE_CASE)
#undef FOMOE_CASE
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fomoe::cuda
