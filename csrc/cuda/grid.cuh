// Sizes of launches. Every kernel loops until its items are done, whatever the number of blocks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fomoe::cuda {

// Tests define FOMOE_FEW_BLOCKS, so that small inputs already make blocks and counters go around.
#ifdef FOMOE_FEW_BLOCKS
constexpr int64_t kFewBlocks = FOMOE_FEW_BLOCKS;
#else
constexpr int64_t kFewBlocks = INT64_MAX;
#endif

// As many blocks as the items need, at least one, no more than `most`.
inline unsigned blocks_for(int64_t items, int64_t items_per_block, int64_t most) {
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::min(most, kFewBlocks)));
}

// How many blocks of a kernel the current device runs at once, asked for once per device. One
// object for each kernel.
class PersistentGrid {
 public:
  template <class Kernel>
  cudaError_t size(Kernel* kernel, int threads, int shared_bytes, unsigned& blocks) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    std::atomic<unsigned>* known = device < kDevices ? &known_[device] : nullptr;
    blocks = known != nullptr ? known->load(std::memory_order_relaxed) : 0;
    if (blocks != 0) return cudaSuccess;
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
    blocks = blocks_for(int64_t(processors) * resident, 1, INT32_MAX);
    if (known != nullptr) known->store(blocks, std::memory_order_relaxed);
    return cudaSuccess;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<unsigned> known_[kDevices] = {};
};

}  // namespace fomoe::cuda
