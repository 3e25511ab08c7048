// Zeroes the rows past the last one that was computed.
#include <cstdint>

#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

template <class V>
__global__ void __launch_bounds__(kThreads)
    zero_tail_kernel(V* __restrict__ rows, int64_t columns, int64_t slots,
                     const int32_t* __restrict__ row_count) {
  const int64_t end = slots * columns;
  for (int64_t i = *row_count * columns + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < end;
       i += int64_t(gridDim.x) * kThreads)
    rows[i] = V{};
}

template <class V>
cudaError_t launch(void* rows, int64_t row_bytes, int64_t slots, const int32_t* row_count,
                   cudaStream_t stream) {
  const int64_t columns = row_bytes / int64_t(sizeof(V));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(slots * columns, kThreads, kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, zero_tail_kernel<V>, static_cast<V*>(rows), columns, slots,
                            row_count);
}

}  // namespace

int zero_tail(void* rows, int64_t row_bytes, int64_t slots, const int32_t* row_count,
              void* stream) {
  if (slots == 0 || row_bytes == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (row_bytes % 16 == 0 && is_aligned(rows, 16))
    return launch<uint4>(rows, row_bytes, slots, row_count, cuda_stream);
  return launch<uint16_t>(rows, row_bytes, slots, row_count, cuda_stream);
}

}  // namespace fomoe::cuda
