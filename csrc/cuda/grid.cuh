// Sizes of launches. Every kernel loops over its items, with any number of blocks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "per_device.h"

namespace fomoe::cuda {

// Tests define FOMOE_FEW_BLOCKS, so that blocks loop and counters wrap already for small inputs.
#ifdef FOMOE_FEW_BLOCKS
constexpr int64_t kFewBlocks = FOMOE_FEW_BLOCKS;
#else
constexpr int64_t kFewBlocks = INT64_MAX;
#endif

// The blocks that the items need, at least 1 and at most `most`.
inline unsigned blocks_for(int64_t items, int64_t items_per_block, int64_t most) {
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::min(most, kFewBlocks)));
}

// How many blocks of a kernel the current device runs at once. One object for each kernel.
class PersistentGrid {
 public:
  template <class Kernel>
  cudaError_t size(Kernel* kernel, int threads, int shared_bytes, unsigned& blocks) {
    int answer = 0;
    const cudaError_t error = known_.get(answer, [&](int device, int& wanted) {
      return ask(kernel, threads, shared_bytes, device, wanted);
    });
    blocks = static_cast<unsigned>(answer);
    return error;
  }
  // The same for clusters of `cluster` blocks; `config` says all about the launch but its grid.
  template <class Kernel>
  cudaError_t size(Kernel* kernel, const cudaLaunchConfig_t& config, int cluster,
                   unsigned& blocks) {
    int answer = 0;
    const cudaError_t error = known_.get(answer, [&](int, int& wanted) {
      if (const cudaError_t failed = cudaFuncSetAttribute(
              kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)))
        return failed;
      if (const cudaError_t failed = cudaOccupancyMaxActiveClusters(&wanted, kernel, &config))
        return failed;
      if (wanted == 0) return cudaErrorInvalidConfiguration;
      wanted = int(blocks_for(int64_t(wanted) * cluster, cluster, INT32_MAX));
      return cudaSuccess;
    });
    blocks = static_cast<unsigned>(answer * cluster);
    return error;
  }

 private:
  template <class Kernel>
  static cudaError_t ask(Kernel* kernel, int threads, int shared_bytes, int device, int& blocks) {
    int processors = 0, resident = 0;
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return error;
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
      return error;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &resident, kernel, threads, size_t(shared_bytes)))
      return error;
    if (resident == 0) return cudaErrorInvalidConfiguration;
    blocks = int(blocks_for(int64_t(processors) * resident, 1, INT32_MAX));
    return cudaSuccess;
  }
  PerDevice known_;
};

}  // namespace fomoe::cuda
