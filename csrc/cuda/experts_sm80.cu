// The grouped GEMMs of 16-bit formats by mma.sync; multistage.cuh.
#include "multistage.cuh"

namespace fomoe::cuda {

#define FOMOE_INSTANTIATE(...) \
  template cudaError_t run_multistage(const __VA_ARGS__&, const Tile&, cudaStream_t);
FOMOE_FOR_PROBLEMS(FOMOE_INSTANTIATE, Bf16x2)
#ifndef FOMOE_FEW_FORMATS
FOMOE_FOR_PROBLEMS(FOMOE_INSTANTIATE, F16x2)
#endif

}  // namespace fomoe::cuda
