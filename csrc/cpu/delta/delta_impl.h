// delta_encode and delta_reduce for one instruction set. A tile's values are gathered in a buffer in
// the L1 cache, encoded from there, and their errors written straight back: the large tensors are
// read once and written once.
#include <algorithm>

#include "../simd.h"
#include "delta.h"
#include "delta_blocks.h"
#include "delta_topk.h"
#include "hash_impl.h"

namespace fomoe::cpu::FOMOE_ISA {
namespace {

constexpr int64_t kBuffer = kTopkChunk;

// The zeros that follow `count` values up to whole vectors.
FOMOE_INLINE void pad(float* v, int64_t count) {
  for (int64_t i = count; i % kLanes != 0; ++i) v[i] = 0.0f;
}

// The index of the first of `count` values that is NaN or infinite, or -1.
int64_t find_bad(const float* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if ((std::bit_cast<int32_t>(v[i]) & 0x7fffffff) >= kInfinity) return i;
  return -1;
}

// x rounded to a storage type.
FOMOE_INLINE vf rounded_as(F32, vf x) { return x; }
FOMOE_INLINE vf rounded_as(BF16, vf x) {
  const vu bits = (vu)x;
  const vf rounded = (vf)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  return select(x == x, rounded, x);  // NaN stays
}
FOMOE_INLINE vf rounded_as(F16, vf x) {
  uint16_t lanes[kLanes];
  store_as(F16{}, lanes, x);
  return load_as(F16{}, lanes);
}

// The first `count` of kLanes values that bf16 holds exactly, to any address.
FOMOE_INLINE void store_bfloats(uint8_t* p, vf x, int64_t count) {
  uint16_t lanes[kLanes];
  const vi halves = (vi)x >> 16;
#if defined(__AVX512F__) && FOMOE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm512_cvtepi32_epi16((__m512i)halves));
#elif defined(__AVX2__) && FOMOE_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes),
                   _mm_packs_epi32(_mm256_castsi256_si128((__m256i)halves),
                                   _mm256_extracti128_si256((__m256i)halves, 1)));
#else
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint16_t(halves[i]);
#endif
  std::memcpy(p, lanes, size_t(count) * 2);
}

// ---- floats as they are and as bf16 -------------------------------------------------------------------

bool encode_floats(Format format, const float* v, int64_t count, float* error, uint8_t* payload) {
  if (largest_magnitude(v, (count + kLanes - 1) / kLanes * kLanes) >= kInfinity) return false;
  if (format == Format::fp32) {
    std::memcpy(payload, v, size_t(count) * 4);
    if (error != nullptr) std::memset(error, 0, size_t(count) * 4);
    return true;
  }
  const auto encode_vector = [&](int64_t i, int64_t size) {
    const vf value = load(v + i), decoded = rounded_as(BF16{}, value);
    store_bfloats(payload + 2 * i, decoded, size);
    return value - decoded;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf rest = encode_vector(i, kLanes);
    if (error != nullptr) store(error + i, rest);
  }
  if (i < count) {
    const vf rest = encode_vector(i, count - i);
    if (error != nullptr) store_part(F32{}, error + i, rest, count - i);
  }
  return true;
}

FOMOE_INLINE vf load_bytes_as(F32, const uint8_t* p) { return load_bytes<vf>(p); }
FOMOE_INLINE vf load_bytes_as(BF16, const uint8_t* p) {
  return (vf)(__builtin_convertvector(load_bytes<vh>(p), vu) << 16);
}

// sum = or += `count` values of type S, whole vectors.
template <class S, bool kAdd>
void decode_floats(const uint8_t* payload, int64_t count, float* sum) {
  constexpr int64_t kSize = sizeof(typename S::type);
  const auto add = [&](int64_t i, vf value) {
    store(sum + i, kAdd ? load(sum + i) + value : value);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add(i, load_bytes_as(S{}, payload + kSize * i));
  if (i < count) {
    uint8_t lanes[kLanes * kSize] = {};
    std::memcpy(lanes, payload + kSize * i, size_t(kSize * (count - i)));
    add(i, load_bytes_as(S{}, lanes));
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------

// Encodes values that are padded with zeros; the index, counted from v, of a bad one or -1.
int64_t encode_tile(const DeltaCodec& codec, const float* v, int64_t count, uint64_t first,
                    float* error, uint8_t* payload) {
  const Rounding rounding = {codec.stochastic, codec.seed, first};
  int64_t bad = -1;
  switch (codec.format) {
    case Format::fp32:
    case Format::bf16: bad = encode_floats(codec.format, v, count, error, payload) ? -1 : 0; break;
    case Format::int8:
      bad = encode_blocks<Format::int8>(v, count, codec.block, rounding, error, payload);
      break;
    case Format::int4:
      bad = encode_blocks<Format::int4>(v, count, codec.block, rounding, error, payload);
      break;
    case Format::int2:
      bad = encode_blocks<Format::int2>(v, count, codec.block, rounding, error, payload);
      break;
    case Format::topk: bad = encode_chunk(v, count, error, payload) ? -1 : 0; break;
  }
  return bad < 0 ? -1 : bad + find_bad(v + bad, count - bad);
}

// sum = or += the values of a tile; whole vectors are written.
template <bool kAdd>
void decode_tile(const DeltaCodec& codec, const uint8_t* payload, int64_t count, float* sum) {
  switch (codec.format) {
    case Format::fp32: return decode_floats<F32, kAdd>(payload, count, sum);
    case Format::bf16: return decode_floats<BF16, kAdd>(payload, count, sum);
    case Format::int8: return decode_blocks<Format::int8, kAdd>(payload, count, codec.block, sum);
    case Format::int4: return decode_blocks<Format::int4, kAdd>(payload, count, codec.block, sum);
    case Format::int2: return decode_blocks<Format::int2, kAdd>(payload, count, codec.block, sum);
    case Format::topk: return decode_chunk<kAdd>(payload, count, sum);
  }
}

// ---- encode -----------------------------------------------------------------------------------------------

// `count` values of one part to v. Null pointers: no anchor, no error.
template <class S>
void part_values(const float* anchor, const typename S::type* local, float weight,
                 const float* error, int64_t count, float* v) {
  const auto one_vector = [&](auto load_from) {
    vf value = load_from(S{}, local);
    if (anchor != nullptr) value = rounded_as(S{}, load_from(F32{}, anchor)) - value;
    value = splat(weight) * value;
    return error != nullptr ? value + load_from(F32{}, error) : value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(v + i, one_vector([&](auto s, auto* p) { return load_as(s, p + i); }));
  if (i < count) {
    const vf value = one_vector([&](auto s, auto* p) { return load_part(s, p + i, count - i); });
    store_part(F32{}, v + i, value, count - i);
  }
}

// `count` values of one part, from value `at` of all on.
void read_part(const DeltaEncodeArgs& args, const DeltaPart& part, int64_t at, int64_t count,
               float* v) {
  const float* error = args.error ? args.error + at : nullptr;
  if (part.local == nullptr) {
    for (int64_t i = 0; i < count; ++i) v[i] = error ? 0.0f + error[i] : 0.0f;
    return;
  }
  const float* anchor = args.anchor ? args.anchor + at : nullptr;
  const auto read = [&](auto storage) {
    using S = decltype(storage);
    const auto* local = static_cast<const typename S::type*>(part.local) + (at - part.begin);
    part_values<S>(anchor, local, part.weight, error, count, v);
  };
  switch (part.dtype) {
    case DType::f32: return read(F32{});
    case DType::bf16: return read(BF16{});
    case DType::f16: return read(F16{});
  }
}

int64_t encode_range(const DeltaEncodeArgs& args, int64_t begin, int64_t end) {
  alignas(64) float v[kBuffer];
  const DeltaPart* parts_end = args.parts + args.num_parts;
  const DeltaPart* next = std::upper_bound(
      args.parts, parts_end, begin, [](int64_t at, const DeltaPart& p) { return at < p.begin; });
  const int64_t tile = delta_tile(args.codec.format);
  int64_t first_bad = -1;
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t tile_end = std::min(at + tile, end), count = tile_end - at;
    for (int64_t i = at; i < tile_end;) {
      if (next != parts_end && next->begin <= i) ++next;
      const int64_t stop = next != parts_end ? std::min(next->begin, tile_end) : tile_end;
      read_part(args, next[-1], i, stop - i, v + (i - at));
      i = stop;
    }
    pad(v, count);
    const int64_t bad = encode_tile(args.codec, v, count, args.first + uint64_t(at),
                                    args.error ? args.error + at : nullptr,
                                    args.payload + payload_bytes(args.codec, at));
    if (bad >= 0 && first_bad < 0) first_bad = at + bad;
  }
  return first_bad;
}

// ---- reduce -----------------------------------------------------------------------------------------------

// The members' sum of a tile, in rank order. Whole vectors are written.
void sum_members(const DeltaReduceArgs& args, int64_t at, int64_t count, float* sum) {
  const uint8_t* payload = args.payloads + payload_bytes(args.codec, at);
  for (int32_t member = 0; member < args.members; ++member) {
    if (args.own != nullptr && member == args.own_rank) {
      const float* own = args.own + at;
      if (member == 0) {
        // Values that a topk member has not kept are skipped below; adding their 0 would turn -0 into 0.
        const float zero = args.codec.format == Format::topk && args.members > 1 ? 0.0f : -0.0f;
        for (int64_t i = 0; i < count; ++i) sum[i] = own[i] + zero;
      } else {
        for (int64_t i = 0; i < count; ++i) sum[i] += own[i];
      }
      continue;
    }
    if (member == 0) {
      decode_tile<false>(args.codec, payload, count, sum);
    } else {
      decode_tile<true>(args.codec, payload, count, sum);
    }
    payload += args.stride;
  }
}

int64_t reduce_range(const DeltaReduceArgs& args, int64_t begin, int64_t end) {
  alignas(64) float v[kBuffer];
  const int64_t tile = delta_tile(args.codec.format);
  int64_t first_bad = -1;
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t count = std::min(tile, end - at);
    sum_members(args, at, count, v);
    float* error = args.error ? args.error + at : nullptr;
    for (int64_t i = 0; error != nullptr && i < count; ++i) v[i] += error[i];
    pad(v, count);
    int64_t bad = -1;
    if (args.sum != nullptr) {
      std::memcpy(args.sum + at, v, size_t(count) * 4);
      const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
      if (largest_magnitude(v, padded) >= kInfinity) bad = find_bad(v, count);
    } else {
      bad = encode_tile(args.codec, v, count, args.first + uint64_t(at), error,
                        args.payload + payload_bytes(args.codec, at));
    }
    if (bad >= 0 && first_bad < 0) first_bad = at + bad;
  }
  return first_bad;
}

}  // namespace

const DeltaKernels delta_table = {encode_range, reduce_range, hash_words};

}  // namespace fomoe::cpu::FOMOE_ISA
