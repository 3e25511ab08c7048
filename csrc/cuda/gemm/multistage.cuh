// Grouped GEMMs by cp.async, ldmatrix and mma.sync (sm_80 and all after it), and by fused
// multiply-adds for fp32.
//
// A block computes a tile of kTileRows x kN sums: it copies slices (k-blocks) of both operands,
// 128 bytes of the sum deep, into a ring of stages while its warps multiply the slice before. Lines
// of a slice are swizzled in chunks of 16 bytes, so that the 8 lines that ldmatrix reads at once lie
// in different banks. Blocks are persistent (scheduler.cuh); two fit on a multiprocessor with 16-bit
// formats, so that one multiplies while the other is in its epilogue.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/async_copy.cuh"
#include "../arch/matrix.cuh"
#include "../arch/shared_memory.cuh"
#include "../grid.cuh"
#include "grouped.cuh"
#include "slices.cuh"

namespace fomoe::cuda::multistage {

// fp32 products take more registers of a thread, so more threads share a tile.
template <class Format>
constexpr int kThreads = kIsF32<Format> ? 256 : 128;

// ---- products --------------------------------------------------------------------------------------

// Fragments of 16 x kDepth of A and of kDepth x 16 of B, from slices in either layout, and their
// products. The layout of sums is that of window.cuh.
template <class Format>
struct Products {
  static constexpr int kDepth = 16;
  using A = uint32_t[4];
  using B = uint32_t[4];

  template <Major kMajor, int kLineBytes>
  __device__ static void load_a(A& a, unsigned char* slice, int row, int k, int lane) {
    if constexpr (kMajor == Major::sum) {
      load_matrices(a, chunk_at(slice, row + lane % 16, kLineBytes, k / 8 + lane / 16));
    } else {
      load_matrices_transposed(
          a, chunk_at(slice, k + lane % 8 + lane / 16 * 8, kLineBytes, row / 8 + lane / 8 % 2));
    }
  }
  template <Major kMajor, int kLineBytes>
  __device__ static void load_b(B& b, unsigned char* slice, int column, int k, int lane) {
    if constexpr (kMajor == Major::sum) {
      load_matrices(
          b, chunk_at(slice, column + lane % 8 + lane / 16 * 8, kLineBytes, k / 8 + lane / 8 % 2));
    } else {
      load_matrices_transposed(b,
                               chunk_at(slice, k + lane % 16, kLineBytes, column / 8 + lane / 16));
    }
  }
  // sums[0..3] are of columns 0..7, sums[4..7] of columns 8..15.
  __device__ static void multiply(float* sums, const A& a, const B& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = sums[4 * half + i];
      multiply_add<Format>(c, a, b[2 * half], b[2 * half + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * half + i] = c[i];
    }
  }
};

// fp32: every lane computes its own sums, in the order of the sum.
template <>
struct Products<F32> {
  static constexpr int kDepth = 4;
  using A = float[2][kDepth];  // of rows l / 4 and l / 4 + 8
  using B = float[4][kDepth];  // of columns 2 (l % 4), the next, and both 8 further on

  template <Major kMajor, int kLineBytes>
  __device__ static void load(float (&values)[kDepth], unsigned char* slice, int line, int k) {
    if constexpr (kMajor == Major::sum) {
      const float4 four =
          *reinterpret_cast<const float4*>(chunk_at(slice, line, kLineBytes, k / 4));
      values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < kDepth; ++i)
        values[i] =
            reinterpret_cast<const float*>(chunk_at(slice, k + i, kLineBytes, line / 4))[line % 4];
    }
  }
  template <Major kMajor, int kLineBytes>
  __device__ static void load_a(A& a, unsigned char* slice, int row, int k, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) load<kMajor, kLineBytes>(a[h], slice, row + lane / 4 + 8 * h, k);
  }
  template <Major kMajor, int kLineBytes>
  __device__ static void load_b(B& b, unsigned char* slice, int column, int k, int lane) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      load<kMajor, kLineBytes>(b[c], slice, column + lane % 4 * 2 + c % 2 + c / 2 * 8, k);
  }
  __device__ static void multiply(float* sums, const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& sum = sums[c / 2 * 4 + 2 * h + c % 2];
          sum = fmaf(a[h][k], b[c][k], sum);
        }
  }
};

// ---- a block -----------------------------------------------------------------------------------------

