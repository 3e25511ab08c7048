// delta_reduce: decodes the payloads of all members, adds them in rank order, and encodes the sum or
// writes it; kernels.h. One pass: a lane keeps the sum of its four values in registers, the block of a
// top-k chunk in shared memory.
#include "delta_blocks.cuh"
#include "delta_topk.cuh"

namespace fomoe::cuda {
namespace {

using namespace delta;

// The inputs of both kinds of sums.
struct Members {
  const uint8_t* payloads;
  int64_t stride;
  int32_t members, own_rank;
  const float* own;    // or null
  const float* error;  // or null
  int64_t numel;
  int alignment;  // of the payloads' parts
  bool own_aligned, error_aligned;

  __device__ bool is_own(int rank) const { return own != nullptr && rank == own_rank; }
  // The payload of a member that is not `own`.
  __device__ const uint8_t* payload_of(int rank) const {
    return payloads + stride * (own != nullptr && rank > own_rank ? rank - 1 : rank);
  }
};

// The sum starts with the value of member 0 itself.
__device__ void add_four(float (&sum)[kFour], const float (&value)[kFour], bool first) {
#pragma unroll
  for (int e = 0; e < kFour; ++e) sum[e] = first ? value[e] : sum[e] + value[e];
}

template <Format F, int kBlock>
struct BlockSum : Members {
  static constexpr int kAhead = 4;  // members whose codes are loaded before the first is added

  __device__ void four(int64_t i, int present, float (&sum)[kFour]) const {
    float errors[kFour] = {}, mine[kFour] = {};
    if (error != nullptr) load_four(error, i, present, error_aligned, errors);
    if (own != nullptr) load_four(own, i, present, own_aligned, mine);
    const Place<F, kBlock> place(i);
    for (int first = 0; first < members; first += kAhead) {
      Codes<F> read[kAhead] = {};
      uint16_t step[kAhead] = {};
#pragma unroll
      for (int m = 0; m < kAhead; ++m) {
        const int rank = first + m;
        if (rank >= members || is_own(rank) || present == 0) continue;
        const uint8_t* payload = payload_of(rank);
        read[m] = load_piece<kFourBytes<F>>(payload + place.codes, alignment, bytes_of<F>(present));
        if constexpr (kHasSteps<F>) step[m] = load_bf16(payload + place.step, alignment);
      }
#pragma unroll
      for (int m = 0; m < kAhead; ++m) {
        const int rank = first + m;
        if (rank >= members) continue;
        float value[kFour];
        decode_four<F>(read[m], float_of(step[m]), value);
        if (is_own(rank)) {
          add_four(sum, mine, rank == 0);
        } else {
          add_four(sum, value, rank == 0);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      if (error != nullptr) sum[e] += errors[e];
      if (e >= present) sum[e] = 0.0f;  // codes past the end are no values
    }
  }
};

// The sums of a chunk's block.
__device__ float* chunk_sums() {
  FOMOE_SHARED(float4, sums, [kChunk / kFour]);  // for the alignment
  return &sums[0].x;
}

struct TopkSum : Members {
  static constexpr int kAhead = kChunkThreads / kMaxKept;  // members read at once

  // Members' kept values are added to a dense chunk; those of one member have different places. A
  // thread clears the sums of the last chunk that it alone has read.
  __device__ void prepare(int64_t chunk, int count) const {
    float* sums = chunk_sums();
    const int kept = kept_of(count);
    const int ahead = threadIdx.x / kMaxKept, entry = threadIdx.x % kMaxKept;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int e = 0; e < kFour; ++e) sums[Values::place(g) + e] = 0.0f;
    for (int first = 0; first < members; first += kAhead) {
      float value = 0.0f;
      int place = 0;
      const int mine = first + ahead;
      const bool listed = mine < members && !is_own(mine) && entry < kept;
      if (listed) read_entry(payload_of(mine) + chunk * kChunkBytes, entry, kept, value, place);
      for (int m = 0; m < kAhead && first + m < members; ++m) {
        __syncthreads();  // the member before has been added
        if (is_own(first + m)) {
          add_own(sums, chunk * kChunk, first + m == 0);
        } else if (m == ahead && listed) {
          sums[place] += value;
        }
      }
    }
    __syncthreads();
  }

  __device__ void four(int64_t i, int present, float (&v)[kFour]) const {
    float errors[kFour] = {};
    if (error != nullptr) load_four(error, i, present, error_aligned, errors);
    const float4 four = *reinterpret_cast<const float4*>(chunk_sums() + i % kChunk);
    const float sum[kFour] = {four.x, four.y, four.z, four.w};
    // Zeros that other members add turn -0 into 0.
    const bool alone = own != nullptr && members == 1;
#pragma unroll
    for (int e = 0; e < kFour; ++e) {
      v[e] = alone ? sum[e] : sum[e] + 0.0f;
      if (error != nullptr) v[e] += errors[e];
    }
  }

 private:
  __device__ void read_entry(const uint8_t* payload, int entry, int kept, float& value,
                             int& place) const {
    const float unit = float_of(load_bf16(payload, alignment));
    const uint8_t* indices = payload + 2;
    // 12 bits that begin a byte or half a byte.
    const int bit = entry * kIndexBits;
    const uint32_t two = indices[bit / 8] | uint32_t(indices[bit / 8 + 1]) << 8;
    place = int(two >> (bit % 8) & ((1u << kIndexBits) - 1));
    const uint32_t code = indices[index_bytes(kept) + entry / 4] >> (2 * (entry % 4));
    value = topk_value((code & 1) != 0, (code & 2) != 0, unit);
  }

  __device__ void add_own(float* sums, int64_t begin, bool first) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float mine[kFour];
      const int64_t i = begin + Values::place(g);
      load_four(own, i, present_of(i, numel), own_aligned, mine);
#pragma unroll
      for (int e = 0; e < kFour; ++e) {
        float& sum = sums[Values::place(g) + e];
        sum = first ? mine[e] : sum + mine[e];
      }
    }
  }
};

// The sums of top-k payloads themselves.
__global__ void __launch_bounds__(kChunkThreads)
    topk_sum_kernel(const __grid_constant__ TopkSum source, const __grid_constant__ Target target) {
  const int64_t chunks = (target.numel + kChunk - 1) / kChunk;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    source.prepare(chunk, int(min(int64_t(kChunk), target.numel - chunk * kChunk)));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = chunk * kChunk + Values::place(g);
      const int present = present_of(i, target.numel);
      float v[kFour];
      source.four(i, present, v);
      store_four(target.sum, i, present, target.sum_aligned, v);
    }
  }
}

