// What the self-tests of warpgroups share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "selftest.h"

namespace fomoe::cuda {
namespace {

constexpr unsigned kWarpgroup = 128;

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, unsigned threads, unsigned shared_bytes, Arguments... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls run(std::integral_constant<int, defect>), of 0 .. kDefects; nvcc compiles the right kernel alone.
template <int kDefects, int kDefect = 0, class Run>
int with_defect(int defect, const Run& run) {
  if (defect == kDefect) return run(std::integral_constant<int, kDefect>{});
#ifdef FOMOE_EMULATED
  if constexpr (kDefect < kDefects) return with_defect<kDefects, kDefect + 1>(defect, run);
#endif
  return kUnknownTest;
}

// Whole numbers from -2 to 2 as elements of a format.
template <class Element>
__global__ void fill(uint16_t* to, int count, unsigned seed) {
  for (int i = int(threadIdx.x); i < count; i += int(kWarpgroup)) {
    const float value = float(int((unsigned(i) + seed) * 2654435761u >> 16) % 5 - 2);
    to[i] = Element::pack(&value);
  }
}

// A tile's chunk of 16 bytes in 128-byte swizzle.
__device__ inline unsigned char* swizzled(unsigned char* tile, int row, int chunk) {
  return tile + row * 128 + (chunk ^ row % 8) * 16;
}

// Accumulators -> rows of kColumns.
template <int kColumns>
__device__ void write_out(const float (&acc)[kColumns / 2], float* out) {
  const unsigned t = threadIdx.x % kWarpgroup;
#pragma unroll
  for (unsigned i = 0; i < kColumns / 2; ++i) {
    const unsigned row = 16 * (t / 32) + 8 * (i / 2 % 2) + t % 32 / 4;
    out[row * kColumns + 8 * (i / 4) + 2 * (t % 4) + i % 2] = acc[i];
  }
}

}  // namespace
}  // namespace fomoe::cuda