template <class Problem_, int kN_, int kStages_>
struct Shape {
  using Problem = Problem_;
  using Epilogue = typename Problem::Epilogue;
  using Format = typename Epilogue::Format;
  static constexpr int kM = kTileRows, kN = kN_, kStages = kStages_;
  static constexpr int kWarps = kThreads<Format> / kWarp;
  // Blocks per multiprocessor that registers allow.
  static constexpr int kBlocks = kIsF32<Format> && kN == 128 ? 1 : 2;
  static constexpr int kWarpsN = kN / kStripColumns, kWarpsM = kWarps / kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kStrips = kWarpM / kStripRows;
  static constexpr int kDepth = kSliceBytes / kElementBytes<Format>;  // elements to a slice
  static constexpr int kBytesA = kM * kSliceBytes, kBytesB = kN * kSliceBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Unrolled steps of products: fp32 would run out of registers.
  static constexpr int kUnroll = kIsF32<Format> ? 1 : kDepth / Products<Format>::kDepth;
  // Lines of a slice in shared memory.
  __host__ __device__ static constexpr int line_bytes(Major major, int lines) {
    return major == Major::sum ? kSliceBytes : lines * kElementBytes<Format>;
  }
  static constexpr int kStagingBytes = Epilogue::kWindows * kWindowBytes<Format>;
  static_assert(kWarps * kStagingBytes <= kSharedBytes);
};

// Slices of an operand whose lines are steps of the sum.
template <class Shape, int kColumns, bool kIndexed>
using Steps = StepSlice<typename Shape::Format, Shape::kDepth, kColumns, kColumns,
                        kThreads<typename Shape::Format>, kIndexed>;
template <class Shape, int kLines>
using Lines = LineSlice<typename Shape::Format, kLines, kThreads<typename Shape::Format>>;

// Copies the slices of a tile's operands, for a GEMM over rows ...
template <class Shape, class Problem, bool = Problem::kSumsRows>
class Feeder {
 public:
  __device__ Feeder(const Problem& problem, const Work& work) : work_(work) {
    const Operand &a = problem.a, &b = problem.b;
    a_.begin(a.data, a.stride, [&](int line) { return line_of_a(problem, work, line); });
    const auto* data =
        element_at<typename Shape::Format>(b.data, work.resident * b.lines * b.stride);
    if constexpr (Problem::kMajorB == Major::sum) {
      b_.begin(data, b.stride, [&](int line) { return line_of_b(problem, work, line); });
    } else {
      b_.begin(data, b.stride, work.column, problem.schedule.columns, nullptr, 0, work.sum_end);
    }
  }
  __device__ void copy(unsigned char* stage, int64_t sum) {
    a_.copy(stage, sum, work_.sum_end);
    if constexpr (Problem::kMajorB == Major::sum) {
      b_.copy(stage + Shape::kBytesA, sum, work_.sum_end);
    } else {
      b_.copy(stage + Shape::kBytesA, nullptr, sum, work_.sum_end);
    }
  }

 private:
  const Work& work_;
  Lines<Shape, Shape::kM> a_;
  std::conditional_t<Problem::kMajorB == Major::sum, Lines<Shape, Shape::kN>,
                     Steps<Shape, Shape::kN, false>>
      b_;
};

// ... and for a GEMM that sums over rows.
template <class Shape, class Problem>
class Feeder<Shape, Problem, true> {
 public:
  __device__ Feeder(const Problem& problem, const Work& work) : problem_(problem), work_(work) {
    const Operand &a = problem.a, &b = problem.b;
    a_.begin(a.data, a.stride, work.row, problem.schedule.lines, a.index, work.sum_begin,
             work.sum_end);
    b_.begin(b.data, b.stride, work.column, problem.schedule.columns, b.index, work.sum_begin,
             work.sum_end);
  }
  __device__ void copy(unsigned char* stage, int64_t sum) {
    a_.copy(stage, problem_.a.index, sum, work_.sum_end);
    b_.copy(stage + Shape::kBytesA, problem_.b.index, sum, work_.sum_end);
  }

 private:
  const Problem& problem_;
  const Work& work_;
  Steps<Shape, Shape::kM, true> a_;
  Steps<Shape, Shape::kN, true> b_;
};

