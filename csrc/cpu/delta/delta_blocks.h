// int8, int4 and int2: blocks of values that share a step (the formats: csrc/kernels.h).
//
// Values come in buffers that are padded with zeros to whole vectors; a payload is read and written
// byte by byte exactly, at any address.
#pragma once

#include <bit>
#include <type_traits>

#include "../simd.h"

namespace fomoe::cpu::FOMOE_ISA {
namespace {

constexpr int kMaxBlock = 128;
constexpr int32_t kInfinity = 0x7f800000;        // bits
constexpr int32_t kSmallest = (127 - 90) << 23;  // bits of 2^-90

template <class V>
FOMOE_INLINE V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FOMOE_INLINE float float_of(int32_t bits) { return std::bit_cast<float>(bits); }
FOMOE_INLINE float bfloat_of(uint16_t bits) { return float_of(int32_t(uint32_t(bits) << 16)); }

// 2^n as a float, n from -126 to 127.
FOMOE_INLINE float power_of_two(int n) { return float_of((n + 127) << 23); }

// To the nearest integer, ties to even; never -0. |x| <= 2^22.
FOMOE_INLINE vf nearest(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return (x + shift) - shift;
}

FOMOE_INLINE vf floor(vf x) {
  const vf r = nearest(x);
  return r - select(r > x, splat(1.0f), vf{});
}

FOMOE_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// Bits of the largest magnitude; past those of infinity for NaN.
FOMOE_INLINE int32_t largest_magnitude(const float* v, int64_t padded) {
  vi most = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vi bits = (vi)load(v + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// Uniform in [0, 1): kLanes values of the generator of kernels.h, from `index` on.
FOMOE_INLINE vf uniform(uint64_t seed, uint64_t index) {
  vu lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  const vu low = lane + uint32_t(index);
  const vu carry = (vu)(low < uint32_t(index)) & 1u;
  const auto mix = [](vu x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  };
  const vu high = carry + uint32_t(index >> 32) + uint32_t(seed >> 32);
  const vu bits = mix(mix(low ^ uint32_t(seed)) + high);
  return __builtin_convertvector((vi)(bits >> 8), vf) * 0x1p-24f;
}

// Narrowing and widening of integers by intrinsics: compilers would do it element by element.

// The lowest bytes of integers from -128 to 127.
FOMOE_INLINE void store_bytes(uint8_t* p, vi x) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__) && FOMOE_VECTOR_BYTES == 32
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#elif defined(__SSE2__) && FOMOE_VECTOR_BYTES == 16
  const __m128i halves = _mm_packs_epi32((__m128i)x, (__m128i)x);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packs_epi16(halves, halves));
  std::memcpy(p, &bytes, 4);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(x[i]);
#endif
}

FOMOE_INLINE vi load_signed_bytes(const uint8_t* p) {
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__) && FOMOE_VECTOR_BYTES == 32
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__SSE2__) && FOMOE_VECTOR_BYTES == 16
  const __m128i bytes = _mm_cvtsi32_si128(load_bytes<int32_t>(p));
  const __m128i pairs = _mm_unpacklo_epi8(bytes, bytes);
  return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24);
#else
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = int8_t(p[i]);
  return x;
#endif
}

constexpr int code_bits(Format format) {
  return format == Format::int8 ? 8 : format == Format::int4 ? 4 : 2;
}

// ---- steps ---------------------------------------------------------------------------------------

// bf16 bits of the step of a block; `largest` are the bits of its largest magnitude, >= kSmallest.
template <Format kFormat>
FOMOE_INLINE uint16_t step_of(const float* v, int64_t count, int64_t padded, int32_t largest) {
  uint32_t bits;
  if constexpr (kFormat == Format::int2) {
    const int k = (largest >> 23) - 127;
    const vf scale = splat(power_of_two(10 - k));
    vi squares = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vf r = nearest(magnitude(load(v + i)) * scale);
      squares += __builtin_convertvector(r * r, vi);  // exact: r <= 2^11
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += squares[i];
    const float rms = __builtin_sqrtf(float(sum) / float(count)) * power_of_two(k - 10);
    bits = float_to_bfloat(0.498f * rms);
  } else {
    const float step = float_of(largest) / (kFormat == Format::int8 ? 127.0f : 7.0f);
    bits = (std::bit_cast<uint32_t>(step) + 0xffffu) >> 16;
  }
  return uint16_t(bits < max_step(kFormat) ? bits : max_step(kFormat));
}

