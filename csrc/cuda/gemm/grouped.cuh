// Descriptions of grouped GEMMs, for both kinds of kernel (multistage.cuh, warp_specialized.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../kernels.h"
#include "epilogue.cuh"
#include "experts_choice.h"
#include "scheduler.cuh"

namespace fomoe::cuda {

// Which dimension of an operand is contiguous: that of the sum, or the other one.
enum class Major { sum, line };

// A matrix in global memory: lines `stride` elements apart; line i is read from index[i] if there is
// an index.
struct Operand {
  const void* data;
  const int32_t* index;
  int64_t lines, stride;
};

// C[row] = A[row] . B[resident], for the rows of every resident. B has `b.lines` lines for each.
template <class Epilogue_, Major kMajorB_, bool kGather_>
struct RowsProblem {
  using Epilogue = Epilogue_;
  static constexpr Major kMajorA = Major::sum, kMajorB = kMajorB_;
  static constexpr bool kGather = kGather_, kSumsRows = false;
  Operand a, b;
  RowSchedule schedule;
  Epilogue epilogue;
};

// C[resident] = sum over the resident's rows of A[row]^T B[row].
template <class Epilogue_>
struct WeightsProblem {
  using Epilogue = Epilogue_;
  static constexpr Major kMajorA = Major::line, kMajorB = Major::line;
  static constexpr bool kGather = false, kSumsRows = true;
  Operand a, b;
  WeightSchedule schedule;
  Epilogue epilogue;
};

// Columns of the epilogue's result in a tile of `columns` columns of sums.
template <class Epilogue>
__host__ __device__ constexpr int result_columns(int columns) {
  return Epilogue::kInterleaved ? columns / 2 : columns;
}

// The strip of 16 x 64 sums that starts at (row, column of sums) of the tile.
template <class Problem>
__device__ inline Place place_of(const Problem& problem, const Work& work, int row, int column) {
  Place place;
  const int64_t first = work.row + row;
  place.resident = work.resident;
  place.row = first;
  if constexpr (Problem::kSumsRows) place.row += work.resident * problem.schedule.lines;
  place.rows = int(max(min(work.row_end - first, int64_t(kStripRows)), int64_t(0)));
  // Without rows the total stays as it is: adding 0 would turn -0 into 0.
  if (Problem::Epilogue::kAdds && work.sum_begin == work.sum_end) place.rows = 0;
  constexpr int kColumns = result_columns<typename Problem::Epilogue>(kStripColumns);
  place.column = work.column + result_columns<typename Problem::Epilogue>(column);
  place.columns =
      int(max(min(problem.schedule.columns - place.column, int64_t(kColumns)), int64_t(0)));
  return place;
}

// The line of A that line `line` of a tile of rows holds, -1 for none.
template <class Problem>
__device__ inline int32_t line_of_a(const Problem& problem, const Work& work, int line) {
  const int64_t row = work.row + line;
  if (row >= work.row_end) return -1;
  return Problem::kGather ? problem.a.index[row] : int32_t(row);
}

// The line of B (of its resident) that line `line` of a tile of sums holds, -1 for none: gate and up
// alternate by 32 lines if the epilogue needs both in one strip.
template <class Problem>
__device__ inline int32_t line_of_b(const Problem& problem, const Work& work, int line) {
  const int64_t columns = problem.schedule.columns;
  if constexpr (Problem::Epilogue::kInterleaved) {
    const int within = line % kStripColumns, half = kStripColumns / 2;
    const int64_t column = work.column + line / kStripColumns * half + within % half;
    return column < columns ? int32_t(column + (within >= half ? columns : 0)) : -1;
  } else {
    return work.column + line < columns ? work.column + line : -1;
  }
}

// For every architecture and format; experts_*_sm80.cu, experts_f32.cu.
template <class Problem>
cudaError_t run_multistage(const Problem& problem, const Tile& tile, cudaStream_t stream);
// sm_90a only; experts_*_sm90.cu.
template <class Problem>
cudaError_t run_warp_specialized(const Problem& problem, const Tile& tile, cudaStream_t stream);

// Every problem of a format, for explicit instantiations: X(problem).
#define FOMOE_PROBLEMS_OF_ACTIVATION(activation, X, Format)                  \
  X(RowsProblem<Activate<Format, Activation::activation>, Major::sum, true>) \
  X(RowsProblem<ActivateBackward<Format, Activation::activation>, Major::line, true>)
#define FOMOE_FOR_PROBLEMS(X, Format)                            \
  FOMOE_FOR_ACTIVATIONS(FOMOE_PROBLEMS_OF_ACTIVATION, X, Format) \
  X(RowsProblem<StoreRows<Format>, Major::sum, false>)           \
  X(RowsProblem<StoreRows<Format>, Major::line, false>)          \
  X(WeightsProblem<StoreRows<Format>>)                           \
  X(WeightsProblem<AddRows<Format>>)

}  // namespace fomoe::cuda
