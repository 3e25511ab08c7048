// What happens to finished sums, a warp's strip at a time (window.cuh). Both kinds of GEMM use these
// epilogues. Each has
//   kInterleaved    a strip holds 32 gate columns and the 32 up columns that belong to them
//   kAdds           it adds to what is there
//   kWindows        windows of staging that a warp needs
//   look_ahead      brings what a strip will read into L2; called by whole warps
//   strip<kStoresMatrices>(sums, place, staging)    called by whole warps
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../kernels.h"
#include "../arch/prefetch.cuh"
#include "activation.cuh"
#include "window.cuh"

namespace fomoe::cuda {

// Adds a row of `bias` (null: nothing) to the strip's columns 8 * kFirst .. 8 * (kFirst + kBlocks).
template <class Format, int kFirst, int kBlocks>
__device__ inline void add_bias(Sums& sums, const void* bias, int64_t at, int columns, int lane) {
  if (bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    if (column >= columns) continue;
    const unsigned char* from = element_at<Format>(bias, at + column);
    float2 pair;
    if constexpr (kIsF32<Format>) {
      pair = *reinterpret_cast<const float2*>(from);
    } else {
      pair = unpack_pair<Format>(*reinterpret_cast<const uint32_t*>(from));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[4 * (kFirst + j) + 2 * h] += pair.x;
      sums[4 * (kFirst + j) + 2 * h + 1] += pair.y;
    }
  }
}

// Writes kCount quads of a strip from quad kFirst on through a window.
template <int kFirst, int kCount, class AnyWindow>
__device__ inline void write_quads(AnyWindow& window, const Sums& sums) {
#pragma unroll
  for (int quad = 0; quad < kCount; ++quad) {
    Quad pairs;
    take_quad(sums, kFirst + quad, pairs);
    window.put(quad, pairs);
  }
  window.flush();
}

// out[row][column] = sums + bias[resident][column]
template <class Format_>
struct StoreRows {
  using Format = Format_;
  static constexpr bool kInterleaved = false, kAdds = false;
  static constexpr int kWindows = 1;
  void* out;
  int64_t stride;    // of out
  const void* bias;  // [R, stride] or null

  __device__ void look_ahead(const Place&) const {}
  template <bool kStoresMatrices>
  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    const int lane = threadIdx.x % kWarp;
    add_bias<Format, 0, 8>(sums, bias, place.resident * stride + place.column, place.columns, lane);
    Window<Format, kStoresMatrices> window(staging, lane);
    window.move(element_at<Format>(out, place.row * stride + place.column), stride, place.rows,
                place.columns);
    write_quads<0, kQuads>(window, sums);
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

  __device__ void look_ahead(const Place&) const {}
  template <bool>
  __device__ void strip(Sums& sums, const Place& place, unsigned char*) const {
    Window<F32, false> window(nullptr, threadIdx.x % kWarp);
    window.move(total + place.row * stride + place.column, stride, place.rows, place.columns);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      Quad pairs, old;
      take_quad(sums, quad, pairs);
      window.get(quad, old);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = make_float2(old[i].x + pairs[i].x, old[i].y + pairs[i].y);
      window.put(quad, pairs);
    }
  }
};

// act = activation(sums + bias); keeps sums + bias in preact unless that is null.
template <class Format_, Activation kActivation>
struct Activate {
  using Format = Format_;
  static constexpr bool kInterleaved = is_gated(kActivation), kAdds = false;
  static constexpr int kWindows = 1;
  static constexpr int kGates = kInterleaved ? 2 : 1;
  static constexpr int kResultQuads = kQuads / kGates;
  void* act;         // [S, N]
  void* preact;      // [S, G*N] or null
  const void* bias;  // [R, G*N] or null
  int64_t expert_size;

  __device__ void look_ahead(const Place&) const {}
  template <bool kStoresMatrices>
  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    constexpr int kBlocks = 2 * kResultQuads;  // of 8 columns
    const int lane = threadIdx.x % kWarp;
    const int64_t width = kGates * expert_size, first = place.resident * width + place.column;
    add_bias<Format, 0, kBlocks>(sums, bias, first, place.columns, lane);
    if constexpr (kGates == 2)
      add_bias<Format, 4, kBlocks>(sums, bias, first + expert_size, place.columns, lane);
    Window<Format, kStoresMatrices> window(staging, lane);
    if (preact != nullptr) {
      const int64_t at = place.row * width + place.column;
      window.move(element_at<Format>(preact, at), width, place.rows, place.columns);
      write_quads<0, kResultQuads>(window, sums);
      if constexpr (kGates == 2) {
        window.move(element_at<Format>(preact, at + expert_size), width, place.rows, place.columns);
        write_quads<kResultQuads, kResultQuads>(window, sums);
      }
    }
    window.move(element_at<Format>(act, place.row * expert_size + place.column), expert_size,
                place.rows, place.columns);
#pragma unroll
    for (int quad = 0; quad < kResultQuads; ++quad) {
      Quad gates, ups;
      take_quad(sums, quad, gates);
      take_quad(sums, (kGates - 1) * kResultQuads + quad, ups);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        gates[i] = make_float2(value(gates[i].x, ups[i].x), value(gates[i].y, ups[i].y));
      window.put(quad, gates);
    }
    window.flush();
  }

 private:
  __device__ static float value(float gate, float up) {
    return activate<kActivation, kIsF32<Format>>(gate, up).act;
  }
};

