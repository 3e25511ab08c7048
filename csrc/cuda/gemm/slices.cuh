// Slices (k-blocks) of operands in shared memory, filled by cp.async: lines in chunks of 16 bytes,
// swizzled so that the 8 lines that ldmatrix or wgmma reads at once are in different banks.
//
// The address of a copy is one 32-bit multiply-add, so a line must be below 4 GiB (experts.cu checks).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/async_copy.cuh"
#include "../arch/compiler.cuh"
#include "grouped.cuh"

namespace fomoe::cuda {

constexpr int kSliceBytes = 128;  // of the sum, where that is the contiguous dimension
constexpr int kChunk = 16, kSwizzledLines = 8;

// The place of a chunk of a line in a slice.
__device__ inline int chunk_offset(int line, int line_bytes, int chunk) {
  return line * line_bytes + (chunk ^ (line & (kSwizzledLines - 1))) * kChunk;
}
__device__ inline unsigned char* chunk_at(unsigned char* slice, int line, int line_bytes,
                                          int chunk) {
  return slice + chunk_offset(line, line_bytes, chunk);
}

// `line` of an operand as a distance from its first line (-1: none); copies 16 bytes, or zeros.
__device__ inline void copy_chunk(unsigned char* to, const unsigned char* from, int32_t line,
                                  uint32_t line_bytes, bool wanted) {
  async_copy_16(to, from + uint64_t(uint32_t(max(line, 0))) * line_bytes, wanted && line >= 0);
}

// A slice whose lines are contiguous along the sum: kLines lines of 128 bytes, copied by the first
// kCopying threads of the block.
template <class Format, int kLines, int kCopying>
class LineSlice {
 public:
  // Line i of the slice is line source(i) of the matrix at `data`; -1: zeros.
  template <class Source>
  __device__ void begin(const void* data, int64_t stride, const Source& source) {
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    element_ = chunk * (kChunk / kElementBytes<Format>);
    from_ = static_cast<const unsigned char*>(data) + chunk * kChunk;
    line_bytes_ = uint32_t(stride * kElementBytes<Format>);
    offset_ = chunk_offset(first, kSliceBytes, chunk);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) line_[i] = source(first + i * kStep);
  }
  // Elements sum .. sum_end of the lines.
  __device__ void copy(unsigned char* slice, int64_t sum, int64_t sum_end) const {
    const bool wanted = sum + element_ < sum_end;
    const unsigned char* from = from_ + sum * kElementBytes<Format>;
    keep_whole(from);
    unsigned char* to = slice + offset_;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      copy_chunk(to + i * kStep * kSliceBytes, from, line_[i], line_bytes_, wanted);
  }

 private:
  static constexpr int kChunks = kSliceBytes / kChunk;
  static constexpr int kStep = kCopying / kChunks, kPerThread = kLines / kStep;
  static_assert(kStep % kSwizzledLines == 0);  // all of a thread's lines are swizzled alike
  const unsigned char* from_;
  uint32_t line_bytes_;
  int element_, offset_;
  int32_t line_[kPerThread];
};

// A slice whose lines are steps of the sum: kDepth lines of kColumns elements, in panels of
// kPanelColumns, copied by the first kCopying threads of the block. kIndexed: an index may give the
// line of the operand for each step. The index is read one slice ahead, each entry by one lane of the
// warp that needs it, so that no copy waits for it.
template <class Format, int kDepth, int kColumns, int kPanelColumns, int kCopying, bool kIndexed>
class StepSlice {
 public:
  // For columns column .. columns of the matrix at `data`, from step `sum` on. All lanes.
  __device__ void begin(const void* data, int64_t stride, int64_t column, int64_t columns,
                        const int32_t* index, int64_t sum, int64_t sum_end) {
    const int chunk = threadIdx.x % kChunks;
    const int64_t element = column + chunk * (kChunk / kElementBytes<Format>);
    wanted_ = element < columns;
    from_ = static_cast<const unsigned char*>(data) + element * kElementBytes<Format>;
    keep_whole(from_);
    line_bytes_ = uint32_t(stride * kElementBytes<Format>);
#pragma unroll
    for (int i = 0; i < kOffsets; ++i)
      offset_[i] = chunk / kPanelChunks * kPanelBytes +
                   chunk_offset(first_line() + i * kStep, kLineBytes, chunk % kPanelChunks);
    if (kIndexed && index != nullptr) look_up(index, sum, sum_end);
  }
  // Copies steps sum .. sum_end; the next call continues after them. All lanes.
  __device__ void copy(unsigned char* slice, const int32_t* index, int64_t sum, int64_t sum_end) {
    int32_t lines = 0;
    if constexpr (kIndexed) {
      lines = index == nullptr ? in_order(sum + line_of_lane(), sum_end) : ahead_;
      if (index != nullptr) look_up(index, sum + kDepth, sum_end);
    }
    const int own = threadIdx.x % kWarp / kChunks;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int32_t line = kIndexed ? __shfl_sync(kAllLanes, lines, i * kLinesOfWarp + own)
                                    : in_order(sum + first_line() + i * kStep, sum_end);
      copy_chunk(slice + offset_[i % kOffsets] + i / kOffsets * kOffsets * kStep * kLineBytes,
                 from_, line, line_bytes_, wanted_);
    }
  }

 private:
  static constexpr int kChunks = kColumns * kElementBytes<Format> / kChunk;  // of a line
  static constexpr int kLineBytes = kPanelColumns * kElementBytes<Format>;
  static constexpr int kPanelChunks = kLineBytes / kChunk, kPanelBytes = kDepth * kLineBytes;
  static constexpr int kStep = kCopying / kChunks, kSteps = kDepth / kStep;
  static constexpr int kLinesOfWarp = kWarp / kChunks;  // that a warp copies at a time
  // Steps after which lines are swizzled alike again.
  static constexpr int kOffsets = kStep >= kSwizzledLines ? 1 : kSwizzledLines / kStep;
  static_assert(kChunks <= kWarp && kSteps * kLinesOfWarp <= kWarp && kSteps % kOffsets == 0);

  __device__ static int first_line() { return threadIdx.x / kChunks; }
  // The line of the slice whose index the lane reads for its warp.
  __device__ static int line_of_lane() {
    const int lane = threadIdx.x % kWarp;
    return threadIdx.x / kWarp * kLinesOfWarp + lane % kLinesOfWarp + lane / kLinesOfWarp * kStep;
  }
  __device__ static int32_t in_order(int64_t step, int64_t sum_end) {
    return step < sum_end ? int32_t(step) : -1;
  }
  __device__ void look_up(const int32_t* index, int64_t sum, int64_t sum_end) {
    const int64_t step = sum + line_of_lane();
    const bool exists = threadIdx.x % kWarp < kSteps * kLinesOfWarp && step < sum_end;
    ahead_ = exists ? index[step] : -1;
  }

  const unsigned char* from_;
  uint32_t line_bytes_;
  int offset_[kOffsets];
  bool wanted_;
  int32_t ahead_;
};

}  // namespace fomoe::cuda
