// The functions of GemmKernels for one instruction set: include after defining FOMOE_ISA, the
// register tile FOMOE_TILE_ROWS x FOMOE_TILE_VECTORS and, where there is a bf16 dot, FOMOE_BF16_DOT.
#pragma once

#include "../simd.h"
#include "gemm.h"
#include "gemm_epilogue.h"

namespace fomoe::cpu::FOMOE_ISA {

constexpr int kMR = FOMOE_TILE_ROWS;
constexpr int kNV = FOMOE_TILE_VECTORS;
constexpr int kNR = kNV * kLanes;

// ---- units ---------------------------------------------------------------------------------------

struct UnitF32 {
  using type = float;
  static constexpr int depth = 1;  // elements along the sum in a unit
  static vf multiply_add(vf a, vf b, vf c) { return fmadd(a, b, c); }
};

struct UnitPair {
  using type = float;  // the bits of two bf16; only ever copied
  static constexpr int depth = 2;
  static vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512BF16__) && FOMOE_VECTOR_BYTES == 64
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else  // the twin of the instruction, for machines without it
    const vu low_a = (vu)a << 16, low_b = (vu)b << 16;
    const vu high_a = (vu)a & 0xffff0000u, high_b = (vu)b & 0xffff0000u;
    return fmadd((vf)low_a, (vf)low_b, fmadd((vf)high_a, (vf)high_b, c));
#endif
  }
};

FOMOE_INLINE float make_pair(uint16_t even, uint16_t odd) {
  const uint32_t bits = uint32_t(even) | (uint32_t(odd) << 16);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class S>
FOMOE_INLINE const typename S::type* line_of(const Source& source, int64_t line) {
  const int64_t at = source.index ? source.index[line] : line;
  return static_cast<const typename S::type*>(source.data) + at * source.stride;
}

// ---- packing -------------------------------------------------------------------------------------

// One line contiguous along the sum -> units.
template <class S>
FOMOE_INLINE void copy_units(UnitF32, const typename S::type* from, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) store(to + k, load_as(S{}, from + k));
  for (; k < depth; ++k) to[k] = to_float(S{}, from[k]);
}
template <class S>
FOMOE_INLINE void copy_units(UnitPair, const uint16_t* from, int64_t depth, float* to) {
  std::memcpy(to, from, size_t(depth) * 2);
  if (depth % 2) to[depth / 2] = make_pair(from[depth - 1], 0);
}

template <class S, class U>
void pack_a_rows(Source source, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    copy_units<S>(U{}, line_of<S>(source, row + i) + k, depth, out + i * kRowStrideA);
  const int64_t units = (depth + U::depth - 1) / U::depth;
  for (int64_t i = rows; i % kMR; ++i) std::memset(out + i * kRowStrideA, 0, size_t(units) * 4);
}

// `count` neighbours of one step of the sum (of two for pairs) -> units, zero-filled to `width`.
template <class S>
FOMOE_INLINE void gather_units(UnitF32, const typename S::type* line, const typename S::type*,
                               int64_t count, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_as(S{}, line + i));
  for (; i < count; ++i) out[i] = to_float(S{}, line[i]);
  for (; i < width; ++i) out[i] = 0;
}
template <class S>
FOMOE_INLINE void gather_units(UnitPair, const uint16_t* line, const uint16_t* next, int64_t count,
                               int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = make_pair(line[i], next ? next[i] : uint16_t(0));
  for (int64_t i = count; i < width; ++i) out[i] = 0;
}

