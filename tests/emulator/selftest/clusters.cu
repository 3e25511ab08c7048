// Small kernels around clusters: their barrier, each other's shared memory, loads to several blocks; in the
// manner of selftest.cu and warpgroup.cu.
#include <string>

#include "../../../csrc/cuda/arch/barrier.cuh"
#include "../../../csrc/cuda/arch/cluster.cuh"
#include "../../../csrc/cuda/arch/tensor_map.cuh"
#include "kernels.cuh"

namespace fomoe::cuda {
namespace {

constexpr unsigned kBlocks = 4, kPair = 2;

template <class Kernel, class... Arguments>
int launch_pairs(Kernel* kernel, unsigned blocks, unsigned threads, unsigned shared_bytes,
                 Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kPair, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- words ---------------------------------------------------------------------------------------

// Each block writes to its partner's shared memory, and reads from there what the partner has kept.
template <int kDefect>
__global__ void cluster_words(const uint32_t* in, uint32_t* out) {
  FOMOE_SHARED(uint32_t, kept, [64]);
  FOMOE_SHARED(uint32_t, given, [64]);
  const unsigned t = threadIdx.x, rank = cluster_rank();
  const uint32_t* mine = in + blockIdx.x * 64;
  kept[t] = mine[t];
  if (kDefect == 7 && t >= 32) return;  // they are not waited for
  const RemoteShared there = remote_shared(&given[63 - t], kDefect == 3 ? rank + 1 : rank ^ 1);
  remote_store(there, mine[t] + 1);
  if (kDefect == 6) cluster_wait();
  if (kDefect == 4 && t % 32 < 8) {
    cluster_arrive();  // the others of the warp are at another one
  } else if (kDefect != 1) {
    cluster_arrive();
  }
  if (kDefect == 5) cluster_arrive();
  if (kDefect == 8) return;
  if (kDefect != 1) cluster_wait();
  const uint32_t partners = remote_load(remote_shared(&kept[t], rank ^ 1));
  out[blockIdx.x * 128 + t] = given[t];
  out[blockIdx.x * 128 + 64 + t] = partners;
  if (kDefect == 2) return;
  cluster_arrive();
  cluster_wait();
}

// ---- loads to both blocks --------------------------------------------------------------------------

constexpr unsigned kStages = 2, kSteps = 8, kHalf = 1024, kRows = 32;

// A ring of stages: each block loads one half of every stage of both blocks (warp 0), into a stage that
// both have read (warp 1).
template <int kDefect>
__global__ void multicast(const __grid_constant__ TensorMap map, uint4* out) {
  FOMOE_DYNAMIC_SHARED(stages);
  FOMOE_SHARED(uint64_t, full, [kStages]);
  FOMOE_SHARED(uint64_t, empty, [kStages]);
  const unsigned lane = threadIdx.x % 32, rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (unsigned stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], kDefect == 4 ? 1 : kPair);
    }
    mbarrier_init_fence();
  }
  if (kDefect == 5) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  for (unsigned step = 0; step < kSteps; ++step) {
    const unsigned stage = step % kStages, round = step / kStages;
    const unsigned row = (step + blockIdx.x / kPair) * 16 + rank * 8;
    unsigned char* half = stages + stage * kPair * kHalf + rank * kHalf;
    if (threadIdx.x == 0) {
      mbarrier_wait(&empty[stage], (round + 1) % 2);
      mbarrier_arrive_expect(&full[stage], kDefect == 2   ? kHalf
                                           : kDefect == 3 ? 3 * kHalf
                                                          : kPair * kHalf);
      tensor_load_to_blocks(half, &map, &full[stage], 0, int(row % kRows), 0,
                            kDefect == 1   ? 7u
                            : kDefect == 9 ? 1u << rank
                                           : 3u);
    }
    if (threadIdx.x < 32) continue;
    mbarrier_wait(&full[stage], round % 2);
    uint4* to = out + (blockIdx.x * kSteps + step) * kPair * kHalf / 16;
    for (unsigned chunk = lane; chunk < kPair * kHalf / 16; chunk += 32)
      to[chunk] = *reinterpret_cast<uint4*>(
          swizzled(stages + stage * kPair * kHalf, int(chunk / 8), int(chunk % 8)));
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[stage]);
    if (lane == 1 && kDefect != 4)
      remote_arrive(remote_shared(&empty[stage], kDefect == 7 ? rank : rank ^ 1));
    if (lane == 2 && kDefect == 8) remote_arrive(remote_shared(&empty[stage], rank ^ 1));
  }
  if (kDefect == 6) return;
  cluster_arrive();
  cluster_wait();
}

template <int kDefect>
int run_multicast(const void* in, void* out) {
  TensorMap map{};
  const cudaError_t error = make_tensor_map(&map, DType::bf16, in, {64, kRows, 1},
                                            {128, int64_t(kRows) * 128}, {64, 8, 1});
  if (error != cudaSuccess) return error;
  return launch_pairs(multicast<kDefect>, kDefect == 10 ? kBlocks - 1 : kBlocks, 64,
                      kStages * kPair * kHalf, map, static_cast<uint4*>(out));
}

}  // namespace

int clusters_selftest(const char* name_, int defect, const void* in, void* out) {
  const std::string name = name_;
  if (name == "cluster_words")
    return with_defect<8>(defect, [&](auto planted) {
      return launch_pairs(cluster_words<planted.value>, kBlocks, 64, 0,
                          static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out));
    });
  if (name == "multicast")
    return with_defect<10>(defect,
                           [&](auto planted) { return run_multicast<planted.value>(in, out); });
  return kUnknownTest;
}

}  // namespace fomoe::cuda
