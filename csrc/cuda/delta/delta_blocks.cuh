// Encoding of every format but top-k: a warp goes from tile to tile, each lane with four values of a
// Source. Inputs are read once and outputs written once.
//
// A Source is an argument of the kernel; its four(i, present, v) gives values i .. i+3, zeros where
// not present, and is called by all lanes.
#pragma once

#include "../grid.cuh"
#include "delta.cuh"

namespace fomoe::cuda::delta {

// The outputs: payload and error.
struct Target {
  float* error;      // or null
  uint8_t* payload;  // or, for sums, null
  float* sum;
  int64_t numel;
  int alignment;  // of the payload's parts
  bool error_aligned, sum_aligned;
  bool stochastic;
  uint64_t seed, first;
};

template <class Args>
Target target_of(const Args& args) {
  Target target{};
  target.error = args.error;
  target.payload = args.payload;
  target.numel = args.numel;
  target.error_aligned = is_aligned(args.error, 16);
  target.stochastic = args.codec.stochastic;
  target.seed = args.codec.seed;
  target.first = args.first;
  target.alignment = payload_alignment(args.codec, args.payload, 0);
  return target;
}

// The first tile of a warp and how many there are between its tiles, in values.
struct Stride {
  int64_t first, step;
  __device__ Stride()
      : first((int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kTileValues),
        step(int64_t(gridDim.x) * kWarps * kTileValues) {}
};

template <Format F, int kBlock, class Source>
__global__ void __launch_bounds__(kThreads, 4)
    encode_kernel(const __grid_constant__ Source source, const __grid_constant__ Target target) {
  constexpr int kLanes = kBlock / kFour;
  const int lane = threadIdx.x % kWarp;
  const Stride stride;
  for (int64_t tile = stride.first; tile < target.numel; tile += stride.step) {
    const int64_t i = tile + lane * kFour;
    const int present = present_of(i, target.numel);
    const Place<F, kBlock> place(i);
    float v[kFour];
    source.four(i, present, v);
    Scale scale{};
    if constexpr (kHasSteps<F>) {
      const int count = int(min(int64_t(kBlock), target.numel - i / kBlock * kBlock));
      const uint16_t step = step_of<F, kLanes>(v, count, scale);
      if (lane % kLanes == 0 && present > 0)
        store_bf16(target.payload + place.step, target.alignment, step);
    }
    const Codes<F> codes =
        encode_four<F>(v, present, scale, target.stochastic, target.seed, target.first + i);
    store_piece<kFourBytes<F>>(target.payload + place.codes, target.alignment, bytes_of<F>(present),
                               codes);
    if (target.error == nullptr) continue;
    float decoded[kFour];
    decode_four<F>(codes, scale.step, decoded);
#pragma unroll
    for (int e = 0; e < kFour; ++e) v[e] -= decoded[e];
    store_four(target.error, i, present, target.error_aligned, v);
  }
}

// The values themselves.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Source source, const __grid_constant__ Target target) {
  const int lane = threadIdx.x % kWarp;
  const Stride stride;
  for (int64_t tile = stride.first; tile < target.numel; tile += stride.step) {
    const int64_t i = tile + lane * kFour;
    const int present = present_of(i, target.numel);
    float v[kFour];
    source.four(i, present, v);
    store_four(target.sum, i, present, target.sum_aligned, v);
  }
}

// Launches `kernel` with as many blocks as run at once, or fewer if the items need fewer.
template <class Source>
cudaError_t launch(void (*kernel)(Source, Target), int threads, PersistentGrid& grid,
                   const Source& source, const Target& target, int64_t items, cudaStream_t stream) {
  unsigned most = 0;
  if (const cudaError_t error = grid.size(kernel, threads, 0, most)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(items, 1, most));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, source, target);
}

inline int64_t tiles_of_blocks(int64_t numel) {
  constexpr int64_t kValues = kTileValues * kWarps;
  return (numel + kValues - 1) / kValues;
}

template <Format F, int kBlock, class Source>
cudaError_t launch_encode(const Source& source, const Target& target, cudaStream_t stream) {
  static PersistentGrid grid;
  return launch<Source>(encode_kernel<F, kBlock, Source>, kThreads, grid, source, target,
                        tiles_of_blocks(target.numel), stream);
}

template <class Source>
cudaError_t launch_sum(const Source& source, const Target& target, cudaStream_t stream) {
  static PersistentGrid grid;
  return launch<Source>(sum_kernel<Source>, kThreads, grid, source, target,
                        tiles_of_blocks(target.numel), stream);
}

// Calls body(constant of the format, constant of the block) for every format but top-k.
template <class Body>
cudaError_t with_format(const DeltaCodec& codec, const Body& body) {
  const auto of = [&]<Format F>(std::integral_constant<Format, F> format) -> cudaError_t {
    if constexpr (kHasSteps<F>) {
      if (codec.block == 64) return body(format, std::integral_constant<int, 64>{});
      if (codec.block != 128) return cudaErrorInvalidValue;
    }
    return body(format, std::integral_constant<int, 128>{});
  };
  switch (codec.format) {
    case Format::fp32: return of(std::integral_constant<Format, Format::fp32>{});
    case Format::bf16: return of(std::integral_constant<Format, Format::bf16>{});
    case Format::int8: return of(std::integral_constant<Format, Format::int8>{});
    case Format::int4: return of(std::integral_constant<Format, Format::int4>{});
    case Format::int2: return of(std::integral_constant<Format, Format::int2>{});
    case Format::topk: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda::delta
