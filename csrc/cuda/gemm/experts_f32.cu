// The grouped GEMMs of fp32, by fused multiply-adds in the order of the sum; multistage.cuh.
#include "multistage.cuh"

namespace fomoe::cuda {

#define FOMOE_INSTANTIATE(...) \
  template cudaError_t run_multistage(const __VA_ARGS__&, const Tile&, cudaStream_t);
FOMOE_FOR_PROBLEMS(FOMOE_INSTANTIATE, F32)

}  // namespace fomoe::cuda
