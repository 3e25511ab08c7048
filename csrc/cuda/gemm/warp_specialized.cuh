// Grouped GEMMs on Hopper: one producer warpgroup and two consumer warpgroups (sm_90a).
//
// The producer fills a ring of stages. A stage holds a slice (k-block) of both operands, 64 elements of
// the sum deep, loaded by TMA or, where rows are gathered, by cp.async into the same swizzled layout.
// The consumers multiply from shared memory with wgmma and run the epilogues of epilogue.cuh. In
// ping-pong each consumer computes every second tile, so that one is in its epilogue while the other
// multiplies; cooperating, each computes half of the rows of every tile. Stages are passed on by
// mbarriers: `full` when a slice has arrived, `empty` when it has been multiplied. Blocks are
// persistent, one per multiprocessor.
//
// In pairs two blocks of a cluster work in step, on neighbouring row tiles. Where these multiply by the
// same B, each block loads one half of a slice of B into both (multicast), so that it comes from L2 once.
// Rows of A each block loads for itself. `full` waits for both halves; `empty`, in both blocks, for the
// consumers of both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/barrier.cuh"
#include "../arch/bulk_copy.cuh"
#include "../arch/cluster.cuh"
#include "../arch/compiler.cuh"
#include "../arch/shared_memory.cuh"
#include "../arch/tensor_map.cuh"
#include "../arch/warpgroup.cuh"
#include "../grid.cuh"
#include "grouped.cuh"
#include "warp_specialized_producer.cuh"
#include "warp_specialized_shape.cuh"

namespace fomoe::cuda::warp_specialized {

// ---- the consumers -----------------------------------------------------------------------------------

// The layout of a slice for wgmma.
template <Major kMajor>
struct Slices {
  static constexpr bool kTransposed = kMajor == Major::line;
  static constexpr unsigned kLeading = kPanel, kStride = kGroupOf8;
  // Bytes from one product's share of the sum to the next one's.
  static constexpr int kStep = kTransposed ? kSumOfProduct * kRowBytes : kSumOfProduct * 2;
  __device__ static uint64_t at(const unsigned char* slice) {
    return shared_matrix(slice, kLeading, kStride);
  }
};

// In ping-pong the consumers' slices alternate, and a consumer may wait for its first slice only after
// the other has seen its last one arrive: the parity of a barrier distinguishes a round of the ring from
// the next one, not from the one after that.
struct Turns {
  int consumer;
  bool first, last;  // of the block's tiles

  __device__ void begin() const {
    if (!first) barrier_sync(1 + consumer, kConsumers * kGroup);
  }
  __device__ void hand_over() const {
    if (!last) barrier_arrive(1 + (consumer ^ 1), kConsumers * kGroup);
  }
};

// Says for the warp that it is done with a stage, to all blocks that load into it.
template <class Shape>
__device__ void give_back(const Barriers& barriers, int stage) {
  const unsigned lane = threadIdx.x % kWarp;
  if (lane >= Shape::kBlocks) return;
  if constexpr (Shape::kBlocks == 1) {
    mbarrier_arrive(barriers.empty + stage);
  } else {
    remote_arrive(remote_shared(barriers.empty + stage, lane));
  }
}

// Multiplies all slices of a tile; acc[p] are the sums of rows 64 * (first + p) and on. look_ahead() is
// called at the beginning of this consumer's turn: one main loop before its epilogue.
template <int kProducts, class Shape, class LookAhead>
__device__ void multiply_slices(float (&acc)[Shape::kProducts][Shape::kN / 2], int first,
                                int slices, unsigned char* shared, const Barriers& barriers,
                                const Turns& turns, Ring<Shape::kStages>& ring,
                                const LookAhead& look_ahead) {
  using A = Slices<Shape::Problem::kMajorA>;
  using B = Slices<Shape::Problem::kMajorB>;
  int before = -1;  // stage of the slice before
  // One lane arrives for its warp after all lanes have seen the slice arrive; a late lane could otherwise
  // miss a whole round of the ring. Products keep the lanes converged; without products they may diverge.
  const auto let_go = [&] {
    if constexpr (kProducts == 0) __syncwarp();
    if (before >= 0) give_back<Shape>(barriers, before);
  };
  if (Shape::kPingPong) turns.begin();
  look_ahead();
  for (int slice = 0; slice < slices; ++slice) {
    mbarrier_wait(barriers.full + ring.stage, ring.phase);
    if constexpr (Shape::kCopies) fence_proxy_async();  // wgmma reads what cp.async wrote
    if constexpr (kProducts > 0) {
      const unsigned char* stage = shared + ring.stage * Shape::kStageBytes;
      const uint64_t a = A::at(stage + first * kPanel), b = B::at(stage + Shape::kBytesA);
#pragma unroll
      for (int p = 0; p < kProducts; ++p) warpgroup_fence(acc[p]);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kDepth / kSumOfProduct; ++k)
#pragma unroll
        for (int p = 0; p < kProducts; ++p)
          warpgroup_multiply<typename Shape::Format, Shape::kN, A::kTransposed, B::kTransposed>(
              acc[p], a + (p * kPanel + k * A::kStep) / 16, b + k * B::kStep / 16, true);
      warpgroup_commit();
#pragma unroll
      for (int p = 0; p < kProducts; ++p) warpgroup_fence(acc[p]);
      warpgroup_wait<1>();  // the slice before has been multiplied
    }
    let_go();
    before = ring.stage;
    ring.next();
  }
  if (Shape::kPingPong) turns.hand_over();
  if constexpr (kProducts > 0) {
    warpgroup_wait<0>();
#pragma unroll
    for (int p = 0; p < kProducts; ++p) warpgroup_fence(acc[p]);
  }
  let_go();
}