// ---- codes in bytes <-> packed codes ----------------------------------------------------------------

// codes[i], of which the lowest bits count, for padded = a multiple of 8 -> packed.
template <Format kFormat>
FOMOE_INLINE void pack(const uint8_t* codes, int64_t padded, uint8_t* packed) {
  for (int64_t i = 0; i < padded; i += 8) {
    uint64_t x = load_bytes<uint64_t>(codes + i);
    if constexpr (kFormat == Format::int8) {
      std::memcpy(packed + i, &x, 8);
    } else if constexpr (kFormat == Format::int4) {
      x &= 0x0f0f0f0f0f0f0f0fu;
      x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
      x = (x | x >> 8) & 0x0000ffff0000ffffu;
      const uint32_t word = uint32_t(x | x >> 16);
      std::memcpy(packed + i / 2, &word, 4);
    } else {
      x &= 0x0303030303030303u;
      x = (x | x >> 6) & 0x000f000f000f000fu;
      x = (x | x >> 12) & 0x000000ff000000ffu;
      const uint16_t word = uint16_t(x | x >> 24);
      std::memcpy(packed + i / 4, &word, 2);
    }
  }
}

// The values, in steps, of the kLanes codes from code i (a multiple of kLanes) on.
template <Format kFormat>
FOMOE_INLINE vf levels(const uint8_t* packed, int64_t i) {
  constexpr int kBits = code_bits(kFormat);
  if constexpr (kFormat == Format::int8) {
    return __builtin_convertvector(load_signed_bytes(packed + i), vf);
  } else {
    // Every lane loads a word that contains its code and shifts it into place.
    constexpr int kBytes = kLanes * kBits / 8, kWordLanes = kBytes > 4 ? 32 / kBits : kLanes;
    const uint8_t* bytes = packed + i * kBits / 8;
    vi lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    vu word;
    if constexpr (kBytes == 1) {
      word = vu{} + uint32_t(*bytes);
    } else if constexpr (kBytes == 2) {
      word = vu{} + uint32_t(load_bytes<uint16_t>(bytes));
    } else {
      word = vu{} + load_bytes<uint32_t>(bytes);
    }
    if constexpr (kBytes == 8) {
      const vu second = vu{} + load_bytes<uint32_t>(bytes + 4);
      word = (vu)select(lane < kWordLanes, (vf)word, (vf)second);
    }
    const vu shift = (vu)(lane % kWordLanes * kBits);
    if constexpr (kFormat == Format::int4) {
      return __builtin_convertvector((vi)(word << (28u - shift)) >> 28, vf);
    } else {
      return __builtin_convertvector((vi)((word >> shift) & 3u) * 2 - 3, vf);
    }
  }
}

// ---- blocks ----------------------------------------------------------------------------------------

// The stream of a block's random bits.
struct Rounding {
  bool stochastic;
  uint64_t seed, first;  // index of the block's value 0
};

// Codes in bytes, whole vectors; v - what is decoded to `error` if not null, `count` values.
template <Format kFormat, bool kStochastic>
FOMOE_INLINE void quantize(const float* v, int64_t count, float step, const Rounding& rounding,
                           uint8_t* codes, float* error) {
  constexpr bool kFourLevels = kFormat == Format::int2;
  constexpr float kMost = kFormat == Format::int8 ? 127.0f : kFormat == Format::int4 ? 7.0f : 3.0f;
  const vf scale = splat(kFourLevels ? 0.5f / step : 1.0f / step);
  const vf low = splat(kFourLevels ? 0.0f : -kMost), high = splat(kMost);
  const auto one_vector = [&](int64_t i) {
    const vf value = load(v + i);
    vf q = value * scale;
    if constexpr (kFourLevels) q = q + 1.5f;
    if constexpr (kStochastic) {
      q = floor(q + uniform(rounding.seed, rounding.first + uint64_t(i)));
    } else {
      q = nearest(q);
    }
    q = q < low ? low : q;
    q = q > high ? high : q;
    store_bytes(codes + i, __builtin_convertvector(q, vi));
    if constexpr (kFourLevels) q = q + q - 3.0f;
    return value - q * step;
  };
  int64_t i = 0;
  if (error == nullptr) {
    for (; i < count; i += kLanes) one_vector(i);
    return;
  }
  for (; i + kLanes <= count; i += kLanes) store(error + i, one_vector(i));
  if (i < count) store_part(F32{}, error + i, one_vector(i), count - i);
}

