// Copies the vectors of tokens to their rows, for gather, and scaled by weights for the backward of
// combine.
//
// Bound by memory: a token's vector is read from device memory once (the warps of a block work on
// neighbouring slots, so it comes from L1 for the others), every row is written once and, for
// the gradient of the weights, read once. A warp owns a slot and has kAhead vectors of each in
// flight. A row belongs to one slot and a dot product to one warp: no atomics, a fixed order of sums.
#pragma once

#include <cstdint>

#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {

struct ScatterArgs {
  const void* tokens_in;       // [T, D]
  const void* rows_in;         // [S, D], for the dot products; null without
  const float* weights;        // [T, K] or null = ones
  const int32_t* row_of_slot;  // [T, K]
  const int32_t* row_count;    // [1], rows from this one on become zeros; null = untouched
  int64_t slots, columns;      // columns: vectors to a row
  int32_t top_k;
  void* rows_out;  // [S, D]
  float* dots;     // [T, K] = <rows_in, tokens_in>, or null
};

namespace scatter {

constexpr int kWarpsPerBlock = 8;
constexpr int kAhead = 4;
constexpr int64_t kMaxBlocks = 1 << 20;

// One row; returns this lane's part of the dot product. Weighted: rows are scaled.
template <class A, bool kWeighted, bool kDot>
__device__ float write_row(const typename A::V* in, const typename A::V* row, float weight,
                           int64_t columns, typename A::V* out) {
  using V = typename A::V;
  float dot = 0.0f;
  for (int64_t first = threadIdx.x; first < columns; first += kAhead * kWarp) {
    V read[kAhead], other[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t column = first + i * kWarp;
      if (column >= columns) continue;
      read[i] = in[column];
      if constexpr (kDot) other[i] = row[column];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t column = first + i * kWarp;
      if (column >= columns) continue;
      if constexpr (kWeighted || kDot) {
        float values[A::kWidth];
        A::unpack(read[i], values);
        if constexpr (kDot) {
          float others[A::kWidth];
          A::unpack(other[i], others);
#pragma unroll
          for (int v = 0; v < A::kWidth; ++v) dot = fmaf(values[v], others[v], dot);
        }
        if constexpr (kWeighted) {
#pragma unroll
          for (int v = 0; v < A::kWidth; ++v) values[v] = weight * values[v];
          read[i] = A::pack(values);
        }
      }
      out[column] = read[i];
    }
  }
  return dot;
}

// Block (lane, warp), a warp per slot.
template <class A, bool kWeighted, bool kDot>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    scatter_kernel(const __grid_constant__ ScatterArgs args) {
  using V = typename A::V;
  const V* tokens_in = static_cast<const V*>(args.tokens_in);
  const V* rows_in = static_cast<const V*>(args.rows_in);
  V* rows_out = static_cast<V*>(args.rows_out);
  const int64_t first = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  const int64_t step = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t slot = first; slot < args.slots; slot += step) {
    const int64_t row = args.row_of_slot[slot];
    float dot = 0.0f;
    if (row >= 0) {
      const int64_t token = uint32_t(slot) / uint32_t(args.top_k);
      dot = write_row<A, kWeighted, kDot>(
          tokens_in + token * args.columns, kDot ? rows_in + row * args.columns : nullptr,
          kWeighted ? args.weights[slot] : 1.0f, args.columns, rows_out + row * args.columns);
    }
    if constexpr (kDot) {
      for (int apart = kWarp / 2; apart > 0; apart /= 2)
        dot += __shfl_xor_sync(kAllLanes, dot, apart);
      if (threadIdx.x == 0) args.dots[slot] = dot;
    }
  }
  if (args.row_count == nullptr) return;
  for (int64_t row = *args.row_count + first; row < args.slots; row += step) {
    for (int64_t column = threadIdx.x; column < args.columns; column += kWarp)
      rows_out[row * args.columns + column] = V{};
  }
}

template <class A, bool kWeighted, bool kDot>
cudaError_t launch(const ScatterArgs& args, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(args.slots, kWarpsPerBlock, kMaxBlocks));
  config.blockDim = dim3(kWarp, kWarpsPerBlock);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, scatter_kernel<A, kWeighted, kDot>, args);
}

}  // namespace scatter
}  // namespace fomoe::cuda
