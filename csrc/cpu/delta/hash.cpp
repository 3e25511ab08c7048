// A hash of bits for comparing replicas: words of 4 bytes distributed over threads, mod 2^64.
#include <atomic>
#include <cstring>

#include "../parallel.h"
#include "../token_kernels.h"
#include "delta.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kWordsPerTask = 1 << 15;

}  // namespace

void hash_bits(const HashArgs& args) {
  static const DeltaKernels& table = choose_table(
      &scalar::delta_table, FOMOE_AVX2_TABLE(delta_table), FOMOE_AVX512_TABLE(delta_table));
  const auto* bytes = static_cast<const uint8_t*>(args.bytes);
  const int64_t words = args.numel / 4, rest = args.numel % 4;
  std::atomic<uint64_t> total{uint64_t(args.numel)};
  parallel_for(0, words, kWordsPerTask, [&](int64_t begin, int64_t end) {
    total.fetch_add(table.hash(bytes, begin, end), std::memory_order_relaxed);
  });
  if (rest > 0) {
    uint32_t last = 0;
    std::memcpy(&last, bytes + 4 * words, size_t(rest));
    total += mix64(last + (uint64_t(words) << 32));
  }
  *args.hash = total;
}

}  // namespace fomoe::cpu