template <class Source>
Source source_of(const DeltaReduceArgs& args) {
  Source source{};
  source.payloads = args.payloads;
  source.stride = args.stride;
  source.members = args.members;
  source.own_rank = args.own_rank;
  source.own = args.own;
  source.error = args.error;
  source.numel = args.numel;
  source.own_aligned = is_aligned(args.own, 16);
  source.error_aligned = is_aligned(args.error, 16);
  source.alignment = payload_alignment(args.codec, args.payloads, args.stride);
  return source;
}

}  // namespace

int delta_reduce(const DeltaReduceArgs& args, void* stream) {
  if (args.numel == 0) return cudaSuccess;
  if (args.members < 1 || (args.payload == nullptr) == (args.sum == nullptr))
    return cudaErrorInvalidValue;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Target target = target_of(args);
  target.sum = args.sum;
  target.sum_aligned = is_aligned(args.sum, 16);
  if (args.codec.format == Format::topk) {
    const TopkSum source = source_of<TopkSum>(args);
    if (args.payload != nullptr) return launch_topk(source, target, cuda_stream);
    static PersistentGrid grid;
    return launch<TopkSum>(topk_sum_kernel, kChunkThreads, grid, source, target,
                           (args.numel + kChunk - 1) / kChunk, cuda_stream);
  }
  return with_format(args.codec, [&](auto format, auto block) {
    const auto source = source_of<BlockSum<format, block>>(args);
    if (args.payload == nullptr) return launch_sum(source, target, cuda_stream);
    return launch_encode<format, block>(source, target, cuda_stream);
  });
}

}  // namespace fomoe::cuda
