// The static tile schedule of persistent blocks. A block of a grouped GEMM takes every gridDim.x-th
// item of a list that every block can compute from the results of compact in device memory. There are
// no counters to reset, and the order is always the same.
//
// Items are ordered in bands of kBand row tiles. Within a band the row tiles of one column tile come
// first, so that blocks that run at the same time share kBand row tiles of A and blocks / kBand column
// tiles of B. Both then stay in L2, at any size.
//
// The two blocks of a pair have neighbouring items, which are neighbouring row tiles of one column tile.
// These are mostly rows of one resident and multiply by the same B. Where they are not, the blocks differ
// in B and in nothing else, so no block is idle but at the end of the list.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../kernels.h"
#include "../formats.cuh"

namespace fomoe::cuda {

constexpr int kBand = 8;

struct TilePosition {
  int32_t row, column;  // tiles
};

// A schedule is computed in 32 bits: 2^31 tiles would be terabytes of results. Unsigned division takes
// fewer instructions.
__device__ inline int32_t divided(int32_t number, int32_t by) {
  return int32_t(uint32_t(number) / uint32_t(by));
}
template <int kHeight = kBand>
__device__ inline TilePosition in_bands(int32_t item, int32_t row_tiles, int32_t column_tiles) {
  const int32_t band = divided(item, kHeight * column_tiles);
  const int32_t height = min(kHeight, row_tiles - band * kHeight);
  const int32_t within = item - band * kHeight * column_tiles;
  const int32_t column = divided(within, height);
  return {band * kHeight + within - column * height, column};
}
__device__ inline int32_t tiles_of(int64_t size, int32_t tile) {
  return divided(int32_t(size) + tile - 1, tile);
}

// A tile of C: rows [row, row_end) of operand A, columns from `column` on, and the range of its sum.
struct Work {
  int32_t resident;
  int32_t row, row_end;
  int32_t column;
  int32_t sum_begin, sum_end;  // along the sum
  bool shares;                 // the other block of a pair multiplies by the same B
};

// ---- GEMMs whose sums run over columns: the rows of a group are rows of C ------------------------

class RowSchedule {
 public:
  struct Shared {
    int32_t tiles;  // in use
  };

  // Called by all threads of the block.
  __device__ void prepare(Shared& shared) {
    if (threadIdx.x == 0) shared.tiles = 0;
    __syncthreads();
    int count = 0;
    for (int r = threadIdx.x; r < residents; r += blockDim.x)
      count += (offsets[r + 1] - offsets[r] + kTileRows - 1) / kTileRows;
    if (count != 0) atomicAdd(&shared.tiles, count);
    __syncthreads();
    shared_ = &shared;
  }
  // False past the last item.
  __device__ bool get(int32_t item, int tile_columns, Work& work) const {
    const int32_t column_tiles = tiles_of(columns, tile_columns);
    const int32_t row_tiles = shared_->tiles;  // read again: a register would cost more
    if (item >= row_tiles * column_tiles) return false;
    const TilePosition at = in_bands(item, row_tiles, column_tiles);
    const int2 tile = reinterpret_cast<const int2*>(tiles)[at.row];
    work.resident = tile.x;
    work.row = tile.y;
    work.row_end = min(tile.y + kTileRows, offsets[tile.x + 1]);
    work.column = at.column * tile_columns;
    work.sum_begin = 0;
    work.sum_end = int32_t(depth);
    return true;
  }
  // The same for a pair of blocks, which has both or none of the items 2 * i and 2 * i + 1. Past the last
  // row tile a block keeps the other one company: it has the same resident and no rows.
  __device__ bool get_of_pair(int32_t item, int tile_columns, Work& work) const {
    const int32_t column_tiles = tiles_of(columns, tile_columns);
    const int32_t row_tiles = shared_->tiles;
    const int32_t pairs = divided(row_tiles + 1, 2);
    const int32_t pair = divided(item, 2);
    if (pair >= pairs * column_tiles) return false;
    const TilePosition at = in_bands<kBand / 2>(pair, pairs, column_tiles);
    const int32_t own = 2 * at.row + item % 2, other = own ^ 1;
    const int2* list = reinterpret_cast<const int2*>(tiles);
    const int2 tile = list[min(own, row_tiles - 1)];
    work.resident = tile.x;
    work.row = tile.y;
    work.row_end = own < row_tiles ? min(tile.y + kTileRows, offsets[tile.x + 1]) : work.row;
    work.column = at.column * tile_columns;
    work.sum_begin = 0;
    work.sum_end = int32_t(depth);
    work.shares = list[min(other, row_tiles - 1)].x == tile.x;
    return true;
  }

  const int32_t* offsets;
  const int32_t* tiles;
  int32_t residents;
  int64_t columns, depth;

  const Shared* shared_;
};

// ---- GEMMs whose sums run over the rows of a group: gradients of weights ------------------------

class WeightSchedule {
 public:
  struct Shared {
    uint16_t order[kMaxResidents];  // residents with more rows first
  };

  __device__ void prepare(Shared& shared) {
    for (int r = threadIdx.x; r < residents; r += blockDim.x) {
      const int rows = offsets[r + 1] - offsets[r];
      int before = 0;
      for (int other = 0; other < residents; ++other) {
        const int theirs = offsets[other + 1] - offsets[other];
        before += theirs > rows || (theirs == rows && other < r);
      }
      shared.order[before] = static_cast<uint16_t>(r);
    }
    __syncthreads();
    order_ = shared.order;
  }
  __device__ bool get(int32_t item, int tile_columns, Work& work) const {
    const int32_t row_tiles = tiles_of(lines, kTileRows);
    const int32_t column_tiles = tiles_of(columns, tile_columns);
    const int32_t rank = divided(item, row_tiles * column_tiles);
    if (rank >= residents) return false;
    const TilePosition at =
        in_bands(item - rank * row_tiles * column_tiles, row_tiles, column_tiles);
    work.resident = order_[rank];
    work.row = at.row * kTileRows;
    work.row_end = min(work.row + kTileRows, int32_t(lines));
    work.column = at.column * tile_columns;
    work.sum_begin = offsets[work.resident];
    work.sum_end = offsets[work.resident + 1];
    return true;
  }

  const int32_t* offsets;
  int32_t residents;
  int64_t lines, columns;  // of a gradient: lines of the left operand, columns of the right

  const uint16_t* order_;
};

}  // namespace fomoe::cuda
