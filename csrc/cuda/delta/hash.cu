// hash_bits: the sum over 4-byte words of a mix of each word and its index; kernels.h. Sums mod 2^64 do
// not depend on the order, so blocks add theirs by atomics.
#include <cstdint>

#include "../arch/shared_memory.cuh"
#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 1 << 12;

__device__ uint64_t mixed(uint32_t word, int64_t index) {
  return mix64(uint64_t(word) + (uint64_t(index) << 32));
}

// kWords words at a time where bytes are aligned to them, single bytes else (kWords 1).
template <int kWords, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    hash_kernel(const uint8_t* __restrict__ bytes, int64_t numel, uint64_t* __restrict__ hash) {
  FOMOE_SHARED(uint64_t, of_warp, [kWarps]);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  const int64_t whole = numel / (4 * kWords);  // vectors
  uint64_t sum = thread == 0 ? uint64_t(numel) : 0;
#pragma unroll 4
  for (int64_t i = thread; i < whole; i += threads) {
    Vector<uint32_t, kWords> read;
    if constexpr (kAligned) {
      read = reinterpret_cast<const Vector<uint32_t, kWords>*>(bytes)[i];
    } else {
      memcpy(&read, bytes + i * int64_t(sizeof(read)), sizeof(read));
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) sum += mixed(read.unit[w], i * kWords + w);
  }
  // The rest is fewer words than threads.
  const int64_t last = whole * kWords + thread;
  if (last * 4 < numel) {
    uint32_t word = 0;
    for (int b = 0; b < 4 && last * 4 + b < numel; ++b)
      word |= uint32_t(bytes[last * 4 + b]) << (8 * b);
    sum += mixed(word, last);
  }
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warp[w];
  atomicAdd(reinterpret_cast<unsigned long long*>(hash), static_cast<unsigned long long>(sum));
}

template <int kWords, bool kAligned>
cudaError_t launch(const HashArgs& args, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(args.numel, 16 * kThreads, kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, hash_kernel<kWords, kAligned>,
                            static_cast<const uint8_t*>(args.bytes), args.numel, args.hash);
}

}  // namespace

int hash_bits(const HashArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_aligned(args.bytes, 16)) return launch<4, true>(args, cuda_stream);
  if (is_aligned(args.bytes, 4)) return launch<1, true>(args, cuda_stream);
  return launch<1, false>(args, cuda_stream);
}

}  // namespace fomoe::cuda
