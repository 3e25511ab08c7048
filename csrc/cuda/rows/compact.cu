// compact: histogram, scan, stable scatter, and the tile schedule; kernels.h. Two launches, or one where
// the slots are those of one tile.
//
// Slots are cut into one range (stretch) per block. The first kernel counts each range's rows per
// resident. In the second every block adds up the counts of the ranges before its own (all of them
// are in L2), which gives it the offsets and the place of its first row of each resident, and then
// walks its range in tiles of slots. A tile's slots are read while the counts are added up, or the tile
// before is written. A warp owns neighbouring slots of a tile and ranks them with
// __match_any_sync; results do not depend on the order in which threads run.
#include <algorithm>
#include <cstdint>

#include "../arch/shared_memory.cuh"
#include "../formats.cuh"
#include "../grid.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlotsPerThread = 4;
constexpr int kSlotsPerWarp = kSlotsPerThread * kWarp;
constexpr int kTile = kSlotsPerThread * kThreads;
constexpr int64_t kMaxBlocks = 128;

struct Params : CompactArgs {
  int64_t slots, stretch;  // slots to a block, a multiple of kTile
  int32_t blocks;
  int64_t tile_room;  // entries of `tiles`
};

// The resident index of a slot's expert; -1 when it is skipped or past the end.
__device__ int32_t resident_of(const Params& p, int64_t slot) {
  if (slot >= p.slots) return -1;
  const int32_t expert = p.expert_ids[slot];
  if (expert < 0 || expert >= p.experts) return -1;
  const int32_t resident = p.resident_index[expert];
  return resident < p.residents ? resident : -1;
}

// workspace[block, r] = rows of resident r in the block's stretch.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Params p) {
  FOMOE_SHARED(int32_t, count, [kMaxResidents]);
  for (int r = threadIdx.x; r < p.residents; r += kThreads) count[r] = 0;
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.x) * p.stretch;
  for (int64_t tile = begin; tile < min(begin + p.stretch, p.slots); tile += kTile) {
    int32_t resident[kSlotsPerThread];
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i)
      resident[i] = resident_of(p, tile + i * kThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kSlotsPerThread; ++i)
      if (resident[i] >= 0) atomicAdd(&count[resident[i]], 1);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < p.residents; r += kThreads)
    p.workspace[int64_t(blockIdx.x) * p.residents + r] = count[r];
}

struct Shared {
  int32_t next[kMaxResidents];         // the next row of each resident
  int32_t offsets[kMaxResidents + 1];  // first its number of rows
  int32_t warp_sum[kWarps];
  // Rows of each resident that the warps of a tile have: first their number, then those of the
  // warps before.
  uint16_t rows_of_warp[kWarps][kMaxResidents];
};

// next[r] = rows of r in stretches before this block's; offsets[r] = rows of r in all.
__device__ void add_up_counts(const Params& p, Shared& s) {
  for (int r = threadIdx.x; r < p.residents; r += kThreads) s.next[r] = s.offsets[r] = 0;
  __syncthreads();
  // Warps divide the columns of 32 residents among them and, if there are fewer of those, the blocks.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = (p.residents + kWarp - 1) / kWarp;
  const int parts = columns == 0 || columns >= kWarps ? 1 : kWarps / columns;
  for (int column = warp / parts; column < columns; column += kWarps / parts) {
    const int r = column * kWarp + lane;
    if (r >= p.residents) continue;
    int32_t before = 0, all = 0;
#pragma unroll 8
    for (int block = warp % parts; block < p.blocks; block += parts) {
      const int32_t rows = p.workspace[int64_t(block) * p.residents + r];
      all += rows;
      before += block < int(blockIdx.x) ? rows : 0;
    }
    atomicAdd(&s.next[r], before);
    atomicAdd(&s.offsets[r], all);
  }
}

