// Slices of operands in shared memory: lines in chunks of 16 bytes, swizzled so that the 8 lines that
// ldmatrix or wgmma reads at once lie in different banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "arch/async_copy.cuh"
#include "epilogue.cuh"

namespace fomoe::cuda {

constexpr int kSliceBytes = 128;  // of the sum, where that is the contiguous dimension
constexpr int kChunk = 16;

__device__ inline unsigned char* chunk_at(unsigned char* slice, int line, int line_bytes,
                                          int chunk) {
  return slice + line * line_bytes + (chunk ^ (line & 7)) * kChunk;
}

// A slice whose lines are contiguous along the sum, copied by cp.async: kLines lines of 128 bytes, by
// the first kCopying threads of the block.
template <class Format, int kLines, int kCopying>
class LineSlice {
 public:
  // Line i of the slice comes from line source(i) of the operand; -1: zeros.
  template <class Source>
  __device__ void begin(const Source& source) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) line_[i] = source(first_line() + i * kStep);
  }
  // Elements sum .. sum_end of the lines, `data` being the operand's first element.
  __device__ void copy(unsigned char* slice, const void* data, int64_t stride, int64_t sum,
                       int64_t sum_end) const {
    const int chunk = threadIdx.x % kChunks;
    const int64_t element = sum + chunk * (kChunk / kElementBytes<Format>);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool exists = line_[i] >= 0 && element < sum_end;
      const int64_t from = exists ? line_[i] * stride + element : 0;
      async_copy_16(chunk_at(slice, first_line() + i * kStep, kSliceBytes, chunk),
                    static_cast<const unsigned char*>(data) + from * kElementBytes<Format>, exists);
    }
  }

 private:
  static constexpr int kChunks = kSliceBytes / kChunk;
  static constexpr int kStep = kCopying / kChunks, kPerThread = kLines / kStep;
  __device__ static int first_line() { return threadIdx.x / kChunks; }
  int32_t line_[kPerThread];
};

}  // namespace fomoe::cuda
