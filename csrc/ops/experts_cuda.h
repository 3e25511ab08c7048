// Checks that only the CUDA ops of the grouped GEMMs make: every row can be read in chunks of 16
// bytes, and the schedule is for tiles of kTileRows rows.
#pragma once

#include "cuda.h"
#include "experts.h"

namespace fomoe::ops {

inline void require_residents(int64_t residents) {
  require(residents <= kMaxResidents, "offsets must have at most ", kMaxResidents,
          " residents on CUDA, got ", residents);
}

// `size` is the width of rows of `tensor`.
inline void require_chunks(const Tensor& tensor, const char* name, const char* size_name,
                           int64_t size) {
  const int64_t per_chunk = 16 / int64_t(tensor.element_size());
  require(size % per_chunk == 0, name, " (", size_name, ") must be a multiple of ", per_chunk,
          " on CUDA for ", dtype_name(tensor.scalar_type()),
          " (rows of whole 16-byte chunks), got ", size);
  require(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
          " must start at a multiple of 16 bytes on CUDA, got an address that does not");
}

// Checks the length of the schedule and the number of residents.
inline void require_schedule(const Tensor& tiles, int64_t slots, int64_t residents) {
  const int64_t wanted = max_tiles(slots, residents, kTileRows);
  require(tiles.size(0) == wanted, "tiles must have shape [", wanted,
          ", 2], as compact returns for tile_rows = ", kTileRows, ", got ",
          shape_name(tiles.sizes()));
  require_residents(residents);
}

}  // namespace fomoe::ops
