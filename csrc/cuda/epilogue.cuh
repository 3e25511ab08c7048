// What happens to finished products. A warp hands over strips of 16 rows x 64 columns, in the layout
// that mma.sync and wgmma leave them in: sums[4 j + 2 h + e] of lane l is row 8 h + l / 4, column
// 8 j + 2 (l % 4) + e. Both kinds of GEMM use these epilogues.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels.h"
#include "activation.cuh"
#include "formats.cuh"

namespace fomoe::cuda {

constexpr int kStripRows = 16, kStripColumns = 64, kStripSums = 32;
using Sums = float[kStripSums];

// Rows and columns of C that a strip stands for; `rows` and `columns` of them exist.
struct Place {
  int32_t resident;
  int64_t row;
  int rows;
  int column, columns;
};

// Formats by two values: what a lane holds of a row of a strip.
template <class Format>
struct PairOf;
template <>
struct PairOf<Bf16x2> {
  using Unit = uint32_t;
};
template <>
struct PairOf<F16x2> {
  using Unit = uint32_t;
};
template <>
struct PairOf<F32> {
  using Unit = float2;
};

template <class Format>
__device__ inline float2 unpack_pair(typename PairOf<Format>::Unit unit) {
  if constexpr (std::is_same_v<Format, F32>) {
    return unit;
  } else {
    float values[2];
    Format::unpack(unit, values);
    return make_float2(values[0], values[1]);
  }
}
template <class Format>
__device__ inline typename PairOf<Format>::Unit pack_pair(float2 pair) {
  if constexpr (std::is_same_v<Format, F32>) {
    return pair;
  } else {
    const float values[2] = {pair.x, pair.y};
    return Format::pack(values);
  }
}
template <class Format>
constexpr int kElementBytes = std::is_same_v<Format, F32> ? 4 : 2;

// A warp's window on up to 64 columns of 16 rows in global memory. A lane reads and writes pairs of
// its strip. 16-bit elements go through shared memory, so that global memory sees 16 bytes a lane;
// the padding puts the 8 rows that lanes write at once into different banks. fp32 pairs of four
// lanes fill a sector as they are.
template <class Format>
class Window {
 public:
  using Unit = typename PairOf<Format>::Unit;
  static constexpr bool kStaged = !std::is_same_v<Format, F32>;
  static constexpr int kRowBytes = kStripColumns * 2 + 16;
  static constexpr int kBytes = kStaged ? kStripRows * kRowBytes : 0;

  __device__ Window(unsigned char* staging, int lane) : staging_(staging), lane_(lane) {}

  // Moves to the window whose first element is at `corner`, rows `stride` elements apart. All lanes.
  __device__ void move(void* corner, int64_t stride, int rows, int columns) {
    corner_ = static_cast<unsigned char*>(corner);
    stride_ = stride * kElementBytes<Format>;
    rows_ = rows;
    columns_ = columns;
    if constexpr (kStaged) __syncwarp();  // what was staged before has been read
  }
  // Reads the window, zeros outside of it. All lanes.
  __device__ void fill() {
    if constexpr (kStaged) {
      for_chunks([&](unsigned char* staged, unsigned char* global, bool exists) {
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (exists) chunk = *reinterpret_cast<const uint4*>(global);
        *reinterpret_cast<uint4*>(staged) = chunk;
      });
      __syncwarp();
    }
  }
  // Writes the window. All lanes.
  __device__ void flush() {
    if constexpr (kStaged) {
      __syncwarp();
      for_chunks([&](const unsigned char* staged, unsigned char* global, bool exists) {
        if (exists) *reinterpret_cast<uint4*>(global) = *reinterpret_cast<const uint4*>(staged);
      });
    }
  }
  // The lane's pair of columns `block` * 8 and on, in its upper (0) or lower (1) row.
  __device__ float2 get(int block, int half) const {
    if constexpr (kStaged) {
      return unpack_pair<Format>(*reinterpret_cast<const Unit*>(staged_pair(block, half)));
    } else {
      if (!exists(block, half)) return make_float2(0.0f, 0.0f);
      return *reinterpret_cast<const float2*>(global_pair(block, half));
    }
  }
  __device__ void put(int block, int half, float2 pair) {
    if constexpr (kStaged) {
      *reinterpret_cast<Unit*>(staged_pair(block, half)) = pack_pair<Format>(pair);
    } else {
      if (exists(block, half)) *reinterpret_cast<float2*>(global_pair(block, half)) = pair;
    }
  }

