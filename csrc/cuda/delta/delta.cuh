// Values and payloads of the delta codecs (kernels.h), four neighbouring values to a lane.
//
// A warp takes a tile of 128 values: one block of 128 or two of 64. The bytes of four values in a
// payload is a Piece; payloads may be at any address, so the width of accesses to pieces is known only at
// run time. Every operation on values rounds once: this is compiled with -fmad=false.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../formats.cuh"

namespace fomoe::cuda::delta {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kFour = 4;
constexpr int kTileValues = kFour * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

// ---- alignment -----------------------------------------------------------------------------------

inline uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// The largest power of two, up to 16, that divides all of the addresses and distances.
template <class... Numbers>
int alignment_of(Numbers... numbers) {
  const uint64_t bits = (uint64_t(numbers) | ... | 16u);
  return int(bits & (~bits + 1));
}

// ---- fp32 values ---------------------------------------------------------------------------------

// How many of the four values from i on there are.
__device__ inline int present_of(int64_t i, int64_t numel) {
  return int(max(int64_t(0), min(int64_t(kFour), numel - i)));
}

// Values i .. i+3; 0 where not present.
__device__ inline void load_four(const float* values, int64_t i, int present, bool aligned,
                                 float (&v)[kFour]) {
  if (aligned && present == kFour) {
    const float4 four = *reinterpret_cast<const float4*>(values + i);
    v[0] = four.x;
    v[1] = four.y;
    v[2] = four.z;
    v[3] = four.w;
  } else {
#pragma unroll
    for (int e = 0; e < kFour; ++e) v[e] = e < present ? values[i + e] : 0.0f;
  }
}

__device__ inline void store_four(float* values, int64_t i, int present, bool aligned,
                                  const float (&v)[kFour]) {
  if (aligned && present == kFour) {
    // The compiler would merge a plain store with those below and split it again. It is not read soon.
    __stcs(reinterpret_cast<float4*>(values + i), make_float4(v[0], v[1], v[2], v[3]));
  } else {
#pragma unroll
    for (int e = 0; e < kFour; ++e)
      if (e < present) values[i + e] = v[e];
  }
}

// ---- pieces of a payload -------------------------------------------------------------------------

template <int kBytes>
struct alignas(kBytes < 4 ? 4 : kBytes) Piece {
  uint32_t word[(kBytes + 3) / 4];
};

// The first `bytes` bytes, a multiple of the Unit's; zeros behind them.
template <class Unit, int kBytes>
__device__ inline Piece<kBytes> load_units(const uint8_t* p, int bytes) {
  Piece<kBytes> piece{};
#pragma unroll
  for (int at = 0; at < kBytes; at += int(sizeof(Unit)))
    if (at < bytes)
      piece.word[at / 4] |= uint32_t(*reinterpret_cast<const Unit*>(p + at)) << (8 * (at % 4));
  return piece;
}

template <class Unit, int kBytes>
__device__ inline void store_units(uint8_t* p, int bytes, const Piece<kBytes>& piece) {
#pragma unroll
  for (int at = 0; at < kBytes; at += int(sizeof(Unit)))
    if (at < bytes)
      *reinterpret_cast<Unit*>(p + at) = static_cast<Unit>(piece.word[at / 4] >> (8 * (at % 4)));
}

// Of so many bytes: what one access takes where they are aligned to their size or, with the steps of
// blocks between, to 2 bytes; and to the size of an element.
template <int kBytes>
using Whole = std::conditional_t<kBytes == 1, uint8_t, uint16_t>;
template <int kBytes>
using Element = std::conditional_t<kBytes == 16, uint32_t, Whole<kBytes>>;

// A piece of which there are `bytes` bytes.
template <int kBytes>
__device__ inline Piece<kBytes> load_piece(const uint8_t* p, int alignment, int bytes) {
  if constexpr (kBytes > 4)
    if (bytes == kBytes && alignment >= kBytes) return *reinterpret_cast<const Piece<kBytes>*>(p);
  if (bytes == kBytes && alignment >= int(sizeof(Element<kBytes>)))
    return load_units<Element<kBytes>, kBytes>(p, kBytes);
  return load_units<uint8_t, kBytes>(p, bytes);
}

template <int kBytes>
__device__ inline void store_piece(uint8_t* p, int alignment, int bytes,
                                   const Piece<kBytes>& piece) {
  if (kBytes > 4 && bytes == kBytes && alignment >= kBytes) {
    *reinterpret_cast<Piece<kBytes>*>(p) = piece;
  } else if (bytes == kBytes && alignment >= int(sizeof(Element<kBytes>))) {
    store_units<Element<kBytes>, kBytes>(p, kBytes, piece);
  } else {
    store_units<uint8_t, kBytes>(p, bytes, piece);
  }
}

// A bf16 at any address.
__device__ inline uint16_t load_bf16(const uint8_t* p, int alignment) {
  return static_cast<uint16_t>(load_piece<2>(p, alignment, 2).word[0]);
}
__device__ inline void store_bf16(uint8_t* p, int alignment, uint16_t bits) {
  store_piece<2>(p, alignment, 2, {{bits}});
}
__device__ inline float float_of(uint16_t bf16) { return __uint_as_float(uint32_t(bf16) << 16); }

// ---- formats of blocks ---------------------------------------------------------------------------

// Bits of a value in a payload, bytes of four values; the highest code of int8 and int4.
template <Format F>
constexpr int kBits = F == Format::fp32   ? 32
                      : F == Format::bf16 ? 16
                      : F == Format::int8 ? 8
                      : F == Format::int4 ? 4
                                          : 2;
template <Format F>
constexpr int kFourBytes = kFour * kBits<F> / 8;
template <Format F>
constexpr int kTop = F == Format::int8 ? 127 : 7;
template <Format F>
constexpr bool kHasSteps = kBits<F> <= 8;
template <Format F>
using Codes = Piece<kFourBytes<F>>;

// Bytes that so many of four values take.
template <Format F>
__device__ inline int bytes_of(int present) {
  return (present * kBits<F> + 7) / 8;
}

// Where in a payload the step of value i's block stands, and the codes from value i on.
template <Format F, int kBlock>
struct Place {
  static constexpr int kBlockBytes = 2 + kBlock * kBits<F> / 8;
  int64_t step, codes;
  __device__ explicit Place(int64_t i) : step(0), codes(i * kBits<F> / 8) {
    if constexpr (kHasSteps<F>) {
      step = i / kBlock * kBlockBytes;
      codes = step + 2 + i % kBlock * kBits<F> / 8;
    }
  }
};

// The alignment of payloads at this distance, on which accesses may rely.
inline int payload_alignment(const DeltaCodec& codec, const void* payload, int64_t stride) {
  const bool whole = codec.format == Format::fp32 || codec.format == Format::bf16;
  return alignment_of(address(payload), stride, whole ? 16 : 2);
}

// Decoding and encoding with the step of a block.
struct Scale {
  float step, inverse;
};

// The values of four codes.
template <Format F>
__device__ inline void decode_four(const Codes<F>& codes, float step, float (&v)[kFour]) {
#pragma unroll
  for (int e = 0; e < kFour; ++e) {
    if constexpr (F == Format::fp32) {
      v[e] = __uint_as_float(codes.word[e]);
    } else if constexpr (F == Format::bf16) {
      v[e] = float_of(static_cast<uint16_t>(codes.word[e / 2] >> (16 * (e % 2))));
    } else if constexpr (F == Format::int2) {
      v[e] = float(2 * int(codes.word[0] >> (2 * e) & 3) - 3) * step;
    } else {
      constexpr int kUnused = 32 - kBits<F>;
      // The code at the top of a word, then down with its sign.
      v[e] = float(int(codes.word[0] << (kUnused - kBits<F> * e)) >> kUnused) * step;
    }
  }
}

// u of stochastic rounding, 0 <= u < 1.
__device__ inline float uniform(uint64_t seed, uint64_t index) {
  return float(random_bits(seed, index) >> 8) * 0x1p-24f;
}

// The codes of four values of a block that is not all zeros; random bits from `index` on.
template <Format F>
__device__ inline Codes<F> encode_four(const float (&v)[kFour], int present, Scale scale,
                                       bool stochastic, uint64_t seed, uint64_t index) {
  Codes<F> codes{};
#pragma unroll
  for (int e = 0; e < kFour; ++e) {
    if constexpr (F == Format::fp32) {
      codes.word[e] = __float_as_uint(v[e]);
    } else if constexpr (F == Format::bf16) {
      codes.word[e / 2] |= uint32_t(Bf16::pack(&v[e])) << (16 * (e % 2));
    } else {
      constexpr int kLow = F == Format::int2 ? 0 : -kTop<F>;
      constexpr int kHigh = F == Format::int2 ? 3 : kTop<F>;
      float t = v[e] * scale.inverse;
      if constexpr (F == Format::int2) t = t + 1.5f;
      const int rounded =
          stochastic ? static_cast<int>(floorf(t + uniform(seed, index + e))) : __float2int_rn(t);
      const int code = max(kLow, min(kHigh, rounded));
      if (e < present && scale.step != 0.0f)
        codes.word[0] |= (uint32_t(code) & ((1u << kBits<F>)-1)) << (kBits<F> * e);
    }
  }
  return codes;
}

// ---- the step of a block -------------------------------------------------------------------------

constexpr uint32_t kLeastMagnitude = uint32_t(127 - 90) << 23;  // 2^-90
constexpr uint32_t kInfinite = 0x7f800000u;
constexpr uint16_t kBadStep = 0x7fc0;

__device__ inline uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// With k = floor(log2 largest): 2^(shift - k) and 2^(k - shift). Normal numbers for every magnitude
// that is neither bad nor taken for zero.
__device__ inline float power_down(uint32_t largest, int shift) {
  return __uint_as_float(uint32_t(254 + shift - int(largest >> 23)) << 23);
}
__device__ inline float power_up(uint32_t largest, int shift) {
  return __uint_as_float(uint32_t(int(largest >> 23) - shift) << 23);
}

template <Format F>
constexpr uint32_t kMaxStep = max_step(F);

// To nearest, no more than what the format allows.
template <Format F>
__device__ inline uint16_t nearest_step(float step) {
  return static_cast<uint16_t>(min(kMaxStep<F>, uint32_t(Bf16::pack(&step))));
}

// Of the block that the warp's kLanes neighbouring lanes hold, `count` values. Returns the step's bits
// and, in `scale`, what to encode with.
template <Format F, int kLanes>
__device__ inline uint16_t step_of(const float (&v)[kFour], int count, Scale& scale) {
  uint32_t largest =
      max(max(magnitude(v[0]), magnitude(v[1])), max(magnitude(v[2]), magnitude(v[3])));
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, apart));
  const bool bad = largest >= kInfinite, zeros = largest < kLeastMagnitude;
  uint16_t bits;
  if constexpr (F == Format::int2) {
    uint32_t sum = 0;
    const float up = bad || zeros ? 0.0f : power_down(largest, 10);
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      const uint32_t r = bad ? 0u : uint32_t(__float2int_rn(fabsf(v[e]) * up));
      sum += r * r;
    }
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, apart);
    const float root = sqrtf(float(sum) / float(count));
    bits = nearest_step<F>(0.498f * (root * power_up(largest, 10)));
  } else {
    const uint32_t exact = __float_as_uint(__uint_as_float(largest) / float(kTop<F>));
    bits = static_cast<uint16_t>(min(kMaxStep<F>, (exact + 0xffffu) >> 16));
  }
  if (zeros) bits = 0;
  if (bad) bits = kBadStep;
  scale.step = float_of(bits);
  scale.inverse = zeros ? 0.0f : (F == Format::int2 ? 0.5f : 1.0f) / scale.step;
  return bits;
}

}  // namespace fomoe::cuda::delta
