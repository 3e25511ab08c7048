// Grouped GEMMs on Hopper: a warpgroup that only loads, two that only multiply (sm_90a).
//
// The producer fills a ring of stages, each a slice of both operands 64 elements of the sum deep:
// by TMA, or, where rows are gathered, by cp.async into the same swizzled layout. The consumers
// multiply from shared memory with wgmma and finish tiles with the epilogues of epilogue.cuh. In
// ping-pong each consumer has every second tile to itself, so that one is in its epilogue while the
// other multiplies; cooperating, each has one half of the rows of every tile. Stages change hands by
// mbarriers: `full` when all of a slice has arrived, `empty` when it has been multiplied. Blocks are
// persistent, one to a multiprocessor.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "arch/async_copy.cuh"
#include "arch/barrier.cuh"
#include "arch/bulk_copy.cuh"
#include "arch/shared_memory.cuh"
#include "arch/tensor_map.cuh"
#include "arch/warpgroup.cuh"
#include "grid.cuh"
#include "grouped.cuh"
#include "line_slice.cuh"

namespace fomoe::cuda::warp_specialized {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kGroupWarps = kGroup / kWarp;
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kGroup;
constexpr int kDepth = 64, kRowBytes = kSliceBytes;  // of a slice: elements of the sum, 16-bit
constexpr int kPanel = 64 * kRowBytes;               // 64 lines of 128 bytes
constexpr int kGroupOf8 = 8 * kRowBytes;
constexpr int kChunkElements = 8;
constexpr int kRowsOfProduct = 64;  // of wgmma
constexpr int kSumOfProduct = 16;
// A multiprocessor has 65536 registers: 168 for each of 384 threads to begin with.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
constexpr int kSharedLimit = 227 << 10, kBarrierBytes = 4 << 10;

template <class Problem_, int kN_, bool kPingPong_>
struct Shape {
  using Problem = Problem_;
  using Epilogue = typename Problem::Epilogue;
  using Format = typename Epilogue::Format;
  static constexpr int kM = kTileRows, kN = kN_;
  static constexpr bool kPingPong = kPingPong_;
  // Products of 64 rows that a consumer makes of each slice.
  static constexpr int kProducts =
      kPingPong ? kM / kRowsOfProduct : kM / kRowsOfProduct / kConsumers;
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kStagingBytes = Epilogue::kWindows * Window<Format>::kBytes;  // of a warp
  static constexpr int kStagingTotal = kConsumers * kGroupWarps * kStagingBytes;
  static constexpr int kStages = (kSharedLimit - kBarrierBytes - kStagingTotal) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kStagingTotal;
  // Slices that are on their way by cp.async while the next one is asked for.
  static constexpr int kInFlight = kStages - 2;
  static_assert(kStages >= 3);
  // Every producer thread, and one more arrival for what comes by TMA.
  static constexpr bool kCopies = Problem::kSumsRows || Problem::kGather;
  static constexpr unsigned kFullArrivals = kCopies ? kGroup + 1 : 1;
  static constexpr unsigned kEmptyArrivals = (kPingPong ? 1 : kConsumers) * kGroupWarps;
  // Lines of B in a box.
  static constexpr int kBoxB = Problem::kMajorB == Major::line ? kDepth
                               : Epilogue::kInterleaved        ? kStripColumns / 2
                                                               : kN;
};

template <class Problem>
struct Params {
  TensorMap a, b;
  Problem problem;
};

struct Barriers {
  uint64_t *full, *empty;
};

// A place in the ring, and how often it has been round.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned phase = 0;
  __device__ void next() {
    stage = stage == kStages - 1 ? 0 : stage + 1;
    phase ^= stage == 0 ? 1u : 0u;
  }
  __device__ void skip(int slices) {
    phase ^= unsigned(stage + slices) / kStages & 1u;
    stage = (stage + slices) % kStages;
  }
};

__device__ inline int slices_of(const Work& work) {
  return int((work.sum_end - work.sum_begin + kDepth - 1) / kDepth);
}

