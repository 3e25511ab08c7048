// What happens to a finished block of a grouped GEMM, and sums over rows, for one instruction set:
// included by gemm_impl.h.
#pragma once

#include "../simd.h"
#include "gemm.h"

namespace fomoe::cpu::FOMOE_ISA {

// ---- activations -----------------------------------------------------------------------------------

// value: activation(gate); slope: its derivative. A gated one also says what the up projection
// counts for: up_value(up), up_slope its derivative.
struct Silu {
  static vf value(vf x) { return x * sigmoid(x); }
  static void both(vf x, vf& value, vf& slope) {
    const vf s = sigmoid(x);
    value = x * s;
    slope = s + value * (1.0f - s);
  }
  static vf up_value(vf up) { return up; }
  static vf up_slope(vf) { return splat(1.0f); }
};
// 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3)
struct Gelu {
  static constexpr float kTwoZ = 1.5957691216057308f;
  static vf value(vf x) { return x * sigmoid(kTwoZ * (x + 0.044715f * x * x * x)); }
  static void both(vf x, vf& value, vf& slope) {
    const vf s = sigmoid(kTwoZ * (x + 0.044715f * x * x * x));
    value = x * s;
    slope = s + value * (1.0f - s) * (kTwoZ * (1.0f + 3.0f * 0.044715f * x * x));
  }
  static vf up_value(vf up) { return up; }
  static vf up_slope(vf) { return splat(1.0f); }
};
struct Relu2 {
  static vf value(vf x) {
    const vf positive = select(x > 0.0f, x, vf{});
    return positive * positive;
  }
  static void both(vf x, vf& value, vf& slope) {
    const vf positive = select(x > 0.0f, x, vf{});
    value = positive * positive;
    slope = 2.0f * positive;
  }
};
struct ClampedSwiglu {
  static constexpr float kLimit = kClampedSwigluLimit, kSlope = kClampedSwigluSlope;
  static vf below(vf x) { return select(x > kLimit, splat(kLimit), x); }
  static vf value(vf x) {
    x = below(x);
    return x * sigmoid(kSlope * x);
  }
  static void both(vf x, vf& value, vf& slope) {
    const vf g = below(x), s = sigmoid(kSlope * g);
    value = g * s;
    slope = select(x > kLimit, vf{}, s + kSlope * value * (1.0f - s));
  }
  static vf up_value(vf up) { return 1.0f + select(up < -kLimit, splat(-kLimit), below(up)); }
  static vf up_slope(vf up) { return select((up > kLimit) | (up < -kLimit), vf{}, splat(1.0f)); }
};

template <class S>
FOMOE_INLINE vf load_some(const typename S::type* p, int64_t count) {
  return count >= kLanes ? load_as(S{}, p) : load_part(S{}, p, count);
}
template <class S>
FOMOE_INLINE void store_some(typename S::type* p, vf v, int64_t count) {
  if (count >= kLanes)
    store_as(S{}, p, v);
  else
    store_part(S{}, p, v, count);
}

template <class S>
void store_block(Block block, const void* bias_bytes, void* out_bytes, int64_t stride) {
  auto* bias = static_cast<const typename S::type*>(bias_bytes);
  auto* out = static_cast<typename S::type*>(out_bytes);
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t j = 0; j < block.columns; j += kLanes) {
      const int64_t count = block.columns - j;
      vf value = load(block.c + i * block.stride + j);
      if (bias) value += load_some<S>(bias + j, count);
      store_some<S>(out + i * stride + j, value, count);
    }
}

FOMOE_INLINE void add_block(Block block, float* out, int64_t stride) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const float* c = block.c + i * block.stride;
    float* to = out + i * stride;
    int64_t j = 0;
    for (; j + kLanes <= block.columns; j += kLanes) store(to + j, load(to + j) + load(c + j));
    for (; j < block.columns; ++j) to[j] += c[j];
  }
}

