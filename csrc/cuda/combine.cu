// combine: y[t] = sum over k, in slot order, of weights[t, k] * rows[row_of_slot[t, k]]; kernels.h.
//
// Bound by memory: every row on a resident expert is read once and y is written once. A warp owns
// the 32 neighbouring vectors (512 bytes where rows allow 16-byte accesses) of one token, each lane
// one of them, and reads the rows of kSlotsAhead slots before it adds the first, which keeps enough
// bytes in flight. A token belongs to one lane per column: no atomics, one order of summation.
#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "formats.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kWarp = 32;
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

// Grid (token blocks, column blocks), block (lane, warp). `columns` counts vectors of kUnits units;
// `aligned_slots`: the slots of every token can be read kSlotsAhead at a time.
template <class Format, int kUnits>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    combine_kernel(const void* __restrict__ rows, const float* __restrict__ weights,
                   const int32_t* __restrict__ row_of_slot, int64_t tokens, int64_t columns,
                   int32_t top_k, bool aligned_slots, void* __restrict__ y) {
  using V = Vector<typename Format::Unit, kUnits>;
  constexpr int kValues = Format::kValues;
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
      float sum[kUnits * kValues] = {};
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
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            float values[kValues];
            Format::unpack(read[i].unit[u], values);
#pragma unroll
            for (int v = 0; v < kValues; ++v) {
              sum[u * kValues + v] = fmaf(slots.weight.unit[i], values[v], sum[u * kValues + v]);
            }
          }
        }
      }
      V result;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) result.unit[u] = Format::pack(sum + u * kValues);
      y_vectors[token * columns + column] = result;
    }
  }
}

template <class Format, int kUnits>
cudaError_t launch(const CombineArgs& args, cudaStream_t stream) {
  const int64_t columns = args.hidden / (kUnits * Format::kValues);
  const int64_t token_blocks = (args.tokens + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const int64_t column_blocks = (columns + kWarp - 1) / kWarp;
  const bool aligned_slots = args.top_k % kSlotsAhead == 0 && is_aligned(args.row_of_slot, 16) &&
                             is_aligned(args.weights, 16);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(token_blocks, kMaxGridX)),
                        static_cast<unsigned>(std::min(column_blocks, kMaxGridY)));
  config.blockDim = dim3(kWarp, kWarpsPerBlock);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, combine_kernel<Format, kUnits>, args.rows, args.weights,
                            args.row_of_slot, args.tokens, columns, args.top_k, aligned_slots,
                            args.y);
}

// The widest access that every row starts aligned for. `Pair`: two elements in one register.
template <class Element, class Pair>
cudaError_t launch_widest(const CombineArgs& args, cudaStream_t stream) {
  const auto fits = [&](int64_t bytes) {
    const int64_t row_bytes = args.hidden * int64_t(sizeof(typename Element::Unit));
    return row_bytes % bytes == 0 && is_aligned(args.rows, bytes) && is_aligned(args.y, bytes);
  };
  if (fits(16)) return launch<Pair, 4>(args, stream);
  if (fits(4)) return launch<Pair, 1>(args, stream);
  return launch<Element, 1>(args, stream);
}

}  // namespace

int combine(const CombineArgs& args, void* stream) {
  if (args.tokens == 0 || args.hidden == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32: return launch_widest<F32, F32>(args, cuda_stream);
    case DType::bf16: return launch_widest<Bf16, Bf16x2>(args, cuda_stream);
    case DType::f16: return launch_widest<F16, F16x2>(args, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda
