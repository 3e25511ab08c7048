// The gradients that contract's backward leaves beside its GEMM: those of combine weights and of
// biases, and the elementwise backward of expand.
#include "../arch/shared_memory.cuh"
#include "../grid.cuh"
#include "grouped.cuh"

namespace fomoe::cuda {

int contract_backward_rows(const ContractBackwardArgs& args, void* stream);  // experts.cu

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 1 << 16;

int64_t parts_of(int64_t expert_size) { return (expert_size + kStripColumns - 1) / kStripColumns; }

// ---- gradients of combine weights ---------------------------------------------------------------

// grad_weights[slot] = the parts of its row in order, plus <bias, grad_y[token]>. A warp to 32 rows;
// with a bias it goes through them one by one.
template <class A>
__global__ void __launch_bounds__(kThreads, 4)
    weight_dots_kernel(const __grid_constant__ ContractBackwardArgs args, int64_t parts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = args.offsets[args.residents];
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kWarp; first < rows;
       first += warps * kWarp) {
    const int64_t row = first + lane;
    float sum = 0.0f;
    if (row < rows)
      for (int64_t part = 0; part < parts; ++part) sum += args.workspace[part * args.slots + row];
    if (args.bias != nullptr) {
      for (int i = 0; i < kWarp && first + i < rows; ++i) {
        // The resident of the row: the last one that begins at it or before.
        int low = 0, high = args.residents - 1;
        while (low < high) {
          const int middle = (low + high + 1) / 2;
          if (args.offsets[middle] <= first + i) {
            low = middle;
          } else {
            high = middle - 1;
          }
        }
        using V = typename A::V;
        const int64_t columns = args.hidden / A::kWidth;
        const V* bias = static_cast<const V*>(args.bias) + low * columns;
        const V* grad = static_cast<const V*>(args.grad_y) + args.token_of_row[first + i] * columns;
        float dot = 0.0f;
        for (int64_t column = lane; column < columns; column += kWarp) {
          float left[A::kWidth], right[A::kWidth];
          const V bias_vector = bias[column], grad_vector = grad[column];
          A::unpack(bias_vector, left);
          A::unpack(grad_vector, right);
#pragma unroll
          for (int v = 0; v < A::kWidth; ++v) dot = fmaf(left[v], right[v], dot);
        }
        for (int apart = kWarp / 2; apart > 0; apart /= 2)
          dot += __shfl_xor_sync(kAllLanes, dot, apart);
        if (lane == i) sum += dot;
      }
    }
    if (row < rows) args.grad_weights[args.slot_of_row[row]] = sum;
  }
}

// ---- gradients of biases -------------------------------------------------------------------------