// `sum` has room for whole vectors.
template <class S>
void add_scaled(const void* in_bytes, float factor, int64_t count, float* sum) {
  auto* in = static_cast<const typename S::type*>(in_bytes);
  for (int64_t j = 0; j < count; j += kLanes)
    store(sum + j, fmadd(splat(factor), load_some<S>(in + j, count - j), load(sum + j)));
}

template <class S>
float dot(const void* a_bytes, const void* b_bytes, int64_t count) {
  auto* a = static_cast<const typename S::type*>(a_bytes);
  auto* b = static_cast<const typename S::type*>(b_bytes);
  WideSum sum;
  for (int64_t j = 0; j < count; j += kSumLanes)
    for (int v = 0; v < kSumVectors && j + v * kLanes < count; ++v) {
      const int64_t at = j + v * kLanes;
      sum.part[v] =
          fmadd(load_some<S>(a + at, count - at), load_some<S>(b + at, count - at), sum.part[v]);
    }
  return sum.total();
}

template <class S, class Act, bool kGated>
void activate(Block block, int64_t up_column, const void* bias_bytes, void* act_bytes,
              int64_t expert_size, void* preact_bytes) {
  auto* bias = static_cast<const typename S::type*>(bias_bytes);
  auto* act = static_cast<typename S::type*>(act_bytes);
  auto* preact = static_cast<typename S::type*>(preact_bytes);
  const int64_t preact_stride = kGated ? 2 * expert_size : expert_size;
  for (int64_t i = 0; i < block.rows; ++i) {
    const float* c = block.c + i * block.stride;
    for (int64_t j = 0; j < block.columns; j += kLanes) {
      const int64_t count = block.columns - j;
      vf gate = load(c + j);
      if (bias) gate += load_some<S>(bias + j, count);
      vf value = Act::value(gate);
      if (preact) store_some<S>(preact + i * preact_stride + j, gate, count);
      if constexpr (kGated) {
        vf up = load(c + up_column + j);
        if (bias) up += load_some<S>(bias + expert_size + j, count);
        value *= Act::up_value(up);
        if (preact) store_some<S>(preact + i * preact_stride + expert_size + j, up, count);
      }
      store_some<S>(act + i * expert_size + j, value, count);
    }
  }
}

template <class S, class Act, bool kGated>
void activate_backward(Block block, const void* preact_bytes, int64_t expert_size,
                       const float* weights, void* grad_bytes, void* scaled_bytes, float* dot) {
  auto* preact = static_cast<const typename S::type*>(preact_bytes);
  auto* grad = static_cast<typename S::type*>(grad_bytes);
  auto* scaled = static_cast<typename S::type*>(scaled_bytes);
  const int64_t stride = kGated ? 2 * expert_size : expert_size;
  for (int64_t i = 0; i < block.rows; ++i) {
    const float* c = block.c + i * block.stride;
    const vf weight = splat(weights ? weights[i] : 1.0f);
    vf total = {};
    for (int64_t j = 0; j < block.columns; j += kLanes) {
      const int64_t count = block.columns - j;
      const vf gate = load_some<S>(preact + i * stride + j, count);
      vf value, slope;
      Act::both(gate, value, slope);
      vf through = load(c + j);  // zero past the last column, as packed B is
      vf act = value;
      if constexpr (kGated) {
        const vf up = load_some<S>(preact + i * stride + expert_size + j, count);
        const vf up_value = Act::up_value(up);
        act *= up_value;
        slope *= up_value;
        value *= Act::up_slope(up);
      }
      total = fmadd(act, through, total);
      through *= weight;
      store_some<S>(grad + i * stride + j, slope * through, count);
      if (kGated) store_some<S>(grad + i * stride + expert_size + j, value * through, count);
      if (scaled) store_some<S>(scaled + i * expert_size + j, act * weight, count);
    }
    if (dot) dot[i] = sum_lanes(total);
  }
}

}  // namespace fomoe::cpu::FOMOE_ISA