// Lets the slices of a tile without rows pass.
template <class Shape>
__device__ void pass_slices(int slices, const Barriers& barriers, const Turns& turns,
                            Ring<Shape::kStages>& ring) {
  if (Shape::kPingPong) turns.begin();
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    mbarrier_wait(barriers.full + ring.stage, ring.phase);
    __syncwarp();  // all lanes have seen it
    give_back<Shape>(barriers, ring.stage);
    ring.next();
  }
  if (Shape::kPingPong) turns.hand_over();
}

template <class Shape, class Schedule>
__device__ void consume(const typename Shape::Problem& problem, const Schedule& schedule,
                        unsigned char* shared, const Barriers& barriers) {
  constexpr int kProducts = Shape::kProducts;
  const int consumer = warp_uniform(int(threadIdx.x) / kGroup - 1);
  const int warp = warp_uniform(int(threadIdx.x) % kGroup / kWarp);
  const int first = Shape::kPingPong ? 0 : consumer;
  unsigned char* staging = shared + Shape::kStages * Shape::kStageBytes +
                           (consumer * kGroupWarps + warp) * Shape::kStagingBytes;
  Ring<Shape::kStages> ring;
  Work work, next;
  int32_t item = int32_t(blockIdx.x);
  bool more = get_work<Shape>(schedule, item, next);
  for (int turn = 0; more; ++turn) {
    work = next;
    item += int32_t(gridDim.x);
    more = get_work<Shape>(schedule, item, next);
    const int slices = slices_of(work);
    if (Shape::kPingPong && turn % kConsumers != consumer) {
      ring.skip(slices);
      continue;
    }
    const Turns turns{consumer, turn == 0, !more};
    constexpr int kStrips = Shape::kN / kStripColumns;  // of a product
    const auto place_at = [&](int strip) {
      return place_of(problem, work, (first + strip / kStrips) * kRowsOfProduct + warp * kStripRows,
                      strip % kStrips * kStripColumns);
    };
    const auto look_ahead = [&] {
#pragma unroll
      for (int strip = 0; strip < kProducts * kStrips; ++strip)
        problem.epilogue.look_ahead(place_at(strip));
    };
    float acc[kProducts][Shape::kN / 2];
#pragma unroll
    for (int p = 0; p < kProducts; ++p)
#pragma unroll
      for (int i = 0; i < Shape::kN / 2; ++i) acc[p][i] = 0.0f;
    // At the last rows of a tile whole products may have no rows, and a tile that keeps the other block
    // of a pair company has none.
    const int64_t rows = work.row_end - work.row - first * kRowsOfProduct;
    if (rows > (kProducts - 1) * kRowsOfProduct) {
      multiply_slices<kProducts, Shape>(acc, first, slices, shared, barriers, turns, ring,
                                        look_ahead);
    } else if (Shape::kBlocks == 1 || rows > 0) {
      multiply_slices<kProducts - 1, Shape>(acc, first, slices, shared, barriers, turns, ring,
                                            look_ahead);
    } else {
      pass_slices<Shape>(slices, barriers, turns, ring);
    }
#pragma unroll
    for (int strip = 0; strip < kProducts * kStrips; ++strip) {
      const Place place = place_at(strip);
      auto& sums = reinterpret_cast<Sums&>(acc[strip / kStrips][strip % kStrips * kStripSums]);
      if (place.rows > 0 && place.columns > 0)
        problem.epilogue.template strip<true>(sums, place, staging);
    }
  }
}