 private:
  __device__ int row_of(int half) const { return lane_ / 4 + 8 * half; }
  __device__ int column_of(int block) const { return block * 8 + lane_ % 4 * 2; }
  __device__ bool exists(int block, int half) const {
    return row_of(half) < rows_ && column_of(block) < columns_;
  }
  __device__ unsigned char* staged_pair(int block, int half) const {
    return staging_ + row_of(half) * kRowBytes + column_of(block) * 2;
  }
  __device__ unsigned char* global_pair(int block, int half) const {
    return corner_ + row_of(half) * stride_ + column_of(block) * kElementBytes<Format>;
  }
  template <class Body>
  __device__ void for_chunks(const Body& body) const {
    constexpr int kChunks = kStripColumns * 2 / 16;
#pragma unroll
    for (int i = 0; i < kStripRows * kChunks / kWarp; ++i) {
      const int row = lane_ / kChunks + i * (kWarp / kChunks), chunk = lane_ % kChunks;
      body(staging_ + row * kRowBytes + chunk * 16, corner_ + row * stride_ + chunk * 16,
           row < rows_ && chunk * 8 < columns_);
    }
  }

  unsigned char* staging_;
  int lane_;
  unsigned char* corner_ = nullptr;
  int64_t stride_ = 0;
  int rows_ = 0, columns_ = 0;
};

template <class Format>
__device__ inline unsigned char* element_at(void* base, int64_t index) {
  return static_cast<unsigned char*>(base) + index * kElementBytes<Format>;
}

// Adds a row of `bias` (null: nothing) to the strip's columns 8 * first .. 8 * (first + kBlocks).
template <class Format, int kFirst, int kBlocks>
__device__ inline void add_bias(Sums& sums, const void* bias, int64_t at, int columns, int lane) {
  if (bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    if (column >= columns) continue;
    using Unit = typename PairOf<Format>::Unit;
    const float2 pair = unpack_pair<Format>(
        *reinterpret_cast<const Unit*>(element_at<Format>(const_cast<void*>(bias), at + column)));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[4 * (kFirst + j) + 2 * h] += pair.x;
      sums[4 * (kFirst + j) + 2 * h + 1] += pair.y;
    }
  }
}

__device__ inline float2 pair_of(const Sums& sums, int block, int half) {
  return make_float2(sums[4 * block + 2 * half], sums[4 * block + 2 * half + 1]);
}

// Every epilogue: kInterleaved, a strip holds 32 gate and the 32 up columns that belong to them;
// kAdds, it adds to what is there; kWindows, how much staging a warp needs; strip(sums, place,
// staging), called by whole warps.

// out[row][column] = sums + bias[resident][column]
template <class Format_>
struct StoreRows {
  using Format = Format_;
  static constexpr bool kInterleaved = false, kAdds = false;
  static constexpr int kWindows = 1;
  void* out;
  int64_t stride;    // of out
  const void* bias;  // [R, stride] or null

  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    const int lane = threadIdx.x % kWarp;
    add_bias<Format, 0, 8>(sums, bias, place.resident * stride + place.column, place.columns, lane);
    Window<Format> window(staging, lane);
    window.move(element_at<Format>(out, place.row * stride + place.column), stride, place.rows,
                place.columns);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) window.put(j, h, pair_of(sums, j, h));
    window.flush();
  }
};

// total[row][column] += sums, fp32
template <class Format_>
struct AddRows {
  using Format = Format_;
  static constexpr bool kInterleaved = false, kAdds = true;
  static constexpr int kWindows = 0;
  float* total;
  int64_t stride;

  __device__ void strip(Sums& sums, const Place& place, unsigned char*) const {
    Window<F32> window(nullptr, threadIdx.x % kWarp);
    window.move(total + place.row * stride + place.column, stride, place.rows, place.columns);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 old = window.get(j, h), sum = pair_of(sums, j, h);
        window.put(j, h, make_float2(old.x + sum.x, old.y + sum.y));
      }
  }
};