// ---- the producer ------------------------------------------------------------------------------------

// kDepth rows of an operand whose rows are steps of the sum, kColumns of each: panels of 64 columns.
template <int kColumns>
__device__ void copy_steps(unsigned char* slice, const Operand& operand, int64_t column,
                           int64_t columns, int64_t sum, int64_t sum_end) {
  constexpr int kChunks = kColumns / kChunkElements, kStep = kGroup / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  const int64_t element = column + chunk * kChunkElements;
  unsigned char* panel = slice + chunk / 8 * kPanel;
  const auto* data = static_cast<const unsigned char*>(operand.data);
#pragma unroll 4
  for (int line = first; line < kDepth; line += kStep) {
    const bool exists = sum + line < sum_end && element < columns;
    int64_t from = 0;
    if (exists) {
      const int64_t row = operand.index == nullptr ? sum + line : operand.index[sum + line];
      from = (row * operand.stride + element) * 2;
    }
    async_copy_16(chunk_at(panel, line, kRowBytes, chunk % 8), data + from, exists);
  }
}

// The boxes of B of a GEMM over rows. One thread.
template <class Shape>
__device__ void load_b(const Params<typename Shape::Problem>& params, const Work& work,
                       unsigned char* slice, int64_t sum, uint64_t* full) {
  using Problem = typename Shape::Problem;
  if constexpr (Problem::kMajorB == Major::line) {
#pragma unroll
    for (int i = 0; i < Shape::kN / 64; ++i)
      tensor_load(slice + i * kPanel, &params.b, full, work.column + i * 64, int(sum),
                  work.resident);
  } else if constexpr (Shape::Epilogue::kInterleaved) {
    constexpr int kHalf = kStripColumns / 2;
#pragma unroll
    for (int i = 0; i < Shape::kN / kHalf; ++i) {
      const int64_t line = work.column + i / 2 * kHalf + i % 2 * params.problem.schedule.columns;
      tensor_load(slice + i * kHalf * kRowBytes, &params.b, full, int(sum), int(line),
                  work.resident);
    }
  } else {
    tensor_load(slice, &params.b, full, int(sum), work.column, work.resident);
  }
}

// One operand of a GEMM that sums over rows: by TMA where its rows lie in order and the slice is
// whole, else by all threads.
__device__ inline bool is_loaded(const Operand& operand, int64_t sum, int64_t sum_end) {
  return operand.index == nullptr && sum + kDepth <= sum_end;
}
template <int kColumns>
__device__ void load_steps(unsigned char* slice, const TensorMap& map, int64_t column, int64_t sum,
                           uint64_t* full) {
#pragma unroll
  for (int i = 0; i < kColumns / 64; ++i)
    tensor_load(slice + i * kPanel, &map, full, int(column) + i * 64, int(sum), 0);
}

// Fills one stage; all threads of the producer, or its first where nothing is copied.
template <class Shape, class Rows>
__device__ void fill_stage(const Params<typename Shape::Problem>& params, const Work& work,
                           const Rows& rows, int64_t sum, unsigned char* stage, uint64_t* full) {
  const auto& problem = params.problem;
  unsigned char* slice_b = stage + Shape::kBytesA;
  const bool first = threadIdx.x == 0;
  if constexpr (Shape::Problem::kSumsRows) {
    const int64_t lines = problem.schedule.lines, columns = problem.schedule.columns;
    const bool load_a = is_loaded(problem.a, sum, work.sum_end);
    const bool load_b = is_loaded(problem.b, sum, work.sum_end);
    if (first) {
      mbarrier_arrive_expect(full, (load_a ? Shape::kBytesA : 0) + (load_b ? Shape::kBytesB : 0));
      if (load_a) load_steps<Shape::kM>(stage, params.a, work.row, sum, full);
      if (load_b) load_steps<Shape::kN>(slice_b, params.b, work.column, sum, full);
    }
    if (!load_a) copy_steps<Shape::kM>(stage, problem.a, work.row, lines, sum, work.sum_end);
    if (!load_b) copy_steps<Shape::kN>(slice_b, problem.b, work.column, columns, sum, work.sum_end);
  } else if constexpr (Shape::Problem::kGather) {
    if (first) {
      mbarrier_arrive_expect(full, Shape::kBytesB);
      load_b<Shape>(params, work, slice_b, sum, full);
    }
    rows.copy(stage, problem.a.data, problem.a.stride, sum, work.sum_end);
  } else {
    mbarrier_arrive_expect(full, Shape::kStageBytes);
    tensor_load(stage, &params.a, full, int(sum), int(work.row), 0);
    load_b<Shape>(params, work, slice_b, sum, full);
  }
}

