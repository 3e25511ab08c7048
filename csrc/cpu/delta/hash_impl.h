// The sum of a hash over whole words, once per instruction set: a plain loop that the compiler turns
// into vectors (products of 64 bits have no vector type of their own before AVX-512).
#pragma once

#include <cstdint>
#include <cstring>

#include "../simd.h"

namespace fomoe::cpu::FOMOE_ISA {

// Words begin .. end-1 of 4 bytes each.
static uint64_t hash_words(const uint8_t* bytes, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    uint32_t word;
    std::memcpy(&word, bytes + 4 * i, 4);
    // mix64, written out: a function shared by instruction sets would be compiled for one of them.
    uint64_t x = word + (uint64_t(i) << 32);
    x = (x ^ (x >> 32)) * kMixFactor;
    x = (x ^ (x >> 32)) * kMixFactor;
    sum += x ^ (x >> 32);
  }
  return sum;
}

}  // namespace fomoe::cpu::FOMOE_ISA