// A block of `count` values; false when one is NaN or infinite. `error` may be null. Called with a
// constant count where blocks are whole.
template <Format kFormat>
FOMOE_INLINE bool encode_block(const float* v, int64_t count, const Rounding& rounding,
                               float* error, uint8_t* payload) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  const int32_t largest = largest_magnitude(v, padded);
  if (largest >= kInfinity) return false;
  const int64_t bytes = (count * code_bits(kFormat) + 7) / 8;
  if (largest < kSmallest) {
    std::memset(payload, 0, size_t(2 + bytes));
    const float zero = kFormat == Format::int2 ? -0.0f : 0.0f;  // as code 0 decodes
    for (int64_t i = 0; error != nullptr && i < count; ++i) error[i] = v[i] - zero;
    return true;
  }
  const uint16_t step = step_of<kFormat>(v, count, padded, largest);
  std::memcpy(payload, &step, 2);
  alignas(64) uint8_t codes[kMaxBlock + kLanes], packed[kMaxBlock];
  if (rounding.stochastic) {
    quantize<kFormat, true>(v, count, bfloat_of(step), rounding, codes, error);
  } else {
    quantize<kFormat, false>(v, count, bfloat_of(step), rounding, codes, error);
  }
  if (count % 64 == 0) {
    pack<kFormat>(codes, count, payload + 2);
  } else {
    const int64_t whole_bytes = (count + 7) / 8 * 8;
    std::memset(codes + count, 0, size_t(whole_bytes - count));
    pack<kFormat>(codes, whole_bytes, packed);
    std::memcpy(payload + 2, packed, size_t(bytes));
  }
  return true;
}

// sum = or += the values of a block, whole vectors: up to kLanes - 1 past `count` are touched too.
template <Format kFormat, bool kAdd>
FOMOE_INLINE void decode_block(const uint8_t* payload, int64_t count, float* sum) {
  const vf step = splat(bfloat_of(load_bytes<uint16_t>(payload)));
  const uint8_t* packed = payload + 2;
  uint8_t copy[kMaxBlock];
  if (count % 64 != 0) {  // whole vectors would read past the payload
    std::memset(copy, 0, sizeof(copy));
    std::memcpy(copy, packed, size_t((count * code_bits(kFormat) + 7) / 8));
    packed = copy;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf value = levels<kFormat>(packed, i) * step;
    store(sum + i, kAdd ? load(sum + i) + value : value);
  }
}

// Bytes of `count` values: a multiple of the block, or the rest.
template <Format kFormat>
FOMOE_INLINE int64_t blocks_bytes(int64_t count, int64_t block) {
  return 2 * ((count + block - 1) / block) + (count * code_bits(kFormat) + 7) / 8;
}

// body(offset, count, payload of the block) for the blocks of a tile; count is a constant, that is,
// of type std::integral_constant, for whole blocks.
template <Format kFormat, class Body>
FOMOE_INLINE void for_blocks(int64_t count, int64_t block, const Body& body) {
  const int64_t bytes = blocks_bytes<kFormat>(block, block);
  int64_t at = 0, offset = 0;
  const auto whole = [&](auto size) {
    for (; at + size <= count; at += size, offset += bytes) body(at, size, offset);
  };
  if (block == 64) {
    whole(std::integral_constant<int64_t, 64>{});
  } else {
    whole(std::integral_constant<int64_t, kMaxBlock>{});
  }
  if (at < count) body(at, count - at, offset);
}

// A tile of blocks; the offset of a block with a value that is NaN or infinite, or -1.
template <Format kFormat>
int64_t encode_blocks(const float* v, int64_t count, int64_t block, const Rounding& tile,
                      float* error, uint8_t* payload) {
  int64_t bad = -1;
  for_blocks<kFormat>(count, block, [&](int64_t at, auto size, int64_t offset) {
    const Rounding rounding = {tile.stochastic, tile.seed, tile.first + uint64_t(at)};
    float* rest = error ? error + at : nullptr;
    if (!encode_block<kFormat>(v + at, size, rounding, rest, payload + offset) && bad < 0) bad = at;
  });
  return bad;
}

template <Format kFormat, bool kAdd>
void decode_blocks(const uint8_t* payload, int64_t count, int64_t block, float* sum) {
  for_blocks<kFormat>(count, block, [&](int64_t at, auto size, int64_t offset) {
    decode_block<kFormat, kAdd>(payload + offset, size, sum + at);
  });
}

}  // namespace
}  // namespace fomoe::cpu::FOMOE_ISA