// Turns numbers of rows into offsets, and advances next[r] by them.
__device__ void scan_offsets(const Params& p, Shared& s) {
  constexpr int kPerThread = kMaxResidents / kThreads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t rows[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int r = threadIdx.x * kPerThread + i;
    rows[i] = r < p.residents ? s.offsets[r] : 0;
    sum += rows[i];
  }
  int32_t inclusive = sum;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, apart);
    if (lane >= apart) inclusive += other;
  }
  if (lane == kWarp - 1) s.warp_sum[warp] = inclusive;
  __syncthreads();
  int32_t offset = inclusive - sum;
  for (int w = 0; w < warp; ++w) offset += s.warp_sum[w];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int r = threadIdx.x * kPerThread + i;
    if (r < p.residents) {
      s.offsets[r] = offset;
      s.next[r] += offset;
    }
    offset += rows[i];
  }
  if (threadIdx.x == kThreads - 1) s.offsets[p.residents] = offset;
}

// add_up_counts where all slots are those of one tile, from the residents of its slots.
__device__ void count_tile(const Params& p, Shared& s, const int32_t (&resident)[kSlotsPerThread]) {
  for (int r = threadIdx.x; r < p.residents; r += kThreads) s.next[r] = s.offsets[r] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i)
    if (resident[i] >= 0) atomicAdd(&s.offsets[resident[i]], 1);
}

// The first of the thread's slots of a tile; the others follow at a distance of kWarp.
__device__ int64_t first_slot(int64_t tile) {
  return tile + threadIdx.x / kWarp * kSlotsPerWarp + threadIdx.x % kWarp;
}

__device__ void read_tile(const Params& p, int64_t tile, int32_t (&resident)[kSlotsPerThread]) {
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i)
    resident[i] = resident_of(p, first_slot(tile) + i * kWarp);
}

// Gives the slots of one tile their rows.
__device__ void scatter_tile(const Params& p, Shared& s, int64_t tile,
                             const int32_t (&resident)[kSlotsPerThread]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = first_slot(tile);
  int32_t rank[kSlotsPerThread];
  for (int r = lane; r < p.residents; r += kWarp) s.rows_of_warp[warp][r] = 0;
  __syncwarp();
  // Ranks within the warp; the first lane of each resident counts for the others.
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const unsigned same = __match_any_sync(kAllLanes, resident[i]);
    const unsigned before = same & ((1u << lane) - 1);
    const int32_t counted = resident[i] >= 0 ? s.rows_of_warp[warp][resident[i]] : 0;
    rank[i] = counted + __popc(before);
    __syncwarp();
    if (resident[i] >= 0 && before == 0)
      s.rows_of_warp[warp][resident[i]] = static_cast<uint16_t>(counted + __popc(same));
    __syncwarp();
  }
  __syncthreads();
  // A thread owns a resident: its rows start at next[r], the warps' in order.
  for (int r = threadIdx.x; r < p.residents; r += kThreads) {
    int32_t rows = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t here = s.rows_of_warp[w][r];
      s.rows_of_warp[w][r] = static_cast<uint16_t>(rows);
      rows += here;
    }
    s.offsets[r] = s.next[r];  // of this tile; offsets themselves are no longer needed
    s.next[r] += rows;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const int64_t slot = first + i * kWarp;
    if (slot >= p.slots) continue;
    const int32_t r = resident[i];
    const int32_t row = r < 0 ? -1 : s.offsets[r] + s.rows_of_warp[warp][r] + rank[i];
    p.row_of_slot[slot] = row;
    if (r < 0) continue;
    p.token_of_row[row] = int32_t(uint32_t(slot) / uint32_t(p.top_k));
    p.slot_of_row[row] = int32_t(slot);
  }
}

__device__ int32_t rows_of(const Shared& s, int r) { return s.offsets[r + 1] - s.offsets[r]; }

