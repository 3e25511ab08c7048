// Small kernels around copies by cp.async that arrive at mbarriers themselves, in the manner of
// selftest.cu and warpgroup.cu.
#include <string>

#include "../../../csrc/cuda/arch/async_copy.cuh"
#include "../../../csrc/cuda/arch/barrier.cuh"
#include "../../../csrc/cuda/arch/bulk_copy.cuh"
#include "../../../csrc/cuda/arch/tensor_map.cuh"
#include "../../../csrc/cuda/arch/warpgroup.cuh"
#include "kernels.cuh"

namespace fomoe::cuda {
namespace {

constexpr unsigned kStages = 2;

// ---- read by ordinary loads ----------------------------------------------------------------------

// Warp 0 copies lines, every third chunk left out; warp 1 writes them out from the other end.
template <int kDefect>
__global__ void copy_arrivals(const uint4* in, uint4* out) {
  FOMOE_SHARED(uint4, stages, [kStages][32]);
  FOMOE_SHARED(uint64_t, full, [kStages]);
  FOMOE_SHARED(uint64_t, empty, [kStages]);
  FOMOE_SHARED(uint64_t, spare, [1]);
  constexpr unsigned kLines = 4;
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (unsigned stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], kDefect == 2 ? 31 : 32);
      mbarrier_init(&empty[stage], 32);
    }
    mbarrier_init(spare, 16);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    for (unsigned line = 0; line < kLines - (kDefect == 6); ++line) {
      const unsigned stage = line % kStages;
      mbarrier_wait(&full[stage], line / kStages % 2);
      out[line * 32 + lane] = stages[stage][31 - lane];
      mbarrier_arrive(&empty[stage]);
    }
    return;
  }
  for (unsigned line = 0; line < kLines; ++line) {
    const unsigned stage = line % kStages;
    if (kDefect != 4) mbarrier_wait(&empty[stage], (line / kStages + 1) % 2);
    if (kDefect == 1) async_copy_arrive(&full[stage]);
    if (kDefect == 5 && lane == 5) {
      stages[stage][lane] = in[line * 32 + lane];
    } else {
      async_copy_16(&stages[stage][lane], in + line * 32 + lane, lane % 3 != 0);
    }
    if (kDefect != 1 && !(kDefect == 3 && lane == 31)) async_copy_arrive(&full[stage]);
  }
  // Some wait for their copies themselves: what those would do has happened, if nobody else waits.
  if (lane >= 16 || kDefect == 6) return;
  async_copy_commit();
  async_copy_arrive(spare);
  async_copy_wait<0>();
}

int run_copy_arrivals(int defect, const void* in, void* out) {
  return with_defect<6>(defect, [&](auto planted) {
    return launch(copy_arrivals<planted.value>, 64, 0, static_cast<const uint4*>(in),
                  static_cast<uint4*>(out));
  });
}

// ---- read by warpgroups --------------------------------------------------------------------------

constexpr int kSize = 64, kDepth = 64, kSteps = 4, kLength = kSteps * kDepth;
constexpr unsigned kTileBytes = kSize * kDepth * 2;

// Who waits for the copies of a: all consumers, some, who pass it on, or who issued them.
constexpr int kAll = 0, kSome = 1, kIssuer = 2;

// The two tiles of a stage change places now and then.
__device__ inline unsigned char* tile_at(unsigned char* shared, unsigned step, bool of_b) {
  const bool swapped = step / kStages % 2 == 1;
  return shared + (step % kStages * 2 + (of_b != swapped)) * kTileBytes;
}

