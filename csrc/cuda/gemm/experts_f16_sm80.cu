// The grouped GEMMs of f16 by mma.sync; multistage.cuh.
#include "multistage.cuh"

namespace fomoe::cuda {

#define FOMOE_INSTANTIATE(...) \
  template cudaError_t run_multistage(const __VA_ARGS__&, const Tile&, cudaStream_t);
FOMOE_FOR_PROBLEMS(FOMOE_INSTANTIATE, F16x2)

}  // namespace fomoe::cuda