// Multiplies the warp's part of a stage.
template <class Shape>
__device__ void multiply_stage(Sums (&sums)[Shape::kStrips], unsigned char* stage) {
  using Problem = typename Shape::Problem;
  using P = Products<typename Shape::Format>;
  constexpr int kLineA = Shape::line_bytes(Problem::kMajorA, Shape::kM);
  constexpr int kLineB = Shape::line_bytes(Problem::kMajorB, Shape::kN);
  constexpr int kPairs = kStripColumns / 16;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp / Shape::kWarpsN * Shape::kWarpM;
  const int column = warp % Shape::kWarpsN * kStripColumns;
#pragma unroll Shape::kUnroll
  for (int k = 0; k < Shape::kDepth; k += P::kDepth) {
    typename P::B b[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      P::template load_b<Problem::kMajorB, kLineB>(b[j], stage + Shape::kBytesA, column + 16 * j, k,
                                                   lane);
#pragma unroll
    for (int i = 0; i < Shape::kStrips; ++i) {
      typename P::A a;
      P::template load_a<Problem::kMajorA, kLineA>(a, stage, row + i * kStripRows, k, lane);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) P::multiply(&sums[i][8 * j], a, b[j]);
    }
  }
}

template <class Shape>
__device__ void make_tile(const typename Shape::Problem& problem, const Work& work,
                          unsigned char* shared) {
  constexpr int kStages = Shape::kStages;
  Sums sums[Shape::kStrips] = {};
  {
    Feeder<Shape, typename Shape::Problem> feeder(problem, work);
    const int64_t begin = work.sum_begin, end = work.sum_end;
    int64_t ahead = begin;
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage, ahead += Shape::kDepth) {
      if (ahead < end) feeder.copy(shared + stage * Shape::kStageBytes, ahead);
      async_copy_commit();
    }
    int stage = 0;
    for (int64_t sum = begin; sum < end; sum += Shape::kDepth, ahead += Shape::kDepth) {
      async_copy_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived, and the one before has been multiplied
      const int filled = stage == 0 ? kStages - 1 : stage - 1;
      if (ahead < end) feeder.copy(shared + filled * Shape::kStageBytes, ahead);
      async_copy_commit();
      multiply_stage<Shape>(sums, shared + stage * Shape::kStageBytes);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    async_copy_wait<0>();
  }
  __syncthreads();  // the stages are reused as staging
  const int warp = threadIdx.x / kWarp;
  const int row = warp / Shape::kWarpsN * Shape::kWarpM;
#pragma unroll
  for (int i = 0; i < Shape::kStrips; ++i) {
    const Place place =
        place_of(problem, work, row + i * kStripRows, warp % Shape::kWarpsN * kStripColumns);
    if (place.rows > 0 && place.columns > 0)
      problem.epilogue.template strip<false>(sums[i], place, shared + warp * Shape::kStagingBytes);
  }
  __syncthreads();
}

template <class Shape>
__global__ void __launch_bounds__(kThreads<typename Shape::Format>, Shape::kBlocks)
    multistage_kernel(const __grid_constant__ typename Shape::Problem problem) {
  FOMOE_DYNAMIC_SHARED(shared);
  using Schedule = decltype(problem.schedule);
  FOMOE_SHARED(typename std::remove_const_t<Schedule>::Shared, schedule_memory, [1]);
  std::remove_const_t<Schedule> schedule = problem.schedule;
  schedule.prepare(schedule_memory[0]);
  constexpr int kColumns = result_columns<typename Shape::Epilogue>(Shape::kN);
  Work work;
  for (int32_t item = int32_t(blockIdx.x); schedule.get(item, kColumns, work);
       item += int32_t(gridDim.x))
    make_tile<Shape>(problem, work, shared);
}

template <class Shape>
cudaError_t launch(const typename Shape::Problem& problem, cudaStream_t stream) {
  static PersistentGrid grid;
  const auto kernel = multistage_kernel<Shape>;
  unsigned blocks = 0;
  constexpr int kSize = kThreads<typename Shape::Format>;
  if (const cudaError_t error = grid.size(kernel, kSize, Shape::kSharedBytes, blocks)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kSize);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

}  // namespace fomoe::cuda::multistage

namespace fomoe::cuda {

template <class Problem>
cudaError_t run_multistage(const Problem& problem, const Tile& tile, cudaStream_t stream) {
  if (tile.columns == 128)
    return multistage::launch<multistage::Shape<Problem, 128, 2>>(problem, stream);
  if (tile.columns == 64)
    return multistage::launch<multistage::Shape<Problem, 64, 3>>(problem, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fomoe::cuda