// out = a . b^T, the rows of a from the last to the first: a producer warpgroup gathers them by cp.async
// and loads b by a tensor map, both for the same mbarrier; a consumer warpgroup multiplies.
template <int kDefect, int kWaits>
__global__ void __launch_bounds__(2 * kWarpgroup, 1)
    gathered(const __grid_constant__ TensorMap b_map, const uint16_t* a, float* out) {
  FOMOE_DYNAMIC_SHARED(shared);
  FOMOE_SHARED(uint64_t, full, [kStages]);
  FOMOE_SHARED(uint64_t, empty, [kStages]);
  const int t = int(threadIdx.x);
  if (t == 0) {
    for (unsigned stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], kWarpgroup + (kDefect != 7));
      mbarrier_init(&empty[stage], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (t < int(kWarpgroup)) {
    const uint16_t* from = a + (kSize - 1 - t / 8) * kLength + t % 8 * 8;
    for (unsigned step = 0; step < kSteps; ++step) {
      const unsigned stage = step % kStages;
      unsigned char *a_tile = tile_at(shared, step, false), *b_tile = tile_at(shared, step, true);
      mbarrier_wait(&empty[stage], (step / kStages + 1) % 2);
      if (t == 0) {
        mbarrier_arrive_expect(&full[stage], kDefect == 8 ? kTileBytes / 2 : kTileBytes);
        tensor_load(b_tile, &b_map, &full[stage], int(step) * kDepth, 0, 0);
      }
      if (kDefect == 4) async_copy_arrive(&full[stage]);
      for (int i = 0; i < kSize / 16; ++i)
        async_copy_16(swizzled(a_tile, t / 8 + 16 * i, t % 8),
                      from - 16 * i * kLength + int(step) * kDepth, true);
      if (kDefect == 3 && step == kSteps - 1) fence_proxy_async();
      if (kWaits == kIssuer) {
        async_copy_commit();
        async_copy_wait<0>();
        mbarrier_arrive(&full[stage]);
      } else if (kDefect != 4 && !(kDefect == 5 && t == 77)) {
        async_copy_arrive(&full[stage]);
      }
      if (kDefect == 6 && t == 77) async_copy_arrive(&full[stage]);
    }
    return;
  }
  float acc[kSize / 2] = {};
#pragma unroll 1
  for (unsigned step = 0; step < kSteps - (kDefect == 9); ++step) {
    const unsigned stage = step % kStages;
    if (kDefect == 2) fence_proxy_async();
    if (kWaits != kSome || (stage == 0 ? t == int(kWarpgroup) : t % 32 == 0))
      mbarrier_wait(&full[stage], step / kStages % 2);
    if (kWaits == kSome) {
      if (stage == 0) {
        barrier_sync(1, kWarpgroup);
      } else {
        __syncwarp();
      }
    }
    if (kDefect == 0 || kDefect > 3 || (kDefect == 3 && step < kSteps - 1)) fence_proxy_async();
    warpgroup_fence(acc);
    warpgroup_arrive();
#pragma unroll
    for (unsigned k = 0; k < kDepth / 16; ++k)
      warpgroup_multiply<Bf16x2, kSize, false, false>(
          acc, shared_matrix(tile_at(shared, step, false), 16, 1024) + 2 * k,
          shared_matrix(tile_at(shared, step, true), 16, 1024) + 2 * k, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_fence(acc);
    if (t == int(kWarpgroup)) mbarrier_arrive(&empty[stage]);
  }
  write_out<kSize>(acc, out);
}

template <int kDefect, int kWaits>
int run_gathered(void* out) {
  auto* result = static_cast<float*>(out);
  auto* a = reinterpret_cast<uint16_t*>(result + kSize * kSize);
  uint16_t* b = a + kSize * kLength;
  launch(fill<Bf16>, kWarpgroup, 0, a, kSize * kLength, 1u);
  launch(fill<Bf16>, kWarpgroup, 0, b, kSize * kLength, 2u);
  TensorMap map{};
  const cudaError_t error =
      make_tensor_map(&map, DType::bf16, b, {kLength, kSize, 1},
                      {kLength * 2, int64_t(kSize) * kLength * 2}, {kDepth, kSize, 1});
  if (error != cudaSuccess) return error;
  return launch(gathered<kDefect, kWaits>, 2 * kWarpgroup, kStages * 2 * kTileBytes, map, a,
                result);
}

}  // namespace

int arrivals_selftest(const char* name_, int defect, const void* in, void* out) {
  const std::string name = name_;
  if (name == "copy_arrivals") return run_copy_arrivals(defect, in, out);
  if (name == "gathered_some") return run_gathered<0, kSome>(out);
  if (name == "gathered_issuer") return run_gathered<0, kIssuer>(out);
  if (name == "gathered")
    return with_defect<9>(defect,
                          [&](auto planted) { return run_gathered<planted.value, kAll>(out); });
  return kUnknownTest;
}

}  // namespace fomoe::cuda
