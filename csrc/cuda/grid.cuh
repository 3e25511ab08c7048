// Sizes of launches. Every kernel loops until its items are done, whatever the number of blocks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fomoe::cuda {

// Tests define FOMOE_FEW_BLOCKS, so that small inputs already make blocks and counters go around.
#ifdef FOMOE_FEW_BLOCKS
constexpr int64_t kFewBlocks = FOMOE_FEW_BLOCKS;
#else
constexpr int64_t kFewBlocks = INT64_MAX;
#endif

// As many blocks as the items need, at least one, no more than `most`.
inline unsigned blocks_for(int64_t items, int64_t items_per_block, int64_t most) {
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::min(most, kFewBlocks)));
}

}  // namespace fomoe::cuda
