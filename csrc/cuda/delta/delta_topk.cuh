// Encoding of top-k: a block takes a chunk of 4096 values, 8 to a thread. A warp's values are
// neighbours, so order of index is order of warp, of group of 128, of lane, of value in the lane.
//
// The least kept magnitude is found by three histograms of its digits, of 11, 10 and 10 bits. Scans
// decide which of the values that equal it are kept, and where kept values go. All sums are of
// integers, so results do not depend on the order in which threads run.
//
// A Source is as in delta_blocks.cuh; its prepare(chunk, values) is called by all threads before.
#pragma once

#include "../arch/shared_memory.cuh"
#include "delta_blocks.cuh"

namespace fomoe::cuda::delta {

constexpr int kChunk = int(kTopkChunk), kMaxKept = kChunk / int(kTopkShare);
constexpr int kChunkThreads = 512, kChunkWarps = kChunkThreads / kWarp;
constexpr int kGroups = kChunk / (kChunkThreads * kFour);
constexpr int kBins = 2048;
constexpr int kIndexBits = 12;

__device__ inline int kept_of(int count) { return (count + int(kTopkShare) - 1) / int(kTopkShare); }
// Bytes of a chunk's indices, and of its codes.
__device__ inline int index_bytes(int kept) { return (kept * kIndexBits + 7) / 8; }
__device__ inline int code_bytes(int kept) { return (kept * 2 + 7) / 8; }
constexpr int64_t kChunkBytes = 2 + kMaxKept * kIndexBits / 8 + kMaxKept * 2 / 8;

struct Selection {
  alignas(16) uint32_t histogram[kBins];
  uint32_t of_warp[kChunkWarps];
  uint32_t digit, wanted;
  uint32_t sum;
  uint32_t index[kMaxKept];
  float value[kMaxKept];
};

// A thread's values and where in the chunk each group of four begins.
struct Values {
  float v[kGroups][kFour];
  __device__ static int place(int group) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return (warp * kGroups + group) * kTileValues + lane * kFour;
  }
};

__device__ inline uint32_t inclusive_scan(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, value, apart);
    if (lane >= apart) value += before;
  }
  return value;
}

// The sum of what the warps before this one wrote to of_warp.
__device__ inline uint32_t sum_before(const Selection& s) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return __reduce_add_sync(kAllLanes, lane < warp ? s.of_warp[lane] : 0u);
}

// The largest magnitude of the chunk.
__device__ inline uint32_t largest_of(const Values& values, Selection& s) {
  uint32_t largest = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int e = 0; e < kFour; ++e) largest = max(largest, magnitude(values.v[g][e]));
  largest = __reduce_max_sync(kAllLanes, largest);
  if (threadIdx.x % kWarp == 0) s.of_warp[threadIdx.x / kWarp] = largest;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, s.of_warp[threadIdx.x % kChunkWarps]);
}

// Among the magnitudes whose bits from kShift + kBits on are `prefix`, finds the digit of the wanted-th
// largest and appends it to `prefix`; `wanted` becomes the rank among those with that digit.
template <int kShift, int kBits>
__device__ inline void next_digit(const Values& values, Selection& s, uint32_t& prefix,
                                  uint32_t& wanted) {
  // Neighbouring bins are a thread's; thread 0 has the highest.
  constexpr int kMine = (1 << kBits) / kChunkThreads;
  const int place = kChunkThreads - 1 - int(threadIdx.x);
  auto* bins = reinterpret_cast<Vector<uint32_t, kMine>*>(s.histogram) + place;
  *bins = {};
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      const uint32_t bits = magnitude(values.v[g][e]);
      if ((bits >> kShift >> kBits) == prefix)
        atomicAdd(&s.histogram[(bits >> kShift) & ((1u << kBits) - 1)], 1u);
    }
  }
  __syncthreads();
  const Vector<uint32_t, kMine> count = *bins;
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) mine += count.unit[i];
  uint32_t above = inclusive_scan(mine);
  if (threadIdx.x % kWarp == kWarp - 1) s.of_warp[threadIdx.x / kWarp] = above;
  __syncthreads();
  above += sum_before(s) - mine;
  if (above < wanted && wanted <= above + mine) {
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      const uint32_t here = count.unit[i];
      if (above < wanted && wanted <= above + here) {
        s.digit = uint32_t(place * kMine + i);
        s.wanted = wanted - above;
      }
      above += here;
    }
  }
  __syncthreads();
  prefix = prefix << kBits | s.digit;
  wanted = s.wanted;
}