// A warp writes the tiles of every n-th resident, after those of all residents with more rows.
__device__ void write_tiles(const Params& p, const Shared& s) {
  const int lane = threadIdx.x % kWarp;
  const int first = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = p.blocks * kWarps;
  const auto tiles_of = [&](int r) {
    const int32_t rows = rows_of(s, r);
    return rows / p.tile_rows + (rows % p.tile_rows != 0);
  };
  int2* tiles = reinterpret_cast<int2*>(p.tiles);
  for (int r = first; r < p.residents; r += warps) {
    const int32_t rows = rows_of(s, r);
    int at = 0;
    for (int other = lane; other < p.residents; other += kWarp) {
      const int32_t theirs = rows_of(s, other);
      if (theirs > rows || (theirs == rows && other < r)) at += tiles_of(other);
    }
    at = __reduce_add_sync(kAllLanes, at);
    for (int i = lane; i < tiles_of(r); i += kWarp)
      tiles[at + i] = make_int2(r, s.offsets[r] + i * p.tile_rows);
  }
  int total = 0;
  for (int r = lane; r < p.residents; r += kWarp) total += tiles_of(r);
  total = __reduce_add_sync(kAllLanes, total);
  for (int64_t i = total + int64_t(first) * kWarp + lane; i < p.tile_room; i += warps * kWarp)
    tiles[i] = make_int2(-1, -1);
}

// Fills entries past the last row with -1; block 0 writes the offsets.
__device__ void write_rest(const Params& p, const Shared& s) {
  const int64_t rows = s.offsets[p.residents];
  for (int64_t row = rows + int64_t(blockIdx.x) * kThreads + threadIdx.x; row < p.slots;
       row += int64_t(p.blocks) * kThreads) {
    p.token_of_row[row] = -1;
    p.slot_of_row[row] = -1;
  }
  if (blockIdx.x != 0) return;
  for (int r = threadIdx.x; r <= p.residents; r += kThreads) p.offsets[r] = s.offsets[r];
}

__global__ void __launch_bounds__(kThreads) scatter_kernel(const __grid_constant__ Params p) {
  FOMOE_SHARED(Shared, shared, [1]);
  Shared& s = shared[0];
  const int64_t begin = int64_t(blockIdx.x) * p.stretch;
  int32_t resident[kSlotsPerThread];
  read_tile(p, begin, resident);
  if (p.slots <= kTile)
    count_tile(p, s, resident);
  else
    add_up_counts(p, s);
  __syncthreads();
  scan_offsets(p, s);
  __syncthreads();
  if (p.tiles != nullptr) write_tiles(p, s);
  write_rest(p, s);
  const int64_t end = min(begin + p.stretch, p.slots);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    __syncthreads();  // the last tile's rows, and the offsets, have been read
    scatter_tile(p, s, tile, resident);
    if (tile + kTile < end) read_tile(p, tile + kTile, resident);
  }
}

Params params_of(const CompactArgs& args) {
  Params p{args, 0, 0, 0, 0};
  p.slots = args.tokens * args.top_k;
  const int64_t most = blocks_for(p.slots, kTile, kMaxBlocks);
  const int64_t tiles = (p.slots + kTile - 1) / kTile;
  p.stretch = std::max<int64_t>((tiles + most - 1) / most, 1) * kTile;
  p.blocks = static_cast<int32_t>(blocks_for(p.slots, p.stretch, most));
  p.tile_room = max_tiles(p.slots, args.residents, args.tile_rows);
  return p;
}

}  // namespace

int64_t compact_workspace(const CompactArgs& args) {
  return int64_t(params_of(args).blocks) * args.residents;
}

int compact(const CompactArgs& args, void* stream) {
  if (args.residents > kMaxResidents) return cudaErrorInvalidValue;
  const Params params = params_of(args);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  if (params.slots > kTile) {
    if (const cudaError_t error = cudaLaunchKernelEx(&config, count_kernel, params)) return error;
  }
  return cudaLaunchKernelEx(&config, scatter_kernel, params);
}

}  // namespace fomoe::cuda
