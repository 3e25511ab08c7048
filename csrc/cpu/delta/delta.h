// The delta codecs, one table per instruction set; delta.cpp distributes tiles over threads.
#pragma once

#include <cstdint>

#include "../../kernels.h"

namespace fomoe::cpu {

// Values are handled in tiles that stay in the L1 cache between reading, encoding and writing. A tile
// is made of whole blocks and of whole bytes of every format.
static constexpr int64_t delta_tile(Format format) {
  return format == Format::topk ? kTopkChunk : 1024;
}

// Each function handles the values begin .. end-1, where begin is the start of a tile, and returns the
// index of a value that is NaN or infinite, or -1.
struct DeltaKernels {
  int64_t (*encode)(const DeltaEncodeArgs&, int64_t begin, int64_t end);
  int64_t (*reduce)(const DeltaReduceArgs&, int64_t begin, int64_t end);
  // The hash of the 4-byte words begin .. end-1, without the number of bytes.
  uint64_t (*hash)(const uint8_t* bytes, int64_t begin, int64_t end);
};

namespace scalar {
extern const DeltaKernels delta_table;
}
namespace avx2 {
extern const DeltaKernels delta_table;
}
namespace avx512 {
extern const DeltaKernels delta_table;
}

}  // namespace fomoe::cpu
