// The instruction set of the CPU kernels: detected by CPUID, or a less capable one by FOMOE_CPU_ISA.
#pragma once

#include <cstdint>

namespace fomoe::cpu {

// Ordered: each one includes those before it.
//   avx2         AVX2, FMA, F16C
//   avx512       AVX-512 F, BW, DQ, VL
//   avx512_bf16  AVX-512 BF16 dot products
enum class Isa : int32_t { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa);

// The best one that the CPU, its operating system and this build support.
Isa detected_isa();

// detected_isa(), or a less capable one: FOMOE_CPU_ISA = scalar | avx2 | avx512 | avx512_bf16. Throws
// std::runtime_error for another word, or for one above detected_isa().
// Read once, at the first call that succeeds.
Isa chosen_isa();

}  // namespace fomoe::cpu
