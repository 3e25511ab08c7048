// combine: y[t] = sum over k, in slot order, of weights[t, k] * rows[row_of_slot[t, k]]; kernels.h.
//
// Bound by memory: every row on a resident expert is read once and y is written once. A warp owns
// the 32 neighbouring vectors (512 bytes where rows allow 16-byte accesses) of one token, each lane
// one of them, and reads the rows of kSlotsAhead slots before it adds the first, which keeps enough
// bytes in flight. A token has one lane per column: no atomics, a fixed order of summation.
#include <cstdint>

#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kSlotsAhead = 4;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

// The rows and weights of kSlotsAhead slots from `first` on; slots at and past top_k count as
// skipped. All lanes of a warp read the same addresses.
struct SlotBlock {
  Vector<int32_t, kSlotsAhead> row;
  Vector<float, kSlotsAhead> weight;

  __device__ SlotBlock(const int32_t* row_of_slot, const float* weights, int32_t first,
                       int32_t top_k, bool aligned) {
    if (aligned) {
      row = *reinterpret_cast<const Vector<int32_t, kSlotsAhead>*>(row_of_slot + first);
      if (weights != nullptr) {
        weight = *reinterpret_cast<const Vector<float, kSlotsAhead>*>(weights + first);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSlotsAhead; ++i) {
        const bool exists = first + i < top_k;
        row.unit[i] = exists ? row_of_slot[first + i] : -1;
        if (exists && weights != nullptr) weight.unit[i] = weights[first + i];
      }
    }
    if (weights == nullptr) {
#pragma unroll
      for (int i = 0; i < kSlotsAhead; ++i) weight.unit[i] = 1.0f;
    }
  }
};

// Grid (token blocks, column blocks), block (lane, warp). `columns` counts vectors;
// `aligned_slots`: the slots of every token can be read kSlotsAhead at a time.
template <class A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    combine_kernel(const void* __restrict__ rows, const float* __restrict__ weights,
                   const int32_t* __restrict__ row_of_slot, int64_t tokens, int64_t columns,
                   int32_t top_k, bool aligned_slots, void* __restrict__ y) {
  using V = typename A::V;
  const V* __restrict__ row_vectors = static_cast<const V*>(rows);
  V* __restrict__ y_vectors = static_cast<V*>(y);

  const int64_t token_step = int64_t(gridDim.x) * kWarpsPerBlock;
  const int64_t column_step = int64_t(gridDim.y) * kWarp;
  for (int64_t token = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y; token < tokens;
       token += token_step) {
    const int32_t* token_rows = row_of_slot + token * top_k;
    const float* token_weights = weights == nullptr ? nullptr : weights + token * top_k;
    for (int64_t column = int64_t(blockIdx.y) * kWarp + threadIdx.x; column < columns;
         column += column_step) {
      float sum[A::kWidth] = {};
      for (int32_t first = 0; first < top_k; first += kSlotsAhead) {
        const SlotBlock slots(token_rows, token_weights, first, top_k, aligned_slots);
        V read[kSlotsAhead];
#pragma unroll
        for (int i = 0; i < kSlotsAhead; ++i) {
          const int64_t row = slots.row.unit[i];
          if (row >= 0) read[i] = row_vectors[row * columns + column];
        }
#pragma unroll
        for (int i = 0; i < kSlotsAhead; ++i) {
          if (slots.row.unit[i] < 0) continue;
          float values[A::kWidth];
          A::unpack(read[i], values);
#pragma unroll
          for (int v = 0; v < A::kWidth; ++v)
            sum[v] = fmaf(slots.weight.unit[i], values[v], sum[v]);
        }
      }
      y_vectors[token * columns + column] = A::pack(sum);
    }
  }
}

template <class A>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  const int64_t columns = args.hidden / A::kWidth;
  const bool aligned_slots = args.top_k % kSlotsAhead == 0 && is_aligned(args.row_of_slot, 16) &&
                             is_aligned(args.weights, 16);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(args.tokens, kWarpsPerBlock, kMaxGridX),
                        blocks_for(columns, kWarp, kMaxGridY));
  config.blockDim = dim3(kWarp, kWarpsPerBlock);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, combine_kernel<A>, args.rows, args.weights, args.row_of_slot,
                            args.tokens, columns, args.top_k, aligned_slots, args.y);
}

}  // namespace

int combine(const CombineArgs& args, void* stream) {
  if (args.tokens == 0 || args.hidden == 0) return cudaSuccess;
  const auto body = [&](auto access) {
    return launch<decltype(access)>(args, static_cast<cudaStream_t>(stream));
  };
  return for_widest_access(args.dtype, body, args.hidden, args.rows, args.y);
}

}  // namespace fomoe::cuda
