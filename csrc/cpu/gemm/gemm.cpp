// Which instruction set's GEMM blocks are used: decided once, by features.h.
#include "gemm.h"

#include "../features.h"

namespace fomoe::cpu {

const GemmKernels& gemm_kernels() {
  static const GemmKernels& table = []() -> const GemmKernels& {
    switch (chosen_isa()) {
#if FOMOE_HAVE_AVX512_BF16
      case Isa::avx512_bf16: return avx512_bf16::gemm_table;
#endif
#if FOMOE_HAVE_AVX512
      case Isa::avx512: return avx512::gemm_table;
#endif
#if FOMOE_HAVE_AVX2
      case Isa::avx2: return avx2::gemm_table;
#endif
      default: break;
    }
    return scalar::gemm_table;
  }();
  return table;
}

}  // namespace fomoe::cpu
