// topk: the largest values of a chunk, as two magnitudes with a sign (the format: csrc/kernels.h).
#pragma once

#include <algorithm>

#include "delta_blocks.h"

namespace fomoe::cpu::FOMOE_ISA {
namespace {

constexpr int kMostKept = int(kTopkChunk / kTopkShare);

FOMOE_INLINE int64_t kept_of(int64_t count) { return (count + kTopkShare - 1) / kTopkShare; }
FOMOE_INLINE int64_t index_bytes(int64_t kept) { return (12 * kept + 7) / 8; }

// Bits of a magnitude that at least kMostKept values of a whole chunk reach, and few more in common
// data: the kMostKept-th largest of the maxima of twice as many interleaved groups.
FOMOE_INLINE int32_t reached_by_enough(const float* v) {
  constexpr int kGroups = 2 * kMostKept, kVectors = kGroups / kLanes;
  static_assert(kGroups % kLanes == 0 && kTopkChunk % kGroups == 0);
  vi most[kVectors] = {};
  for (int64_t i = 0; i < kTopkChunk; i += kGroups) {
    for (int j = 0; j < kVectors; ++j) {
      const vi bits = (vi)load(v + i + j * kLanes) & 0x7fffffff;
      most[j] = bits > most[j] ? bits : most[j];
    }
  }
  int32_t maxima[kGroups];
  std::memcpy(maxima, most, sizeof(maxima));
  std::nth_element(maxima, maxima + kMostKept - 1, maxima + kGroups,
                   [](int32_t a, int32_t b) { return a > b; });
  return maxima[kMostKept - 1];
}

// Writes the keys of the values whose magnitude's bits are at least `least`, in the order of values,
// and returns their number. A key is the magnitude (high bits) and the inverted index (low bits), so
// that larger keys are chosen first.
FOMOE_INLINE int64_t collect(const float* v, int64_t count, int32_t least, uint64_t* keys) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vi bits = (vi)load(v + i) & 0x7fffffff;
    if (!any((vi)(bits >= least))) continue;
    const int64_t lanes = std::min<int64_t>(kLanes, count - i);
    for (int64_t l = 0; l < lanes; ++l) {
      keys[found] = uint64_t(bits[l]) << 12 | uint64_t(kTopkChunk - 1 - i - l);
      found += bits[l] >= least;
    }
  }
  return found;
}

// The indices of the `kept` largest magnitudes, ties to the lower index, ascending.
FOMOE_INLINE void largest_values(const float* v, int64_t count, int64_t kept, uint16_t* indices) {
  uint64_t keys[kTopkChunk], sorted[kTopkChunk];
  const int32_t enough = count == kTopkChunk ? reached_by_enough(v) : 0;
  int64_t found = collect(v, count, std::max(enough, 1), keys);
  if (found < kept) found = collect(v, count, 0, keys);
  std::copy(keys, keys + found, sorted);
  std::nth_element(sorted, sorted + kept - 1, sorted + found,
                   [](uint64_t a, uint64_t b) { return a > b; });
  const uint64_t last = sorted[kept - 1];
  for (int64_t f = 0; f < found; ++f)
    if (keys[f] >= last) *indices++ = uint16_t(kTopkChunk - 1 - int64_t(keys[f] & 0xfff));
}

// bf16 bits of the unit of the kept values; `largest` are the bits of the largest magnitude.
FOMOE_INLINE uint16_t unit_of(const float* v, const uint16_t* indices, int64_t kept,
                              int32_t largest) {
  const int k = (largest >> 23) - 127;
  const float scale = power_of_two(20 - k);
  int64_t sum = 0;
  for (int64_t j = 0; j < kept; ++j) {
    const float r = __builtin_fabsf(v[indices[j]]) * scale;
    sum += int64_t((r + 12582912.0f) - 12582912.0f);
  }
  const float mean = float(sum) / float(kept) * power_of_two(k - 20);
  return std::min(float_to_bfloat(mean * 0.125f), max_step(Format::topk));
}

FOMOE_INLINE float kept_value(int code, float unit) {
  const float magnitude = code & 1 ? 10.0f : 7.0f;
  return (code & 2 ? -magnitude : magnitude) * unit;
}

// One chunk: payload, and v - what is decoded to `error` if not null. False when a value is NaN or
// infinite.
bool encode_chunk(const float* v, int64_t count, float* error, uint8_t* payload) {
  const int32_t largest = largest_magnitude(v, (count + kLanes - 1) / kLanes * kLanes);
  if (largest >= kInfinity) return false;
  const int64_t kept = kept_of(count);
  uint16_t indices[kMostKept], unit_bits = 0;
  if (largest < kSmallest) {
    for (int64_t j = 0; j < kept; ++j) indices[j] = uint16_t(j);
  } else {
    largest_values(v, count, kept, indices);
    unit_bits = unit_of(v, indices, kept, largest);
  }
  const float unit = bfloat_of(unit_bits);
  std::memcpy(payload, &unit_bits, 2);
  uint8_t* packed_indices = payload + 2;
  uint8_t* packed_codes = packed_indices + index_bytes(kept);
  std::memset(packed_indices, 0, size_t(index_bytes(kept) + (2 * kept + 7) / 8));
  if (error != nullptr) std::memcpy(error, v, size_t(count) * 4);
  for (int64_t j = 0; j < kept; ++j) {
    const int64_t index = indices[j], bit = 12 * j;
    const uint32_t shifted = uint32_t(index) << bit % 8;
    packed_indices[bit / 8] |= uint8_t(shifted);
    packed_indices[bit / 8 + 1] |= uint8_t(shifted >> 8);
    const float value = v[index];
    int code = 0;
    if (unit_bits != 0) code = (__builtin_fabsf(value) > 8.5f * unit ? 1 : 0) | (value < 0 ? 2 : 0);
    packed_codes[j / 4] |= uint8_t(code << 2 * (j % 4));
    if (error != nullptr) error[index] = value - kept_value(code, unit);
  }
  return true;
}

// sum = or += the values of a chunk. Indices past the chunk, which no encoder writes, are ignored.
template <bool kAdd>
void decode_chunk(const uint8_t* payload, int64_t count, float* sum) {
  if constexpr (!kAdd) std::memset(sum, 0, size_t(count) * 4);
  const int64_t kept = kept_of(count);
  const float unit = bfloat_of(load_bytes<uint16_t>(payload));
  const uint8_t* indices = payload + 2;
  const uint8_t* codes = indices + index_bytes(kept);
  for (int64_t j = 0; j < kept; ++j) {
    const int64_t bit = 12 * j;
    const uint32_t two_bytes = uint32_t(indices[bit / 8]) | uint32_t(indices[bit / 8 + 1]) << 8;
    const int64_t index = two_bytes >> bit % 8 & 0xfffu;
    if (index >= count) continue;
    const float value = kept_value(codes[j / 4] >> 2 * (j % 4) & 3, unit);
    sum[index] = kAdd ? sum[index] + value : value;
  }
}

}  // namespace
}  // namespace fomoe::cpu::FOMOE_ISA
