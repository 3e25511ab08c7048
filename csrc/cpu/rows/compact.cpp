// compact: histogram, scan, stable scatter. Slots are cut into one range per worker; the order of
// rows is fixed by the definition, so the result does not depend on the ranges.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../parallel.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kSlotsPerStretch = 8192;

// The resident index of a slot's expert, -1 when the slot is skipped.
int32_t resident_of(const CompactArgs& args, int64_t slot) {
  const int32_t expert = args.expert_ids[slot];
  return expert < 0 ? -1 : args.resident_index[expert];
}

// Writes the tile schedule from the offsets.
void write_tiles(const CompactArgs& args, int64_t slots) {
  const auto rows_of = [&](int32_t r) { return args.offsets[r + 1] - args.offsets[r]; };
  std::vector<int32_t> order(size_t(args.residents));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return rows_of(a) > rows_of(b); });
  int32_t* tile = args.tiles;
  for (const int32_t r : order) {
    for (int64_t row = args.offsets[r]; row < args.offsets[r + 1]; row += args.tile_rows) {
      *tile++ = r;
      *tile++ = int32_t(row);
    }
  }
  std::fill(tile, args.tiles + 2 * max_tiles(slots, args.residents, args.tile_rows), -1);
}

}  // namespace

bool compact(const CompactArgs& args) {
  const int64_t slots = args.tokens * args.top_k;
  const int64_t residents = args.residents;
  const int64_t stretches =
      std::clamp<int64_t>(slots / kSlotsPerStretch, 1, std::max(num_workers(), 1));
  const int64_t length = (slots + stretches - 1) / stretches;
  const auto stretch_begin = [&](int64_t i) { return std::min(i * length, slots); };

  // next[i, r]: first the number of rows of resident r in range i, then the index of its next row.
  std::vector<int32_t> next(size_t(stretches * residents), 0);
  std::atomic<bool> valid{true};
  parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t* count = next.data() + i * residents;
      for (int64_t slot = stretch_begin(i); slot < stretch_begin(i + 1); ++slot) {
        const int32_t expert = args.expert_ids[slot];
        if (expert < -1 || expert >= args.experts) {
          valid.store(false, std::memory_order_relaxed);
          return;
        }
        const int32_t resident = resident_of(args, slot);
        if (resident >= 0) ++count[resident];
      }
    }
  });
  if (!valid.load()) return false;

  int32_t row = 0;
  for (int64_t r = 0; r < residents; ++r) {
    args.offsets[r] = row;
    for (int64_t i = 0; i < stretches; ++i) {
      int32_t& at = next[size_t(i * residents + r)];
      const int32_t count = at;
      at = row;
      row += count;
    }
  }
  args.offsets[residents] = row;

  parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t* at = next.data() + i * residents;
      int64_t slot = stretch_begin(i);
      int64_t token = args.top_k > 0 ? slot / args.top_k : 0;
      int64_t token_end = (token + 1) * args.top_k;
      for (; slot < stretch_begin(i + 1); ++slot) {
        if (slot == token_end) {
          ++token;
          token_end += args.top_k;
        }
        const int32_t resident = resident_of(args, slot);
        args.row_of_slot[slot] = resident < 0 ? -1 : at[resident];
        if (resident < 0) continue;
        const int32_t to = at[resident]++;
        args.token_of_row[to] = int32_t(token);
        args.slot_of_row[to] = int32_t(slot);
      }
    }
  });
  std::fill(args.token_of_row + row, args.token_of_row + slots, -1);
  std::fill(args.slot_of_row + row, args.slot_of_row + slots, -1);
  if (args.tiles != nullptr) write_tiles(args, slots);
  return true;
}

}  // namespace fomoe::cpu
