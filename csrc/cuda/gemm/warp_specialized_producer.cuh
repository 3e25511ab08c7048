// The producer warpgroup of a grouped GEMM on Hopper (warp_specialized.cuh). It waits only for free
// stages: TMA loads, and the cp.async copies of each thread, arrive at the mbarrier of their stage by
// themselves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../arch/async_copy.cuh"
#include "../arch/barrier.cuh"
#include "../arch/cluster.cuh"
#include "../arch/tensor_map.cuh"
#include "warp_specialized_shape.cuh"

namespace fomoe::cuda::warp_specialized {

// A free stage, and the mbarrier that waits for its slices.
template <class Shape>
struct Stage {
  unsigned char* a;
  uint64_t* full;
  __device__ unsigned char* b() const { return a + Shape::kBytesA; }
};

// Loads the boxes of B of a GEMM over rows: of a pair that shares B, a half of them to both blocks. One
// thread.
template <class Shape>
__device__ void load_b(const Params<typename Shape::Problem>& params, const Work& work, int64_t sum,
                       const Stage<Shape>& stage) {
  using Problem = typename Shape::Problem;
  constexpr bool kLines = Problem::kMajorB == Major::line;
  constexpr int kBoxLines = kLines ? 64 : Shape::kBoxB;  // of C's columns
  constexpr int kBoxes = Shape::kN / kBoxLines, kBytes = kBoxLines * kRowBytes;
  const auto load_box = [&](int i, const auto& load) {
    if constexpr (kLines) {
      load(stage.b() + i * kBytes, work.column + i * kBoxLines, int(sum));
    } else if constexpr (Shape::Epilogue::kInterleaved) {
      const int64_t line =
          work.column + i / 2 * kBoxLines + i % 2 * params.problem.schedule.columns;
      load(stage.b() + i * kBytes, int(sum), int(line));
    } else {
      load(stage.b() + i * kBytes, int(sum), work.column + i * kBoxLines);
    }
  };
  if constexpr (Shape::kBlocks > 1) {
    constexpr int kOwn = kBoxes / Shape::kBlocks;
    static_assert(kOwn * Shape::kBlocks == kBoxes);
    if (work.shares) {
      const int first = int(cluster_rank()) * kOwn;
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        load_box(first + i, [&](unsigned char* to, int c0, int c1) {
          tensor_load_to_blocks(to, &params.b, stage.full, c0, c1, work.resident,
                                (1u << Shape::kBlocks) - 1);
        });
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kBoxes; ++i)
    load_box(i, [&](unsigned char* to, int c0, int c1) {
      tensor_load(to, &params.b, stage.full, c0, c1, work.resident);
    });
}

// Loaders fill the stages of a tile: begin(params, work), then fill(params, work, sum, stage) for every
// slice (k-block). Called by all threads of the producer if it copies, else by its leader.

// A GEMM over consecutive rows.
template <class Shape>
class OrderedRows {
 public:
  using P = Params<typename Shape::Problem>;
  __device__ void begin(const P&, const Work&) {}
  __device__ void fill(const P& params, const Work& work, int64_t sum, const Stage<Shape>& stage) {
    mbarrier_arrive_expect(stage.full, Shape::kStageBytes);
    tensor_load(stage.a, &params.a, stage.full, int(sum), int(work.row), 0);
    load_b(params, work, sum, stage);
  }
};

// A GEMM over gathered rows.
template <class Shape>
class GatheredRows {
 public:
  using P = Params<typename Shape::Problem>;
  __device__ void begin(const P& params, const Work& work) {
    rows_.begin(params.problem.a.data, params.problem.a.stride,
                [&](int line) { return line_of_a(params.problem, work, line); });
  }
  __device__ void fill(const P& params, const Work& work, int64_t sum, const Stage<Shape>& stage) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(stage.full, Shape::kBytesB);
      load_b(params, work, sum, stage);
    }
    rows_.copy(stage.a, sum, work.sum_end);
    async_copy_arrive(stage.full);
  }

 private:
  LineSlice<typename Shape::Format, Shape::kM, kGroup> rows_;
};

// A GEMM that sums over rows. An operand with consecutive rows is loaded by TMA, except for a last slice
// that is not whole: the rows after it belong to another resident.
template <class Shape>
class SummedRows {
 public:
  using P = Params<typename Shape::Problem>;
  __device__ void begin(const P& params, const Work& work) {
    const Operand &a = params.problem.a, &b = params.problem.b;
    const auto& schedule = params.problem.schedule;
    a_.begin(a.data, a.stride, work.row, schedule.lines, a.index, work.sum_begin, work.sum_end);
    b_.begin(b.data, b.stride, work.column, schedule.columns, b.index, work.sum_begin,
             work.sum_end);
  }
  __device__ void fill(const P& params, const Work& work, int64_t sum, const Stage<Shape>& stage) {
    const bool whole = sum + kDepth <= work.sum_end;
    const int32_t *index_a = params.problem.a.index, *index_b = params.problem.b.index;
    const bool maps_a = whole && index_a == nullptr, maps_b = whole && index_b == nullptr;
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(stage.full,
                             (maps_a ? Shape::kBytesA : 0) + (maps_b ? Shape::kBytesB : 0));
      if (maps_a) load<Shape::kM>(stage.a, params.a, work.row, sum, stage.full);
      if (maps_b) load<Shape::kN>(stage.b(), params.b, work.column, sum, stage.full);
    }
    if (!maps_a) a_.copy(stage.a, index_a, sum, work.sum_end);
    if (!maps_b) b_.copy(stage.b(), index_b, sum, work.sum_end);
    async_copy_arrive(stage.full);
  }

 private:
  template <int kColumns>
  using Steps = StepSlice<typename Shape::Format, kDepth, kColumns, 64, kGroup, true>;
  template <int kColumns>
  __device__ static void load(unsigned char* slice, const TensorMap& map, int64_t column,
                              int64_t sum, uint64_t* full) {
#pragma unroll
    for (int i = 0; i < kColumns / 64; ++i)
      tensor_load(slice + i * kPanel, &map, full, int(column) + i * 64, int(sum), 0);
  }
  Steps<Shape::kM> a_;
  Steps<Shape::kN> b_;
};

template <class Shape, class Schedule>
__device__ void produce(const Params<typename Shape::Problem>& params, const Schedule& schedule,
                        unsigned char* shared, const Barriers& barriers) {
  using Problem = typename Shape::Problem;
  using Loader = std::conditional_t<
      Problem::kSumsRows, SummedRows<Shape>,
      std::conditional_t<Problem::kGather, GatheredRows<Shape>, OrderedRows<Shape>>>;
  Ring<Shape::kStages> ring;
  Work work;
  for (int32_t item = int32_t(blockIdx.x); get_work<Shape>(schedule, item, work);
       item += int32_t(gridDim.x)) {
    Loader loader;
    loader.begin(params, work);
    const auto fill = [&](int64_t sum) {
      mbarrier_wait(barriers.empty + ring.stage, ring.phase ^ 1);
      loader.fill(
          params, work, sum,
          Stage<Shape>{shared + ring.stage * Shape::kStageBytes, barriers.full + ring.stage});
      ring.next();
    };
    if constexpr (Shape::kBlocks == 1) {
      for (int64_t sum = work.sum_begin; sum < work.sum_end; sum += kDepth) fill(sum);
    } else {  // there are two ways to load: not many times over
#pragma unroll 1
      for (int64_t sum = work.sum_begin; sum < work.sum_end; sum += kDepth) fill(sum);
    }
  }
}

}  // namespace fomoe::cuda::warp_specialized