struct NoRows {};

template <class Shape, class Schedule>
__device__ void produce(const Params<typename Shape::Problem>& params, const Schedule& schedule,
                        unsigned char* shared, const Barriers& barriers) {
  using Problem = typename Shape::Problem;
  // Of A, where they are gathered.
  using Rows = std::conditional_t<Problem::kGather,
                                  LineSlice<typename Shape::Format, Shape::kM, kGroup>, NoRows>;
  constexpr int kColumns = result_columns<typename Shape::Epilogue>(Shape::kN);
  Ring<Shape::kStages> ring, arrived;
  int in_flight = 0;
  // The oldest slice on its way by cp.async has arrived: to the async proxy, which multiplies, too.
  const auto announce = [&] {
    fence_proxy_async();
    mbarrier_arrive(barriers.full + arrived.stage);
    arrived.next();
    --in_flight;
  };
  Work work;
  for (int64_t item = blockIdx.x; schedule.get(item, kColumns, work); item += gridDim.x) {
    Rows rows;
    if constexpr (Problem::kGather)
      rows.begin([&](int line) { return line_of_a(params.problem, work, line); });
    for (int64_t sum = work.sum_begin; sum < work.sum_end; sum += kDepth) {
      mbarrier_wait(barriers.empty + ring.stage, ring.phase ^ 1);
      fill_stage<Shape>(params, work, rows, sum, shared + ring.stage * Shape::kStageBytes,
                        barriers.full + ring.stage);
      ring.next();
      if constexpr (Shape::kCopies) {
        async_copy_commit();
        if (++in_flight > Shape::kInFlight) {
          async_copy_wait<Shape::kInFlight>();
          announce();
        }
      }
    }
  }
  if constexpr (Shape::kCopies) {
    async_copy_wait<0>();
    while (in_flight > 0) announce();
  }
}

// ---- the consumers -----------------------------------------------------------------------------------

// What a slice looks like to wgmma.
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

// In ping-pong the consumers' slices follow each other, and a consumer may wait for its first one only
// when the other has seen its last one arrive: a barrier's parity tells one round of the ring from
// the next, not from the one after.
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

