// The grouped GEMMs of f16 on Hopper by TMA and wgmma; warp_specialized.cuh.
#include "warp_specialized.cuh"

namespace fomoe::cuda {

#define FOMOE_INSTANTIATE(...) \
  template cudaError_t run_warp_specialized(const __VA_ARGS__&, const Tile&, cudaStream_t);
FOMOE_FOR_PROBLEMS(FOMOE_INSTANTIATE, F16x2)

}  // namespace fomoe::cuda
