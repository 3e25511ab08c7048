// The gradients of combine to rows and weights; kernels.h, scatter.cuh.
#include "scatter.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 256;

// Adds the number of slots that have a row to *row_count.
__global__ void __launch_bounds__(kThreads)
    count_rows_kernel(const int32_t* __restrict__ row_of_slot, int64_t slots,
                      int32_t* __restrict__ row_count) {
  int count = 0;
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < slots;
       slot += int64_t(gridDim.x) * kThreads)
    count += row_of_slot[slot] >= 0;
  count = __reduce_add_sync(kAllLanes, count);
  if (threadIdx.x % kWarp == 0 && count != 0) atomicAdd(row_count, count);
}

cudaError_t count_rows(const CombineBackwardArgs& args, int64_t slots, cudaStream_t stream) {
  if (const cudaError_t error = cudaMemsetAsync(args.workspace, 0, sizeof(int32_t), stream))
    return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(slots, kThreads, kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, count_rows_kernel, args.row_of_slot, slots, args.workspace);
}

}  // namespace

int combine_backward(const CombineBackwardArgs& args, void* stream) {
  const int64_t slots = args.tokens * args.top_k;
  if (slots == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = count_rows(args, slots, cuda_stream)) return error;
  const auto body = [&](auto access) {
    using A = decltype(access);
    const ScatterArgs scatter{.tokens_in = args.grad_y,
                              .rows_in = args.grad_weights != nullptr ? args.rows : nullptr,
                              .weights = args.weights,
                              .row_of_slot = args.row_of_slot,
                              .row_count = args.workspace,
                              .slots = slots,
                              .columns = args.hidden / A::kWidth,
                              .top_k = args.top_k,
                              .rows_out = args.grad_rows,
                              .dots = args.grad_weights};
    return args.grad_weights != nullptr ? scatter::launch<A, true, true>(scatter, cuda_stream)
                                        : scatter::launch<A, true, false>(scatter, cuda_stream);
  };
  return for_widest_access(args.dtype, body, args.hidden, args.grad_y, args.rows, args.grad_rows);
}

}  // namespace fomoe::cuda
