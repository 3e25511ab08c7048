// Zeroes the rows past the last one that was computed; kernels.h.
#include <algorithm>
#include <cstdint>

#include "../../kernels.h"
#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

// Where nothing is to be zeroed every block reads one number and is done.
template <class V>
__global__ void __launch_bounds__(kThreads)
    zero_tail_kernel(const __grid_constant__ ZeroTailArgs args) {
  const int64_t tail = args.slots - *args.row_count;
  for (int i = 0; i < 2; ++i) {
    const int64_t columns = args.row_bytes[i] / int64_t(sizeof(V));
    V* const end = static_cast<V*>(args.rows[i]) + args.slots * columns;
    for (int64_t back = int64_t(blockIdx.x) * kThreads + threadIdx.x; back < tail * columns;
         back += int64_t(gridDim.x) * kThreads)
      end[-1 - back] = V{};
  }
}

template <class V>
cudaError_t launch(const ZeroTailArgs& args, cudaStream_t stream) {
  const int64_t bytes = args.slots * std::max(args.row_bytes[0], args.row_bytes[1]);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(bytes / int64_t(sizeof(V)), kThreads, kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, zero_tail_kernel<V>, args);
}

}  // namespace

int zero_tail(const ZeroTailArgs& args, void* stream) {
  if (args.slots * (args.row_bytes[0] + args.row_bytes[1]) == 0) return cudaSuccess;
  bool wide = true;
  for (int i = 0; i < 2; ++i) wide &= args.row_bytes[i] % 16 == 0 && is_aligned(args.rows[i], 16);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return wide ? launch<uint4>(args, cuda_stream) : launch<uint16_t>(args, cuda_stream);
}

}  // namespace fomoe::cuda