// The backward of activation and combine weight: sums are <grad_y, Wc>. ContractBackwardArgs.
template <class Format_, Activation kActivation>
struct ActivateBackward {
  using Format = Format_;
  static constexpr bool kInterleaved = false, kAdds = false;
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kGates = kGated ? 2 : 1, kWindows = kGates;
  const void* preact;          // [S, G*N]
  const float* weights;        // [S], by slot
  const int32_t* slot_of_row;  // [S]
  void* grad_preact;           // [S, G*N]
  void* scaled_act;            // [S, N]
  float* parts;                // [N / 64 rounded up, S], <act, sums> of a strip's columns
  int64_t slots, expert_size;

  // The pre-activations, a line of 128 bytes for each row (16-bit elements) and gate: a lane asks for one.
  __device__ void look_ahead(const Place& place) const {
    static_assert(kStripRows * kGates <= kWarp);
    const int lane = threadIdx.x % kWarp, row = lane / kGates, gate = lane % kGates;
    if (row < place.rows && place.columns > 0)
      prefetch_l2(at_preact(preact, place, gate) + row * width() * kElementBytes<Format>);
  }

  template <bool kStoresMatrices>
  __device__ void strip(Sums& sums, const Place& place, unsigned char* staging) const {
    using W = Window<Format, kStoresMatrices>;
    const int lane = threadIdx.x % kWarp;
    W gates(staging, lane), ups(staging + (kGates - 1) * W::kBytes, lane);
    // All that comes from global memory is asked for before any of it is waited for.
    typename W::Chunks gate_chunks, up_chunks;
    gates.move(at_preact(preact, place, 0), width(), place.rows, place.columns);
    gates.load(gate_chunks);
    if constexpr (kGated) {
      ups.aim(at_preact(preact, place, 1), width(), place.rows, place.columns);
      ups.load(up_chunks);
    }
    float weight[2];  // of the lane's upper and lower row
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      weight[h] = row < place.rows ? weights[slot_of_row[place.row + row]] : 0.0f;
    }
    gates.stage(gate_chunks);
    if constexpr (kGated) ups.stage(up_chunks);
    // Gradients are staged where pre-activations are; in fp32 both are where they belong.
    W gate_grads = gates, up_grads = ups;
    gate_grads.aim(at_preact(grad_preact, place, 0), width(), place.rows, place.columns);
    if constexpr (kGated)
      up_grads.aim(at_preact(grad_preact, place, 1), width(), place.rows, place.columns);
    float dots[2] = {};
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      Quad gate, up, sum;
      gates.get(quad, gate);
      if constexpr (kGated) ups.get(quad, up);
      take_quad(sums, quad, sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (!kGated) up[i] = gate[i];
        through(gate[i].x, up[i].x, weight[i % 2], sum[i].x, dots[i % 2]);
        through(gate[i].y, up[i].y, weight[i % 2], sum[i].y, dots[i % 2]);
      }
      give_quad(sums, quad, sum);
      __syncwarp();  // all lanes have read the quad
      gate_grads.put(quad, gate);
      if constexpr (kGated) up_grads.put(quad, up);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      dots[h] += __shfl_xor_sync(kAllLanes, dots[h], 1);
      dots[h] += __shfl_xor_sync(kAllLanes, dots[h], 2);
      if (row < place.rows && lane % 4 == 0)
        parts[place.column / kStripColumns * slots + place.row + row] = dots[h];
    }
    gate_grads.flush();
    if constexpr (kGated) up_grads.flush();
    gates.move(element_at<Format>(scaled_act, place.row * expert_size + place.column), expert_size,
               place.rows, place.columns);
    write_quads<0, kQuads>(gates, sums);
  }

 private:
  __device__ int64_t width() const { return kGates * expert_size; }
  // Where the strip begins in pre-activations or their gradients; gate 1: the up columns.
  __device__ unsigned char* at_preact(const void* base, const Place& place, int gate) const {
    return element_at<Format>(base, place.row * width() + gate * expert_size + place.column);
  }
  // One element: gate and up become their gradients, `sum` becomes weight * act.
  __device__ static void through(float& gate, float& up, float weight, float& sum, float& dot) {
    const Activated a = activate<kActivation, kIsF32<Format>>(gate, up);
    dot = fmaf(a.act, sum, dot);
    gate = a.gate_slope * (weight * sum);
    up = a.up_slope * (weight * sum);
    sum = weight * a.act;
  }
};

}  // namespace fomoe::cuda
