// The delta codecs of every instruction set against the scalar ones, bit for bit, in buffers that end
// where the data end and begin at odd addresses: under sanitizers a byte too far is seen.
// That the scalar ones are right is shown in tests/ops/test_delta.py.   test_delta [rounds] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/delta/delta.h"

namespace fomoe::cpu::twin512 {
extern const DeltaKernels delta_table;
}

namespace {

using namespace fomoe;

std::mt19937_64 g_random;
int64_t below(int64_t n) { return int64_t(g_random() % uint64_t(n)); }

// `numel` values of T from an address `shift` bytes past an allocation's start to its very end.
template <class T>
class Buffer {
 public:
  Buffer(int64_t numel, int64_t shift)
      : size_(numel * int64_t(sizeof(T))),
        shift_(shift),
        bytes_(new uint8_t[size_t(size_ + shift)]) {
    std::memset(bytes_.get(), 0xa5, size_t(size_ + shift));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.get() + shift_); }
  bool same(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_t(size_)) == 0;
  }

 private:
  int64_t size_, shift_;
  std::unique_ptr<uint8_t[]> bytes_;
};

float value(int64_t kind) {
  static std::normal_distribution<float> normal;
  const float x = normal(g_random);
  switch (kind) {
    case 0: return x;
    case 1: return x * x * x * x * x;
    case 2: return std::round(2 * x);
    case 3: return std::ldexp(x, int(-below(150)));
    default: return below(3) == 0 ? x * 1e37f : -0.0f;
  }
}

struct Case {
  DeltaCodec codec;
  int64_t numel, kind;
  std::vector<DeltaPart> parts;
  std::vector<Buffer<uint8_t>> locals;
  bool has_anchor, has_error;
  Buffer<float> anchor, error;
  uint64_t first;

  static int64_t length() {
    const int64_t some[] = {0, 1, 63, 64, 65, 128, 1023, 1024, 1025, 4095, 4096, 4097};
    return below(2) ? some[below(std::size(some))] : below(9000);
  }

  Case()
      : codec{Format(below(6)), below(2) ? 64 : 128, below(2) == 0, g_random() >> 1},
        numel(length()),
        kind(below(5)),
        has_anchor(kind != 4 && below(2)),  // float16 would not hold it
        has_error(below(2)),
        anchor(numel, 4 * below(4)),
        error(numel, 4 * below(4)),
        first(g_random() >> below(60)) {
    for (int64_t i = 0; i < numel; ++i) {
      anchor.data()[i] = value(kind);
      error.data()[i] = value(kind);
    }
    for (int64_t begin = 0; begin < numel;) {
      const int64_t count = std::min(numel - begin, 1 + below(below(2) ? 9000 : 100));
      const DType dtype = DType(below(3));
      const int64_t size = dtype == DType::f32 ? 4 : 2;
      locals.emplace_back(count * size, size * below(4));
      uint8_t* local = locals.back().data();
      for (int64_t i = 0; i < count; ++i) {
        const float x = value(0);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        // The upper half as bf16; as f16 it is some finite number too.
        const uint16_t half = dtype == DType::bf16 ? uint16_t(bits >> 16) : bits >> 16 & 0xbbff;
        std::memcpy(local + i * size, size == 4 ? static_cast<void*>(&bits) : (void*)&half,
                    size_t(size));
      }
      parts.push_back({below(5) ? local : nullptr, dtype, below(2) ? 1.0f : 0.3f, begin});
      begin += count;
    }
  }
};

struct Outcome {
  Buffer<uint8_t> payload, reduced;
  Buffer<float> error, share_error, sum;
  int64_t bad[3];
};

// Encodes, sums three copies and own values, and reduces the same.
Outcome run(const cpu::DeltaKernels& table, const Case& c, int64_t shift) {
  const int64_t n = c.numel, bytes = payload_bytes(c.codec, n);
  Outcome out = {{bytes, shift}, {bytes, shift}, {n, 4 * shift},
                 {n, 4 * shift}, {n, 4 * shift}, {}};
  std::memcpy(out.error.data(), c.error.data(), size_t(n) * 4);
  std::memcpy(out.share_error.data(), c.error.data(), size_t(n) * 4);
  out.bad[0] = table.encode({.anchor = c.has_anchor ? c.anchor.data() : nullptr,
                             .parts = c.parts.data(),
                             .num_parts = int32_t(c.parts.size()),
                             .error = c.has_error ? out.error.data() : nullptr,
                             .numel = n,
                             .codec = c.codec,
                             .first = c.first,
                             .payload = out.payload.data()},
                            0, n);
  Buffer<uint8_t> all(3 * bytes, shift);
  for (int m = 0; m < 3; ++m)
    std::memcpy(all.data() + m * bytes, out.payload.data(), size_t(bytes));
  DeltaReduceArgs args = {.payloads = all.data(),
                          .stride = bytes,
                          .members = 4,
                          .own_rank = int32_t(c.first % 4),
                          .own = c.error.data(),
                          .error = nullptr,
                          .numel = n,
                          .codec = c.codec,
                          .first = c.first,
                          .payload = nullptr,
                          .sum = out.sum.data()};
  out.bad[1] = table.reduce(args, 0, n);
  args.sum = nullptr;
  args.payload = out.reduced.data();
  args.error = out.share_error.data();
  out.bad[2] = table.reduce(args, 0, n);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  g_random.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const struct {
    const char* name;
    const cpu::DeltaKernels& table;
  } isas[] = {{"avx2", cpu::avx2::delta_table}, {"twin512", cpu::twin512::delta_table}};
  for (int round = 0; round < rounds; ++round) {
    const Case c;
    const Outcome wanted = run(cpu::scalar::delta_table, c, 0);
    for (const auto& isa : isas) {
      const Outcome got = run(isa.table, c, 1 + below(3));
      const bool same = wanted.payload.same(got.payload) && wanted.reduced.same(got.reduced) &&
                        wanted.error.same(got.error) && wanted.sum.same(got.sum) &&
                        wanted.share_error.same(got.share_error) &&
                        std::equal(wanted.bad, wanted.bad + 3, got.bad);
      if (same && wanted.bad[0] < 0 && wanted.bad[1] < 0) continue;
      std::printf("round %d, %s: format %d, block %d, %lld values of kind %lld, %zu parts: %s\n",
                  round, isa.name, int(c.codec.format), c.codec.block, (long long)c.numel,
                  (long long)c.kind, c.parts.size(), same ? "bad values" : "other bits");
      return 1;
    }
  }
  for (const auto& isa : isas)
    std::printf("%s: the bits of scalar in %d rounds\n", isa.name, rounds);
}
