// delta_encode and delta_reduce, distributed over threads by tiles.
#include "delta.h"

#include <atomic>
#include <limits>

#include "../parallel.h"
#include "../token_kernels.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

const DeltaKernels& kernels() {
  static const DeltaKernels& table = choose_table(
      &scalar::delta_table, FOMOE_AVX2_TABLE(delta_table), FOMOE_AVX512_TABLE(delta_table));
  return table;
}

// body(begin, end) returns the index of a bad value or -1; so does this function.
template <class Body>
int64_t over_tiles(int64_t numel, Format format, const Body& body) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const int64_t tile = delta_tile(format);
  std::atomic<int64_t> first_bad{kNone};
  parallel_for(0, (numel + tile - 1) / tile, kValuesPerTask / tile,
               [&](int64_t begin, int64_t end) {
                 const int64_t bad = body(begin * tile, std::min(end * tile, numel));
                 if (bad < 0) return;
                 int64_t seen = first_bad;
                 while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
                 }
               });
  return first_bad == kNone ? -1 : first_bad.load();
}

}  // namespace

int64_t delta_encode(const DeltaEncodeArgs& args) {
  const DeltaKernels& table = kernels();
  return over_tiles(args.numel, args.codec.format,
                    [&](int64_t begin, int64_t end) { return table.encode(args, begin, end); });
}

int64_t delta_reduce(const DeltaReduceArgs& args) {
  const DeltaKernels& table = kernels();
  return over_tiles(args.numel, args.codec.format,
                    [&](int64_t begin, int64_t end) { return table.reduce(args, begin, end); });
}

}  // namespace fomoe::cpu
