// Strips of finished sums, and the windows through which a warp reads and writes the elements of a strip
// in global memory.
//
// A strip is 16 rows x 64 columns of a warp, in the layout that mma.sync and wgmma leave sums in:
// sums[4 j + 2 h + e] of lane l is row 8 h + l / 4, column 8 j + 2 (l % 4) + e. A quad is 16 rows x 16
// of its columns: four 8 x 8 matrices (upper left, lower left, upper right, lower right), of each of
// which a lane holds a pair of neighbours; the pairs of quad q are sums[8 q] .. sums[8 q + 7] in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../arch/matrix.cuh"
#include "../formats.cuh"

namespace fomoe::cuda {

constexpr int kStripRows = 16, kStripColumns = 64, kStripSums = 32;
constexpr int kQuadColumns = 16, kQuads = kStripColumns / kQuadColumns;
using Sums = float[kStripSums];
using Quad = float2[4];

// Rows and columns of C that a strip stands for; `rows` and `columns` of them exist.
struct Place {
  int32_t resident;
  int64_t row;
  int rows;
  int column, columns;
};

template <class Format>
constexpr bool kIsF32 = std::is_same_v<Format, F32>;
template <class Format>
constexpr int kElementBytes = kIsF32<Format> ? 4 : 2;

__device__ inline void take_quad(const Sums& sums, int quad, Quad& pairs) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = make_float2(sums[8 * quad + 2 * i], sums[8 * quad + 2 * i + 1]);
}
__device__ inline void give_quad(Sums& sums, int quad, const Quad& pairs) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[8 * quad + 2 * i] = pairs[i].x;
    sums[8 * quad + 2 * i + 1] = pairs[i].y;
  }
}

// Pairs of 16-bit elements as a register holds them.
template <class Format>
__device__ inline float2 unpack_pair(uint32_t unit) {
  float values[2];
  Format::unpack(unit, values);
  return make_float2(values[0], values[1]);
}
template <class Format>
__device__ inline uint32_t pack_pair(float2 pair) {
  const float values[2] = {pair.x, pair.y};
  return Format::pack(values);
}

template <class Format>
__device__ inline unsigned char* element_at(const void* base, int64_t index) {
  return static_cast<unsigned char*>(const_cast<void*>(base)) + index * kElementBytes<Format>;
}

// A warp's window on up to 64 columns of 16 rows in global memory, which it reads and writes by quads.
// 16-bit elements go through staging in shared memory, so that global memory sees 16 bytes a lane; a
// staged row is padded, so that the 8 rows of a matrix are in different banks. fp32 pairs of four lanes
// fill a sector by themselves and are accessed directly, without staging.
//
// kStoresMatrices: staging is written by stmatrix (from sm_90 on), else pair by pair.
template <class Format, bool kStoresMatrices>
class Window {
 public:
  static constexpr bool kStaged = !kIsF32<Format>;
  static constexpr int kRowBytes = kStripColumns * 2 + 16;
  static constexpr int kBytes = kStaged ? kStripRows * kRowBytes : 0;

  __device__ Window(unsigned char* staging, int lane) : staging_(staging), lane_(lane) {}

  // Moves to the window whose first element is at `corner`, rows `stride` elements apart. Staging is
  // unchanged: data read through another window can be written through this one.
  __device__ void aim(void* corner, int64_t stride, int rows, int columns) {
    corner_ = static_cast<unsigned char*>(corner);
    stride_ = uint32_t(stride * kElementBytes<Format>);
    rows_ = rows;
    columns_ = columns;
  }
  // aim, and staging may be written anew. All lanes.
  __device__ void move(void* corner, int64_t stride, int rows, int columns) {
    aim(corner, stride, rows, columns);
    if constexpr (kStaged) __syncwarp();  // what was staged before has been read
  }