// A block makes 32 vectors of one resident's bias: its warps take every kWarps-th row, and their
// sums are added in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    bias_grad_kernel(const __grid_constant__ BiasGradArgs args, int64_t columns) {
  FOMOE_SHARED(float, sums, [kWarps][kWarp][A::kWidth]);
  using V = typename A::V;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column_blocks = (columns + kWarp - 1) / kWarp;
  for (int64_t item = blockIdx.x; item < args.residents * column_blocks; item += gridDim.x) {
    const int64_t resident = item / column_blocks;
    const int64_t column = item % column_blocks * kWarp + lane;
    float sum[A::kWidth] = {};
    if (column < columns) {
      const int64_t end = args.offsets[resident + 1];
#pragma unroll 4
      for (int64_t row = args.offsets[resident] + warp; row < end; row += kWarps) {
        const int64_t line = args.index == nullptr ? row : args.index[row];
        const float factor = args.weights == nullptr ? 1.0f : args.weights[args.slot_of_row[row]];
        const V vector = static_cast<const V*>(args.in)[line * columns + column];
        float values[A::kWidth];
        A::unpack(vector, values);
#pragma unroll
        for (int v = 0; v < A::kWidth; ++v) sum[v] = fmaf(factor, values[v], sum[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < A::kWidth; ++v) sums[warp][lane][v] = sum[v];
    __syncthreads();
    if (warp == 0 && column < columns) {
      for (int w = 1; w < kWarps; ++w)
#pragma unroll
        for (int v = 0; v < A::kWidth; ++v) sum[v] += sums[w][lane][v];
      static_cast<V*>(args.grad_bias)[resident * columns + column] = A::pack(sum);
    }
    __syncthreads();
  }
}

// ---- the backward of an activation ---------------------------------------------------------------

template <class A, Activation kActivation>
__global__ void __launch_bounds__(kThreads)
    activation_backward_kernel(const __grid_constant__ ActivationBackwardArgs args,
                               int64_t columns) {
  constexpr bool kExact = std::is_same_v<typename A::Format, F32>;
  constexpr bool kGated = is_gated(kActivation);
  using V = typename A::V;
  const int64_t vectors = args.offsets[args.residents] * columns;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < vectors;
       i += int64_t(gridDim.x) * kThreads) {
    // Without signs: division takes fewer registers.
    const int64_t row = int64_t(uint64_t(i) / uint64_t(columns));
    const int64_t at = (kGated ? row * columns : 0) + i;
    const V grad_vector = static_cast<const V*>(args.grad_act)[i];
    const V gate_vector = static_cast<const V*>(args.preact)[at];
    float grad[A::kWidth], gate[A::kWidth], up[A::kWidth];
    A::unpack(grad_vector, grad);
    A::unpack(gate_vector, gate);
    if constexpr (kGated) {
      const V up_vector = static_cast<const V*>(args.preact)[at + columns];
      A::unpack(up_vector, up);
    }
#pragma unroll
    for (int v = 0; v < A::kWidth; ++v) {
      const Activated a = activate<kActivation, kExact>(gate[v], kGated ? up[v] : 0.0f);
      gate[v] = a.gate_slope * grad[v];
      if constexpr (kGated) up[v] = a.up_slope * grad[v];
    }
    static_cast<V*>(args.grad_preact)[at] = A::pack(gate);
    if constexpr (kGated) static_cast<V*>(args.grad_preact)[at + columns] = A::pack(up);
  }
}

cudaLaunchConfig_t config_for(unsigned blocks, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return config;
}

}  // namespace

int64_t contract_backward_workspace(const ContractBackwardArgs& args) {
  return parts_of(args.expert_size) * args.slots;
}

int contract_backward(const ContractBackwardArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.slots == 0) return cudaSuccess;
  if (const cudaError_t error =
          cudaMemsetAsync(args.grad_weights, 0, size_t(args.slots) * sizeof(float), cuda_stream))
    return error;
  if (const int error = contract_backward_rows(args, stream)) return error;
  const cudaLaunchConfig_t config =
      config_for(blocks_for(args.slots, kThreads, kMaxBlocks), cuda_stream);
  const auto body = [&](auto access) {
    return cudaLaunchKernelEx(&config, weight_dots_kernel<decltype(access)>, args,
                              parts_of(args.expert_size));
  };
  return for_widest_access(args.dtype, body, args.hidden, args.bias, args.grad_y);
}

int bias_grad(const BiasGradArgs& args, void* stream) {
  if (args.residents == 0 || args.width == 0) return cudaSuccess;
  const auto body = [&](auto access) {
    const int64_t columns = args.width / decltype(access)::kWidth;
    const int64_t items = args.residents * ((columns + kWarp - 1) / kWarp);
    const cudaLaunchConfig_t config =
        config_for(blocks_for(items, 1, kMaxBlocks), static_cast<cudaStream_t>(stream));
    return cudaLaunchKernelEx(&config, bias_grad_kernel<decltype(access)>, args, columns);
  };
  return for_widest_access(args.dtype, body, args.width, args.in, args.grad_bias);
}

int activation_backward(const ActivationBackwardArgs& args, void* stream) {
  if (args.slots == 0) return cudaSuccess;
  const auto body = [&](auto access) {
    using A = decltype(access);
    const int64_t columns = args.expert_size / A::kWidth;
    const cudaLaunchConfig_t config = config_for(
        blocks_for(args.slots * columns, kThreads, kMaxBlocks), static_cast<cudaStream_t>(stream));
    return with_activation(args.activation, [&](auto activation) {
      const auto kernel = activation_backward_kernel<A, decltype(activation)::value>;
      return cudaLaunchKernelEx(&config, kernel, args, columns);
    });
  };
  return for_widest_access(args.dtype, body, args.expert_size, args.grad_act, args.preact,
                           args.grad_preact);
}

}  // namespace fomoe::cuda
