// Stands in for CUDA's header, so that g++ compiles csrc/cuda/*.cu as they are and runs them on the
// CPU: blocks one after the other, threads of a block one after the other. Kernels that need their
// threads to meet (__syncthreads, shuffles) find no such function here and do not compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(8) float2 {
  float x, y;
};

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9
};
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Runs the kernel before it returns; refuses what every CUDA device refuses.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  const auto for_each = [](dim3 size, dim3& index, const auto& body) {
    for (index.z = 0; index.z < size.z; ++index.z)
      for (index.y = 0; index.y < size.y; ++index.y)
        for (index.x = 0; index.x < size.x; ++index.x) body();
  };
  for_each(grid, blockIdx, [&] {
    for_each(block, threadIdx, [&] { kernel(static_cast<Parameters>(arguments)...); });
  });
  return cudaSuccess;
}