  // A lane's part of a window, being loaded from global memory.
  struct Chunks {
    uint4 chunk[kStaged ? kStripRows * kStripColumns * 2 / 16 / kWarp : 1];
  };
  // Starts to load the window's contents, zeros outside of it; does not wait.
  __device__ void load(Chunks& chunks) const {
    if constexpr (kStaged) {
      for_chunks([&](int i, unsigned char*, const unsigned char* global, bool exists) {
        chunks.chunk[i] = make_uint4(0, 0, 0, 0);
        if (exists) chunks.chunk[i] = *reinterpret_cast<const uint4*>(global);
      });
    }
  }
  // Writes the loaded data to staging, for get. All lanes.
  __device__ void stage(const Chunks& chunks) {
    if constexpr (kStaged) {
      for_chunks([&](int i, unsigned char* staged, const unsigned char*, bool) {
        *reinterpret_cast<uint4*>(staged) = chunks.chunk[i];
      });
      __syncwarp();
    }
  }
  // Writes the data of put to global memory. All lanes.
  __device__ void flush() {
    if constexpr (kStaged) {
      __syncwarp();
      for_chunks([&](int, const unsigned char* staged, unsigned char* global, bool exists) {
        if (exists) *reinterpret_cast<uint4*>(global) = *reinterpret_cast<const uint4*>(staged);
      });
    }
  }

  // The lane's pairs of a quad. All lanes.
  __device__ void get(int quad, Quad& pairs) const {
    if constexpr (kStaged) {
      uint32_t units[4];
      load_matrices(units, matrix_row(quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = unpack_pair<Format>(units[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = exists(quad, i) ? *reinterpret_cast<const float2*>(global_pair(quad, i))
                                   : make_float2(0.0f, 0.0f);
    }
  }
  __device__ void put(int quad, const Quad& pairs) {
    if constexpr (kStaged) {
      uint32_t units[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) units[i] = pack_pair<Format>(pairs[i]);
      if constexpr (kStoresMatrices) {
        store_matrices(units, matrix_row(quad));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<uint32_t*>(staging_ + row_of(i) * kRowBytes + column_of(quad, i) * 2) =
              units[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (exists(quad, i)) *reinterpret_cast<float2*>(global_pair(quad, i)) = pairs[i];
    }
  }

 private:
  // The offset of the lane's pair in matrix i of a quad.
  __device__ int row_of(int i) const { return lane_ / 4 + i % 2 * 8; }
  __device__ int column_of(int quad, int i) const {
    return quad * kQuadColumns + i / 2 * 8 + lane_ % 4 * 2;
  }
  __device__ bool exists(int quad, int i) const {
    return row_of(i) < rows_ && column_of(quad, i) < columns_;
  }
  __device__ unsigned char* global_pair(int quad, int i) const {
    return corner_ + uint64_t(unsigned(row_of(i))) * stride_ +
           column_of(quad, i) * kElementBytes<Format>;
  }
  // The row that the lane names for load_matrices and store_matrices: the quad's rows from its left
  // half, then from its right one.
  __device__ unsigned char* matrix_row(int quad) const {
    return staging_ + lane_ % 16 * kRowBytes + quad * kQuadColumns * 2 + lane_ / 16 * 16;
  }
  // body(i, staged, global, exists) for the lane's 16-byte chunks.
  template <class Body>
  __device__ void for_chunks(const Body& body) const {
    constexpr int kChunks = kStripColumns * 2 / 16, kStep = kWarp / kChunks;
    const int row = lane_ / kChunks, chunk = lane_ % kChunks;
    const int rows = chunk * 8 < columns_ ? rows_ - row : 0;  // from `row` on
    unsigned char* staged = staging_ + row * kRowBytes + chunk * 16;
    unsigned char* global = corner_ + uint64_t(unsigned(row)) * stride_ + chunk * 16;
#pragma unroll
    for (int i = 0; i < kStripRows / kStep; ++i) {
      body(i, staged + i * kStep * kRowBytes, global, i * kStep < rows);
      global += uint64_t(kStep) * stride_;
    }
  }

  unsigned char* staging_;
  int lane_;
  unsigned char* corner_ = nullptr;
  uint32_t stride_ = 0;  // bytes
  int rows_ = 0, columns_ = 0;
};

// Bytes of staging of a window, written in either way.
template <class Format>
constexpr int kWindowBytes = Window<Format, false>::kBytes;

}  // namespace fomoe::cuda