// act = activation(sums + bias); keeps sums + bias in preact unless that is null.
template <class Format_, bool kGated>
struct Activate {
  using Format = Format_;
  static constexpr bool kInterleaved = kGated, kAdds = false;
  static constexpr int kWindows = 1;
  static constexpr int kBlocks = kGated ? 4 : 8;  // of 8 columns of act
  void* act;                                      // [S, N]
  void* preact;                                   // [S, G*N] or null
  const void* bias;                               // [R, G*N] or null
  int64_t expert_size;
  Activation activation;

  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    constexpr int kGates = kGated ? 2 : 1;
    const int lane = threadIdx.x % kWarp;
    const int64_t width = kGates * expert_size, first = place.resident * width + place.column;
    add_bias<Format, 0, kBlocks>(sums, bias, first, place.columns, lane);
    if constexpr (kGated)
      add_bias<Format, 4, kBlocks>(sums, bias, first + expert_size, place.columns, lane);
    Window<Format> window(staging, lane);
    if (preact != nullptr) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = place.row * width + gate * expert_size + place.column;
        window.move(element_at<Format>(preact, at), width, place.rows, place.columns);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) window.put(j, h, pair_of(sums, gate * kBlocks + j, h));
        window.flush();
      }
    }
    window.move(element_at<Format>(act, place.row * expert_size + place.column), expert_size,
                place.rows, place.columns);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 gate = pair_of(sums, j, h);
        const float2 up = kGated ? pair_of(sums, kGated ? 4 + j : j, h) : gate;
        window.put(j, h, make_float2(value(gate.x, up.x), value(gate.y, up.y)));
      }
    window.flush();
  }

  __device__ float value(float gate, float up) const {
    return activate<std::is_same_v<Format, F32>, kGated>(activation, gate, up).act;
  }
};

// The backward of activation and combine weight: sums are <grad_y, Wc>. ContractBackwardArgs.
template <class Format_, bool kGated>
struct ActivateBackward {
  using Format = Format_;
  static constexpr bool kInterleaved = false, kAdds = false;
  static constexpr int kWindows = kGated ? 2 : 1;
  const void* preact;          // [S, G*N]
  const float* weights;        // [S], by slot
  const int32_t* slot_of_row;  // [S]
  void* grad_preact;           // [S, G*N]
  void* scaled_act;            // [S, N]
  float* parts;                // [N / 64 rounded up, S], <act, sums> of a strip's columns
  int64_t slots, expert_size;
  Activation activation;

  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    constexpr int kGates = kGated ? 2 : 1;
    const int lane = threadIdx.x % kWarp;
    const int64_t width = kGates * expert_size, first = place.row * width + place.column;
    Window<Format> gates(staging, lane), ups(staging + (kGated ? Window<Format>::kBytes : 0), lane);
    gates.move(element_at<Format>(const_cast<void*>(preact), first), width, place.rows,
               place.columns);
    gates.fill();
    if constexpr (kGated) {
      ups.move(element_at<Format>(const_cast<void*>(preact), first + expert_size), width,
               place.rows, place.columns);
      ups.fill();
    }
    // fp32 windows write at once, so grad_preact is aimed at a window of its own.
    Window<Format> gate_grads = gates, up_grads = ups;
    aim(gate_grads, first, width, place);
    if constexpr (kGated) aim(up_grads, first + expert_size, width, place);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      const bool there = row < place.rows;
      const float weight = there ? weights[slot_of_row[place.row + row]] : 0.0f;
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 gate = gates.get(j, h), up = kGated ? ups.get(j, h) : gate;
        float2 sum = pair_of(sums, j, h), gate_grad, up_grad;
        through(gate.x, up.x, weight, sum.x, dot, gate_grad.x, up_grad.x);
        through(gate.y, up.y, weight, sum.y, dot, gate_grad.y, up_grad.y);
        sums[4 * j + 2 * h] = sum.x;
        sums[4 * j + 2 * h + 1] = sum.y;
        gate_grads.put(j, h, gate_grad);
        if constexpr (kGated) up_grads.put(j, h, up_grad);
      }
      dot += __shfl_xor_sync(kAllLanes, dot, 1);
      dot += __shfl_xor_sync(kAllLanes, dot, 2);
      if (there && lane % 4 == 0)
        parts[place.column / kStripColumns * slots + place.row + row] = dot;
    }
    gate_grads.flush();
    if constexpr (kGated) up_grads.flush();
    gates.move(element_at<Format>(scaled_act, place.row * expert_size + place.column), expert_size,
               place.rows, place.columns);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) gates.put(j, h, pair_of(sums, j, h));
    gates.flush();
  }

 private:
  __device__ void aim(Window<Format>& window, int64_t at, int64_t width, const Place& place) const {
    window.move(element_at<Format>(grad_preact, at), width, place.rows, place.columns);
  }
  // One element: `sum` becomes weight * act.
  __device__ void through(float gate, float up, float weight, float& sum, float& dot,
                          float& gate_grad, float& up_grad) const {
    const Activated a = activate<std::is_same_v<Format, F32>, kGated>(activation, gate, up);
    dot = fmaf(a.act, sum, dot);
    gate_grad = a.gate_slope * (weight * sum);
    up_grad = a.up_slope * (weight * sum);
    sum = weight * a.act;
  }
};

}  // namespace fomoe::cuda