// Lines are steps of the sum: tiles of `Width` neighbours, every step of a tile in a row. A few
// lines at a time across all tiles, so that lines are read from end to end.
template <class S, class U, int Width>
void pack_steps(Source source, int64_t first, int64_t count, int64_t k, int64_t depth, float* out) {
  constexpr int64_t kLines = 8;
  const int64_t units = (depth + U::depth - 1) / U::depth;
  for (int64_t u0 = 0; u0 < units; u0 += kLines) {
    const int64_t u1 = u0 + kLines < units ? u0 + kLines : units;
    const typename S::type *line[kLines], *next[kLines];
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t step = k + u * U::depth;
      line[u - u0] = line_of<S>(source, step) + first;
      next[u - u0] =
          U::depth == 2 && step + 1 < k + depth ? line_of<S>(source, step + 1) + first : nullptr;
    }
    for (int64_t done = 0; done < count; done += Width) {
      float* tile = out + done * units;
      for (int64_t u = u0; u < u1; ++u) {
        const auto* here = line[u - u0] + done;
        const auto* there = next[u - u0] ? next[u - u0] + done : nullptr;
        if (done + Width <= count)  // a constant count, so that the copy is unrolled
          gather_units<S>(U{}, here, there, Width, Width, tile + u * Width);
        else
          gather_units<S>(U{}, here, there, count - done, Width, tile + u * Width);
      }
    }
  }
}

typedef float vf8 __attribute__((vector_size(32)));
typedef float vf8_unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t vi8 __attribute__((vector_size(32)));