// ---- launch --------------------------------------------------------------------------------------------

template <class Shape>
__global__ void __launch_bounds__(kThreads, 1)
    warp_specialized_kernel(const __grid_constant__ Params<typename Shape::Problem> params) {
  using Schedule = std::remove_cvref_t<decltype(params.problem.schedule)>;
  FOMOE_DYNAMIC_SHARED(shared);
  FOMOE_SHARED(uint64_t, mbarriers, [2][Shape::kStages]);
  FOMOE_SHARED(typename Schedule::Shared, schedule_memory, [1]);
  const Barriers barriers{mbarriers[0], mbarriers[1]};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      mbarrier_init(barriers.full + i, Shape::kFullArrivals);
      mbarrier_init(barriers.empty + i, Shape::kEmptyArrivals);
    }
    mbarrier_init_fence();
    prefetch_tensor_map(&params.a);
    prefetch_tensor_map(&params.b);
  }
  // Both blocks of a pair have initialised their mbarriers before one reaches the other's.
  if constexpr (Shape::kBlocks > 1) cluster_arrive();
  Schedule schedule = params.problem.schedule;
  schedule.prepare(schedule_memory[0]);
  if constexpr (Shape::kBlocks > 1) cluster_wait();
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (Shape::kCopies || threadIdx.x == 0) produce<Shape>(params, schedule, shared, barriers);
  } else {
    registers_raise<kConsumerRegisters>();
    consume<Shape>(params.problem, schedule, shared, barriers);
  }
  if constexpr (Shape::kBlocks > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

// Lines of an operand, as boxes of 64 elements by `box` lines, one box deep in a third dimension of
// `depth` such matrices. Lines are whole 16-byte chunks without gaps (experts.cu), boxes begin at
// multiples of 64 elements, so that tensor maps and loads are never refused.
inline cudaError_t map_lines(TensorMap* map, DType dtype, const Operand& operand, int64_t width,
                             int64_t depth, int box) {
  const int64_t sizes[3] = {width, operand.lines, depth};
  const int64_t strides[2] = {operand.stride * 2, operand.lines * operand.stride * 2};
  const int boxes[3] = {64, box, 1};
  return make_tensor_map(map, dtype, operand.data, sizes, strides, boxes);
}

template <class Shape>
cudaError_t launch(const typename Shape::Problem& problem, cudaStream_t stream) {
  using Problem = typename Shape::Problem;
  constexpr DType kType = std::is_same_v<typename Shape::Format, Bf16x2> ? DType::bf16 : DType::f16;
  Params<Problem> params;
  params.problem = problem;
  const int64_t deep = Problem::kSumsRows ? 1 : problem.schedule.residents;
  if (const cudaError_t error = map_lines(&params.a, kType, problem.a, problem.a.stride, 1,
                                          Problem::kSumsRows ? kDepth : Shape::kM))
    return error;
  if (const cudaError_t error =
          map_lines(&params.b, kType, problem.b, problem.b.stride, deep, Shape::kBoxB))
    return error;
  static PersistentGrid grid;
  const auto kernel = warp_specialized_kernel<Shape>;
  unsigned blocks = Shape::kBlocks;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  if constexpr (Shape::kBlocks > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {Shape::kBlocks, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (const cudaError_t error = grid.size(kernel, config, Shape::kBlocks, blocks)) return error;
  } else {
    if (const cudaError_t error = grid.size(kernel, kThreads, Shape::kSharedBytes, blocks))
      return error;
  }
  config.gridDim = dim3(blocks);
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fomoe::cuda::warp_specialized

namespace fomoe::cuda {

template <class Problem>
cudaError_t run_warp_specialized(const Problem& problem, const Tile& tile, cudaStream_t stream) {
  namespace ws = warp_specialized;
  // Empty tensors cannot be mapped; multistage handles them.
  if (problem.a.lines == 0 || problem.b.lines == 0 || problem.schedule.residents == 0)
    return run_multistage(problem, kMultistage64, stream);
  if (tile.kernel == Kernel::ping_pong)
    return ws::launch<ws::Shape<Problem, kPingPong128.columns, true>>(problem, stream);
  if (tile.kernel == Kernel::cooperative)
    return ws::launch<ws::Shape<Problem, kCooperative256.columns, false>>(problem, stream);
  if constexpr (!Problem::kSumsRows)
    if (tile.kernel == Kernel::paired)
      return ws::launch<ws::PairShape<Problem, kPaired128.columns>>(problem, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda
