#include "features.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fomoe::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
  Isa best = Isa::scalar;
#if defined(__x86_64__)
  // These built-ins also ask whether the operating system saves the wide registers.
  __builtin_cpu_init();
#if FOMOE_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
#if FOMOE_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
#if FOMOE_HAVE_AVX512_BF16
      if (__builtin_cpu_supports("avx512bf16")) best = Isa::avx512_bf16;
#endif
    }
#endif
  }
#endif
#endif
  return best;
}

Isa choose() {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("FOMOE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i <= static_cast<int>(best)) return static_cast<Isa>(i);
    throw std::runtime_error(std::string("FOMOE_CPU_ISA must be at most '") + isa_name(best) +
                             "' on this CPU with this build, got '" + wanted + "'");
  }
  throw std::runtime_error(
      std::string("FOMOE_CPU_ISA must be scalar, avx2, avx512 or avx512_bf16, got '") + wanted +
      "'");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fomoe::cpu