FOMOE_INLINE void transpose8(vf8 (&r)[8]) {
  vf8 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shuffle(r[i], r[i + 1], (vi8){0, 8, 1, 9, 4, 12, 5, 13});
    t[i + 1] = __builtin_shuffle(r[i], r[i + 1], (vi8){2, 10, 3, 11, 6, 14, 7, 15});
  }
  vf8 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = __builtin_shuffle(t[i], t[i + 2], (vi8){0, 1, 8, 9, 4, 5, 12, 13});
    u[i + 1] = __builtin_shuffle(t[i], t[i + 2], (vi8){2, 3, 10, 11, 6, 7, 14, 15});
    u[i + 2] = __builtin_shuffle(t[i + 1], t[i + 3], (vi8){0, 1, 8, 9, 4, 5, 12, 13});
    u[i + 3] = __builtin_shuffle(t[i + 1], t[i + 3], (vi8){2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shuffle(u[i], u[i + 4], (vi8){0, 1, 2, 3, 8, 9, 10, 11});
    r[i + 4] = __builtin_shuffle(u[i], u[i + 4], (vi8){4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// Eight units of one line, converted. (Through a reference: a wide vector returned by value would
// depend on the instruction set's calling convention.)
template <class S>
FOMOE_INLINE void load_units8(UnitF32, const typename S::type* from, vf8& to) {
  if constexpr (sizeof(typename S::type) == 4) {
    to = *reinterpret_cast<const vf8_unaligned*>(from);
  } else if constexpr (kLanes == 8) {
    to = (vf8)load_as(S{}, from);
  } else {
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = to_float(S{}, from[i]);
    to = *reinterpret_cast<const vf8_unaligned*>(lanes);
  }
}
template <class S>
FOMOE_INLINE void load_units8(UnitPair, const uint16_t* from, vf8& to) {
  to = *reinterpret_cast<const vf8_unaligned*>(from);
}

// B with lines = columns: panels of kNR columns, transposed eight by eight.
template <class S, class U>
void pack_b_columns(Source source, int64_t column, int64_t columns, int64_t k, int64_t depth,
                    float* out) {
  const int64_t units = (depth + U::depth - 1) / U::depth;
  const int64_t whole = depth / (8 * U::depth) * 8;  // units packed in full eights
  for (int64_t done = 0; done < columns; done += kNR, out += units * kNR) {
    for (int64_t j = 0; j < kNR; j += 8) {
      const int64_t live = columns - done - j < 8 ? columns - done - j : 8;
      if (live <= 0) {
        for (int64_t u = 0; u < units; ++u) std::memset(out + u * kNR + j, 0, 32);
        continue;
      }
      const typename S::type* line[8];
      for (int i = 0; i < 8; ++i)
        line[i] = line_of<S>(source, column + done + j + (i < live ? i : 0)) + k;
      for (int64_t u = 0; u < whole; u += 8) {
        vf8 r[8];
        for (int i = 0; i < 8; ++i) {
          r[i] = vf8{};
          if (i < live) load_units8<S>(U{}, line[i] + u * U::depth, r[i]);
        }
        transpose8(r);
        for (int i = 0; i < 8; ++i)
          *reinterpret_cast<vf8_unaligned*>(out + (u + i) * kNR + j) = r[i];
      }
      if (whole == units) continue;
      float tail[kLanes > 8 ? kLanes : 8] = {};
      for (int i = 0; i < 8; ++i) {
        if (i < live)
          copy_units<S>(U{}, line[i] + whole * U::depth, depth - whole * U::depth, tail);
        for (int64_t u = whole; u < units; ++u)
          out[u * kNR + j + i] = i < live ? tail[u - whole] : 0.0f;
      }
    }
  }
}

// ---- the register tile -----------------------------------------------------------------------------

template <class U, bool kByRows>
FOMOE_INLINE void multiply_tile(const float* __restrict a, const float* __restrict b,
                                float* __restrict c, int64_t stride, int64_t units,
                                bool accumulate) {
  vf sum[kMR][kNV];
#pragma GCC unroll 32
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) sum[i][j] = accumulate ? load(c + i * stride + j * kLanes) : vf{};
#pragma GCC unroll 4
  for (int64_t u = 0; u < units; ++u) {
    vf right[kNV];
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) right[j] = load(b + u * kNR + j * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < kMR; ++i) {
      const vf left = splat(kByRows ? a[i * kRowStrideA + u] : a[u * kMR + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) sum[i][j] = U::multiply_add(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) store(c + i * stride + j * kLanes, sum[i][j]);
}

template <class U, bool kByRows>
void multiply(const float* a, const float* b, float* c, int64_t stride, int64_t rows,
              int64_t columns, int64_t units, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kNR) {
    const float* panel = b + j * units;
    for (int64_t i = 0; i < rows; i += kMR)
      multiply_tile<U, kByRows>(a + i * (kByRows ? kRowStrideA : units), panel, c + i * stride + j,
                                stride, units, accumulate);
  }
}

// ---- from run-time enums to templates --------------------------------------------------------------

template <class F>
void with_storage(DType dtype, F f) {
  if (dtype == DType::f32) return f(F32{});
  if (dtype == DType::bf16) return f(BF16{});
  return f(F16{});
}

// f(storage, unit); pairs exist for bf16 only.
template <class F>
void with_units(DType dtype, Unit unit, F f) {
#ifdef FOMOE_BF16_DOT
  if (unit == Unit::bf16_pair) return f(BF16{}, UnitPair{});
#endif
  (void)unit;
  with_storage(dtype, [&](auto s) { f(s, UnitF32{}); });
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// f(storage, activation, gated)
template <class F>
void with_activation(DType dtype, Activation activation, F f) {
  with_storage(dtype, [&](auto s) {
    switch (activation) {
      case Activation::swiglu: return f(s, Silu{}, Yes{});
      case Activation::geglu: return f(s, Gelu{}, Yes{});
      case Activation::silu: return f(s, Silu{}, No{});
      case Activation::relu2: return f(s, Relu2{}, No{});
      case Activation::gelu: return f(s, Gelu{}, No{});
      case Activation::clamped_swiglu: return f(s, ClampedSwiglu{}, Yes{});
    }
  });
}

extern const GemmKernels gemm_table;
const GemmKernels gemm_table = {
#define FOMOE_STRING2(x) #x
#define FOMOE_STRING(x) FOMOE_STRING2(x)
    .name = FOMOE_STRING(FOMOE_ISA),
    .mr = kMR,
    .nr = kNR,
#ifdef FOMOE_BF16_DOT
    .bf16_pairs = true,
#else
    .bf16_pairs = false,
#endif
    .pack_a_rows =
        [](DType dtype, Unit unit, Source source, int64_t row, int64_t rows, int64_t k,
           int64_t depth, void* out) {
          with_units(dtype, unit, [&](auto s, auto u) {
            pack_a_rows<decltype(s), decltype(u)>(source, row, rows, k, depth,
                                                  static_cast<float*>(out));
          });
        },
    .pack_a_columns =
        [](DType dtype, Unit unit, Source source, int64_t row, int64_t rows, int64_t k,
           int64_t depth, void* out) {
          with_units(dtype, unit, [&](auto s, auto u) {
            pack_steps<decltype(s), decltype(u), kMR>(source, row, rows, k, depth,
                                                      static_cast<float*>(out));
          });
        },
    .pack_b_columns =
        [](DType dtype, Unit unit, Source source, int64_t column, int64_t columns, int64_t k,
           int64_t depth, void* out) {
          with_units(dtype, unit, [&](auto s, auto u) {
            pack_b_columns<decltype(s), decltype(u)>(source, column, columns, k, depth,
                                                     static_cast<float*>(out));
          });
        },
    .pack_b_rows =
        [](DType dtype, Unit unit, Source source, int64_t column, int64_t columns, int64_t k,
           int64_t depth, void* out) {
          with_units(dtype, unit, [&](auto s, auto u) {
            pack_steps<decltype(s), decltype(u), kNR>(source, column, columns, k, depth,
                                                      static_cast<float*>(out));
          });
        },
    .multiply =
        [](Unit unit, bool a_by_rows, const void* a, const void* b, float* c, int64_t stride,
           int64_t rows, int64_t columns, int64_t units, bool accumulate) {
          const auto* left = static_cast<const float*>(a);
          const auto* right = static_cast<const float*>(b);
#ifdef FOMOE_BF16_DOT
          if (unit == Unit::bf16_pair)
            return (a_by_rows ? multiply<UnitPair, true>
                              : multiply<UnitPair, false>)(left, right, c, stride, rows, columns,
                                                           units, accumulate);
#endif
          (void)unit;
          (a_by_rows ? multiply<UnitF32, true> : multiply<UnitF32, false>)(left, right, c, stride,
                                                                           rows, columns, units,
                                                                           accumulate);
        },
    .load =
        [](DType dtype, const void* in, int64_t count, float* out) {
          with_storage(dtype, [&](auto s) {
            using Type = typename decltype(s)::type;
            copy_units<decltype(s)>(UnitF32{}, static_cast<const Type*>(in), count, out);
          });
        },
    .store =
        [](DType dtype, Block block, const void* bias, void* out, int64_t stride) {
          with_storage(dtype, [&](auto s) { store_block<decltype(s)>(block, bias, out, stride); });
        },
    .add = [](Block block, float* out, int64_t stride) { add_block(block, out, stride); },
    .add_scaled =
        [](DType dtype, const void* in, float factor, int64_t count, float* sum) {
          with_storage(dtype, [&](auto s) { add_scaled<decltype(s)>(in, factor, count, sum); });
        },
    .dot =
        [](DType dtype, const void* a, const void* b, int64_t count) {
          float sum = 0;
          with_storage(dtype, [&](auto s) { sum = dot<decltype(s)>(a, b, count); });
          return sum;
        },
    .activate =
        [](DType dtype, Activation activation, Block block, int64_t up_column, const void* bias,
           void* act, int64_t expert_size, void* preact) {
          with_activation(dtype, activation, [&](auto s, auto a, auto gated) {
            activate<decltype(s), decltype(a), decltype(gated)::value>(block, up_column, bias, act,
                                                                       expert_size, preact);
          });
        },
    .activate_backward =
        [](DType dtype, Activation activation, Block block, const void* preact, int64_t expert_size,
           const float* weights, void* grad_preact, void* scaled_act, float* dot) {
          with_activation(dtype, activation, [&](auto s, auto a, auto gated) {
            activate_backward<decltype(s), decltype(a), decltype(gated)::value>(
                block, preact, expert_size, weights, grad_preact, scaled_act, dot);
          });
        },
};

}  // namespace fomoe::cpu::FOMOE_ISA