// Lists the `kept` values of largest magnitude in s.index and s.value, in order of index. Returns which
// of the thread's values they are: bit group * 4 + value.
__device__ inline uint32_t select(const Values& values, Selection& s, int kept) {
  uint32_t least = 0, ties = uint32_t(kept);  // the least kept magnitude, and how many have it
  next_digit<20, 11>(values, s, least, ties);
  next_digit<10, 10>(values, s, least, ties);
  next_digit<0, 10>(values, s, least, ties);
  // Larger ones are counted in the low half of a word, ties in the high half.
  uint32_t count[kGroups], all = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    count[g] = 0;
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      const uint32_t bits = magnitude(values.v[g][e]);
      count[g] += bits > least ? 1u : bits == least ? 0x10000u : 0u;
    }
    all += count[g];
  }
  all = __reduce_add_sync(kAllLanes, all);
  if (threadIdx.x % kWarp == 0) s.of_warp[threadIdx.x / kWarp] = all;
  __syncthreads();
  uint32_t before = sum_before(s);
  uint32_t chosen = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t inclusive = inclusive_scan(count[g]);
    uint32_t seen = before + inclusive - count[g];
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      const uint32_t bits = magnitude(values.v[g][e]);
      if (bits > least || (bits == least && seen >> 16 < ties)) {
        const uint32_t at = (seen & 0xffffu) + min(seen >> 16, ties);
        s.index[at] = uint32_t(Values::place(g) + e);
        s.value[at] = values.v[g][e];
        chosen |= 1u << (g * kFour + e);
      }
      seen += bits > least ? 1u : bits == least ? 0x10000u : 0u;
    }
    before += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
  }
  return chosen;
}

// The unit of the kept values, for all of the block's warps.
__device__ inline float unit_of(Selection& s, uint32_t largest, int kept) {
  // The first warp adds up; kMaxKept is two to a lane.
  if (threadIdx.x < kWarp) {
    const float down = power_down(largest, 20);
    uint32_t sum = 0;
    for (int at = threadIdx.x; at < kept; at += kWarp)
      sum += uint32_t(__float2int_rn(fabsf(s.value[at]) * down));
    sum = __reduce_add_sync(kAllLanes, sum);
    if (threadIdx.x == 0) s.sum = sum;
  }
  __syncthreads();
  const float mean = float(s.sum) / float(kept) * power_up(largest, 20);
  return float_of(nearest_step<Format::topk>(mean * 0.125f));
}

__device__ inline bool is_large(float value, float unit) { return fabsf(value) > 8.5f * unit; }
__device__ inline float topk_value(bool large, bool negative, float unit) {
  const float magnitude = (large ? 10.0f : 7.0f) * unit;
  return negative ? -magnitude : magnitude;
}

// Byte `at` of a chunk's payload, after the unit. `zeros`: all codes are 0.
__device__ inline uint8_t payload_byte(const Selection& s, int at, int kept, float unit,
                                       bool zeros) {
  const auto index = [&](int i) { return i >= kept ? 0u : zeros ? uint32_t(i) : s.index[i]; };
  if (at < index_bytes(kept)) {
    // Two indices in three bytes.
    const int pair = at / 3 * 2;
    const uint32_t both = index(pair) | index(pair + 1) << kIndexBits;
    return static_cast<uint8_t>(both >> (8 * (at % 3)));
  }
  const int first = (at - index_bytes(kept)) * 4;
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (zeros || first + i >= kept) continue;
    const float value = s.value[first + i];
    codes |= (uint32_t(is_large(value, unit)) | uint32_t(value < 0.0f) << 1) << (2 * i);
  }
  return static_cast<uint8_t>(codes);
}

template <class Source>
__global__ void __launch_bounds__(kChunkThreads, 2)
    topk_kernel(const __grid_constant__ Source source, const __grid_constant__ Target target) {
  FOMOE_SHARED(Selection, selection, [1]);
  Selection& s = selection[0];
  const int64_t chunks = (target.numel + kChunk - 1) / kChunk;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t begin = chunk * kChunk;
    const int count = int(min(int64_t(kChunk), target.numel - begin)), kept = kept_of(count);
    source.prepare(chunk, count);
    Values values;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = begin + Values::place(g);
      source.four(i, present_of(i, target.numel), values.v[g]);
    }
    const uint32_t largest = largest_of(values, s);
    const bool zeros = largest < kLeastMagnitude;
    uint32_t chosen = 0;
    float unit = 0.0f;
    if (!zeros) {
      chosen = select(values, s, kept);
      __syncthreads();
      unit = largest >= kInfinite ? float_of(kBadStep) : unit_of(s, largest, kept);
    }
    uint8_t* payload = target.payload + chunk * kChunkBytes;
    for (int at = threadIdx.x; at < index_bytes(kept) + code_bytes(kept); at += kChunkThreads)
      payload[2 + at] = payload_byte(s, at, kept, unit, zeros);
    if (threadIdx.x == 0)
      store_bf16(payload, target.alignment, static_cast<uint16_t>(__float_as_uint(unit) >> 16));
    if (target.error != nullptr) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < kFour; ++e) {
          float& v = values.v[g][e];
          if ((chosen >> (g * kFour + e) & 1) != 0)
            v -= topk_value(is_large(v, unit), v < 0.0f, unit);
        }
        const int64_t i = begin + Values::place(g);
        store_four(target.error, i, present_of(i, target.numel), target.error_aligned, values.v[g]);
      }
    }
    __syncthreads();  // of_warp, where all are zeros, goes to the next chunk
  }
}

template <class Source>
cudaError_t launch_topk(const Source& source, const Target& target, cudaStream_t stream) {
  static PersistentGrid grid;
  return launch<Source>(topk_kernel<Source>, kChunkThreads, grid, source, target,
                        (target.numel + kChunk - 1) / kChunk, stream);
}

}  // namespace fomoe::cuda::delta
