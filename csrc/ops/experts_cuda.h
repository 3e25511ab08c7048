// What the CUDA ops of the grouped GEMMs demand beside experts.h: that every row can be read in
// chunks of 16 bytes, and a schedule for tiles of kTileRows rows.
#pragma once

#include "cuda.h"
#include "experts.h"

namespace fomoe::ops {

// `size` is the width of rows of `tensor`.
inline void require_chunks(const Tensor& tensor, const char* name, const char* size_name,
                           int64_t size) {
  const int64_t per_chunk = 16 / int64_t(tensor.element_size());
  require(size % per_chunk == 0, name, ": ", size_name, " is ", size, ", wanted a multiple of ",
          per_chunk, " on CUDA for ", dtype_name(tensor.scalar_type()),
          " (rows of whole 16-byte chunks)");
  require(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
          ": starts at an address that is not a multiple of 16, wanted an aligned tensor on CUDA");
}

// The schedule is one for tiles of kTileRows rows.
inline void require_schedule(const Tensor& tiles, int64_t slots, int64_t residents) {
  const int64_t wanted = max_tiles(slots, residents, kTileRows);
  require(tiles.size(0) == wanted, "tiles: has shape ", shape_name(tiles.sizes()), ", wanted [",
          wanted, ", 2], as compact gives with tile_rows = ", kTileRows);
  require(residents <= kMaxResidents, "offsets: have ", residents, " residents, wanted at most ",
          kMaxResidents, " on CUDA");
}

}  // namespace fomoe::ops
