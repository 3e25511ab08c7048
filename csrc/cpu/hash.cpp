// A hash of bits for comparing replicas: words of 4 bytes shared out over threads, mod 2^64.
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kWordsPerTask = 1 << 15;

uint64_t word(const uint8_t* bytes, size_t size) {
  uint32_t w = 0;
  std::memcpy(&w, bytes, size);
  return w;
}

}  // namespace

void hash_bits(const HashArgs& args) {
  const auto* bytes = static_cast<const uint8_t*>(args.bytes);
  const int64_t words = args.numel / 4, rest = args.numel % 4;
  std::atomic<uint64_t> total{uint64_t(args.numel)};
  parallel_for(0, words, kWordsPerTask, [&](int64_t begin, int64_t end) {
    // Independent sums keep the multiplier busy.
    uint64_t sums[4] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4)
      for (int j = 0; j < 4; ++j)
        sums[j] += mix64(word(bytes + 4 * (i + j), 4) + (uint64_t(i + j) << 32));
    for (; i < end; ++i) sums[0] += mix64(word(bytes + 4 * i, 4) + (uint64_t(i) << 32));
    total.fetch_add(sums[0] + sums[1] + sums[2] + sums[3], std::memory_order_relaxed);
  });
  if (rest > 0) total += mix64(word(bytes + 4 * words, size_t(rest)) + (uint64_t(words) << 32));
  *args.hash = total;
}

}  // namespace fomoe::cpu