// Multiplies all slices of a tile; acc[p] are the sums of rows 64 * (first + p) and on.
template <int kProducts, class Shape>
__device__ void multiply_slices(float (&acc)[Shape::kProducts][Shape::kN / 2], int first,
                                int slices, unsigned char* shared, const Barriers& barriers,
                                const Turns& turns, Ring<Shape::kStages>& ring) {
  using A = Slices<Shape::Problem::kMajorA>;
  using B = Slices<Shape::Problem::kMajorB>;
  const bool speaks = threadIdx.x % kWarp == 0;
  int before = -1;  // stage of the slice before
  // A lane speaks for its warp: all of them have seen the slice arrive, or a late one could miss a
  // whole round of the ring. Products keep the lanes of a warp together; without any they may part.
  const auto let_go = [&] {
    if constexpr (kProducts == 0) __syncwarp();
    if (before >= 0 && speaks) mbarrier_arrive(barriers.empty + before);
  };
  if (Shape::kPingPong) turns.begin();
  for (int slice = 0; slice < slices; ++slice) {
    mbarrier_wait(barriers.full + ring.stage, ring.phase);
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

template <class Shape, class Schedule>
__device__ void consume(const typename Shape::Problem& problem, const Schedule& schedule,
                        unsigned char* shared, const Barriers& barriers) {
  constexpr int kColumns = result_columns<typename Shape::Epilogue>(Shape::kN);
  constexpr int kProducts = Shape::kProducts;
  const int consumer = threadIdx.x / kGroup - 1;
  const int warp = threadIdx.x % kGroup / kWarp;
  const int first = Shape::kPingPong ? 0 : consumer;
  unsigned char* staging = shared + Shape::kStages * Shape::kStageBytes +
                           (consumer * kGroupWarps + warp) * Shape::kStagingBytes;
  Ring<Shape::kStages> ring;
  Work work, next;
  int64_t item = blockIdx.x;
  bool more = schedule.get(item, kColumns, next);
  for (int turn = 0; more; ++turn) {
    work = next;
    item += gridDim.x;
    more = schedule.get(item, kColumns, next);
    const int slices = slices_of(work);
    if (Shape::kPingPong && turn % kConsumers != consumer) {
      ring.skip(slices);
      continue;
    }
    const Turns turns{consumer, turn == 0, !more};
    float acc[kProducts][Shape::kN / 2];
#pragma unroll
    for (int p = 0; p < kProducts; ++p)
#pragma unroll
      for (int i = 0; i < Shape::kN / 2; ++i) acc[p][i] = 0.0f;
    // A tile's last rows may leave whole products without work.
    const int64_t rows = work.row_end - work.row - first * kRowsOfProduct;
    if (rows > (kProducts - 1) * kRowsOfProduct) {
      multiply_slices<kProducts, Shape>(acc, first, slices, shared, barriers, turns, ring);
    } else {
      multiply_slices<kProducts - 1, Shape>(acc, first, slices, shared, barriers, turns, ring);
    }
#pragma unroll
    for (int p = 0; p < kProducts; ++p)
#pragma unroll
      for (int strip = 0; strip < Shape::kN / kStripColumns; ++strip) {
        const Place place = place_of(
            problem, work, (first + p) * kRowsOfProduct + warp * kStripRows, strip * kStripColumns);
        if (place.rows > 0 && place.columns > 0)
          problem.epilogue.strip(reinterpret_cast<Sums&>(acc[p][strip * kStripSums]), place,
                                 staging);
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
  Schedule schedule = params.problem.schedule;
  schedule.prepare(schedule_memory[0]);
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (Shape::kCopies || threadIdx.x == 0) produce<Shape>(params, schedule, shared, barriers);
  } else {
    registers_raise<kConsumerRegisters>();
    consume<Shape>(params.problem, schedule, shared, barriers);
  }
}

// Lines of an operand, as boxes of 64 elements by `box` lines, one box deep in a third dimension of
// `depth` such matrices. Lines are whole 16-byte chunks without gaps (experts.cu), boxes begin at
// multiples of 64 elements: nothing that a tensor map or a load by it would be refused for.
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
  unsigned blocks = 0;
  if (const cudaError_t error = grid.size(kernel, kThreads, Shape::kSharedBytes, blocks))
    return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fomoe::cuda::warp_specialized

namespace fomoe::cuda {

template <class Problem>
cudaError_t run_warp_specialized(const Problem& problem, const Tile& tile, cudaStream_t stream) {
  namespace ws = warp_specialized;
  // Empty tensors cannot be mapped; there is nothing to be fast at.
  if (problem.a.lines == 0 || problem.b.lines == 0 || problem.schedule.residents == 0)
    return run_multistage(problem, kMultistage64, stream);
  if (tile.kernel == Kernel::ping_pong)
    return ws::launch<ws::Shape<Problem, kPingPong128.columns, true>>(problem, stream);
  if (tile.kernel == Kernel::cooperative)
    return ws::launch<ws::Shape<Problem, kCooperative256.columns, false>>(problem, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda
