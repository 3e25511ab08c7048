// The driver's part for the delta codecs and hashes: payloads, errors and sums bit for bit.
#include <algorithm>
#include <cmath>
#include <limits>

#include "driver.h"

namespace fomoe::driver {
namespace {

// What the values of a case look like.
enum class Kind { normal, spread, tied, tiny, huge, late };
const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"normal", "spread", "tied", "tiny", "huge", "late"};
  return kNames[int(kind)];
}
constexpr const char* kFormats[] = {"fp32", "bf16", "int8", "int4", "int2", "topk"};

std::vector<float> values_of(Kind kind, Random& random, int64_t size) {
  std::vector<float> values = normals(random, size);
  for (size_t i = 0; i < values.size(); ++i) {
    float& value = values[i];
    switch (kind) {
      case Kind::normal: break;
      // Zeros of both signs, subnormals and all that is larger; every block at its own height.
      case Kind::spread:
        value = std::ldexp(value, random.below(30) - 15 - int(i / 64 % 3) * 60);
        if (random.chance(0.1)) value = random.chance(0.5) ? 0.0f : -0.0f;
        break;
      case Kind::tied: value = float(random.below(5) - 2) * 0.5f; break;
      // Some blocks are taken for zeros.
      case Kind::tiny: value = std::ldexp(value, i / 96 % 2 == 0 ? -91 : -140); break;
      // Three chunks are taken for zeros; the fourth is the next one of the first block.
      case Kind::late: value = int64_t(i) < 3 * kTopkChunk ? std::ldexp(value, -100) : value; break;
      case Kind::huge: value = std::copysign(3.3e38f, value) * (random.chance(0.5) ? 1.0f : 0.4f);
    }
  }
  return values;
}

// ---- encode --------------------------------------------------------------------------------------

struct EncodeCase {
  Format format = Format::int8;
  int64_t numel = 0;
  int block = 64;
  Kind kind = Kind::normal;
  bool stochastic = false, with_anchor = true, with_error = true;
  int parts = 1;
  int shift = 0;          // values that every tensor starts behind an aligned address
  int payload_shift = 0;  // bytes, likewise
};

// Parts of uneven lengths, of every dtype, some without values.
struct Parts {
  Parts(const EncodeCase& c, Random& random) {
    std::vector<int64_t> begins = {0};
    for (int p = 1; p < c.parts; ++p) begins.push_back(1 + random.below(int(c.numel) - 1));
    std::sort(begins.begin(), begins.end());
    begins.erase(std::unique(begins.begin(), begins.end()), begins.end());
    stores.reserve(begins.size());
    for (size_t p = 0; p < begins.size(); ++p) {
      const int64_t end = p + 1 < begins.size() ? begins[p + 1] : c.numel;
      // Behind each other 16-byte boundaries fall everywhere.
      const int shift = c.shift + (c.parts > 1 ? int(p % 3) : 0);
      const DType dtype = c.parts == 1 ? DType::f32 : DType(p % 3);
      const bool absent = p % 5 == 4;
      const auto values = values_of(c.kind == Kind::huge ? Kind::normal : c.kind, random,
                                    absent ? 0 : end - begins[p] + shift);
      stores.push_back(stored(dtype, values));
      const char* local = stores.back().data() + shift * (dtype == DType::f32 ? 4 : 2);
      const float weight = p % 2 == 0 ? 1.0f : 0.3f;
      table.push_back({absent ? nullptr : local, dtype, weight, begins[p]});
    }
  }
  std::vector<std::vector<char>> stores;
  std::vector<DeltaPart> table;
};

bool run_encode(const EncodeCase& c) {
  Random random(unsigned(c.numel * 7 + int(c.format)));
  const Parts parts(c, random);
  const std::vector<float> anchor = values_of(c.kind, random, c.numel + c.shift);
  const DeltaCodec codec{c.format, c.block, c.stochastic, 0x123456789abcdef0u};
  Pair<float> error(c.numel + c.shift);
  error.cpu = values_of(c.kind == Kind::huge ? Kind::normal : c.kind, random, c.numel + c.shift);
  error.cuda = error.cpu;
  Pair<char> payload(payload_bytes(codec, c.numel) + c.payload_shift);
  DeltaEncodeArgs args{};
  args.anchor = c.with_anchor ? anchor.data() + c.shift : nullptr;
  args.parts = parts.table.data();
  args.num_parts = int32_t(parts.table.size());
  args.numel = c.numel;
  args.codec = codec;
  args.first = 0xfffffff0u;  // the random bits' index passes 2^32
  const auto set_outputs = [&](auto& errors, auto& bytes) {
    args.error = c.with_error ? errors.data() + c.shift : nullptr;
    args.payload = reinterpret_cast<uint8_t*>(bytes.data()) + c.payload_shift;
  };
  set_outputs(error.cpu, payload.cpu);
  bool good = cpu::delta_encode(args) == -1;
  if (!good) std::printf("  the CPU found a bad value\n");
  set_outputs(error.cuda, payload.cuda);
  good &= launched(cuda::delta_encode(args, nullptr), "delta_encode");
  return good && payload.same("bytes of payload") && error.same("error");
}

std::string name_of(const EncodeCase& c) {
  char name[200];
  std::snprintf(name, sizeof name, "encode %s/%d %lld %s%s%s%s parts %d shift %d payload %d",
                kFormats[int(c.format)], c.block, static_cast<long long>(c.numel), name_of(c.kind),
                c.stochastic ? " stochastic" : "", c.with_anchor ? " anchor" : "",
                c.with_error ? " error" : "", c.parts, c.shift, c.payload_shift);
  return name;
}

// int8 in blocks of 64 and 128, and so on: {format, block}.
std::vector<std::pair<Format, int>> codecs() {
  return {{Format::fp32, 64},  {Format::bf16, 64},  {Format::int8, 64},
          {Format::int8, 128}, {Format::int4, 64},  {Format::int4, 128},
          {Format::int2, 64},  {Format::int2, 128}, {Format::topk, 64}};
}

std::vector<EncodeCase> encode_cases(bool small) {
  std::vector<EncodeCase> cases;
  for (const auto& [format, block] : codecs()) {
    EncodeCase c;
    c.format = format;
    c.block = block;
    const auto add = [&](auto change) {
      cases.push_back(c);
      change(cases.back());
    };
    if (small) {
      if (block == 64) add([](EncodeCase& x) { x.numel = 1111, x.parts = 5; });
      continue;
    }
    for (const int numel : {0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 4095, 4096, 4097})
      add([&](EncodeCase& x) { x.numel = numel; });
    for (const Kind kind : {Kind::spread, Kind::tied, Kind::tiny, Kind::huge})
      add([&](EncodeCase& x) {
        x.numel = 4500, x.kind = kind, x.parts = kind == Kind::huge ? 1 : 4;
      });
    for (const int shift : {1, 2, 3}) {
      add([&](EncodeCase& x) { x.numel = 1500, x.shift = shift; });
      add([&](EncodeCase& x) { x.numel = 1501, x.payload_shift = shift; });
    }
    add([](EncodeCase& x) { x.numel = 1500, x.payload_shift = 4; });
    add([](EncodeCase& x) { x.numel = 2222, x.with_anchor = false, x.parts = 3; });
    add([](EncodeCase& x) { x.numel = 2222, x.with_error = false; });
    add([](EncodeCase& x) { x.numel = 3001, x.parts = 64; });
    add([](EncodeCase& x) { x.numel = 70, x.parts = 60, x.shift = 1; });
    add([](EncodeCase& x) { x.numel = 13000, x.parts = 2, x.stochastic = true; });
    add([](EncodeCase& x) { x.numel = 515, x.kind = Kind::spread, x.stochastic = true; });
  }
  // More chunks than blocks, the last one short.
  if (!small) cases.push_back({.format = Format::topk, .numel = 17000, .parts = 7});
  cases.push_back({.format = Format::topk, .numel = 12500, .kind = Kind::late});
  if (!small) cases.push_back({.format = Format::topk, .numel = 4096, .with_error = false});
  return cases;
}

// ---- reduce --------------------------------------------------------------------------------------

struct ReduceCase {
  Format format = Format::int8;
  int64_t numel = 0;
  int block = 64;
  int members = 3, own_rank = -1;  // -1: all members' payloads are given
  Kind kind = Kind::normal;
  bool stochastic = false, with_error = true, to_sum = false;
  int shift = 0, payload_shift = 0, padding = 0;  // padding: bytes between the payloads
};

bool run_reduce(const ReduceCase& c) {
  Random random(unsigned(c.numel * 5 + int(c.format)));
  const DeltaCodec codec{c.format, c.block, c.stochastic, 77};
  const int64_t bytes = payload_bytes(codec, c.numel), stride = bytes + c.padding;
  const int rows = c.members - (c.own_rank >= 0 ? 1 : 0);
  std::vector<uint8_t> payloads(size_t(std::max<int64_t>(0, rows * stride - c.padding)) +
                                size_t(c.payload_shift));
  bool good = true;
  for (int row = 0; row < rows; ++row) {
    const std::vector<float> values = values_of(c.kind, random, c.numel);
    const DeltaPart part{values.data(), DType::f32, 1.0f, 0};
    DeltaEncodeArgs encode{};
    encode.parts = &part;
    encode.num_parts = 1;
    encode.numel = c.numel;
    encode.codec = codec;
    encode.payload = payloads.data() + c.payload_shift + row * stride;
    good &= cpu::delta_encode(encode) == -1;
  }
  const std::vector<float> own = values_of(c.kind, random, c.numel + c.shift);
  Pair<float> error(c.numel + c.shift), sum(c.numel + c.shift);
  error.cpu = error.cuda = values_of(c.kind, random, c.numel + c.shift);
  Pair<char> payload(bytes + c.payload_shift);
  DeltaReduceArgs args{};
  args.payloads = payloads.data() + c.payload_shift;
  args.stride = stride;
  args.members = c.members;
  args.own_rank = std::max(c.own_rank, 0);
  args.own = c.own_rank >= 0 ? own.data() + c.shift : nullptr;
  args.numel = c.numel;
  args.codec = codec;
  args.first = 1000;
  const auto set_outputs = [&](auto& errors, auto& reduced, auto& sums) {
    args.error = c.with_error && !c.to_sum ? errors.data() + c.shift : nullptr;
    uint8_t* out = reinterpret_cast<uint8_t*>(reduced.data()) + c.payload_shift;
    args.payload = c.to_sum ? nullptr : out;
    args.sum = c.to_sum ? sums.data() + c.shift : nullptr;
  };
  set_outputs(error.cpu, payload.cpu, sum.cpu);
  good &= cpu::delta_reduce(args) == -1;
  if (!good) std::printf("  the CPU found a bad value\n");
  set_outputs(error.cuda, payload.cuda, sum.cuda);
  good &= launched(cuda::delta_reduce(args, nullptr), "delta_reduce");
  return good && payload.same("bytes of payload") && error.same("error") && sum.same("sum");
}

std::string name_of(const ReduceCase& c) {
  char name[200];
  std::snprintf(name, sizeof name,
                "reduce %s/%d %lld %s%s%s%s members %d own %d shift %d payload %d padding %d",
                kFormats[int(c.format)], c.block, static_cast<long long>(c.numel), name_of(c.kind),
                c.stochastic ? " stochastic" : "", c.with_error ? " error" : "",
                c.to_sum ? " sum" : "", c.members, c.own_rank, c.shift, c.payload_shift, c.padding);
  return name;
}

std::vector<ReduceCase> reduce_cases(bool small) {
  std::vector<ReduceCase> cases;
  for (const auto& [format, block] : codecs()) {
    for (const bool to_sum : {false, true}) {
      ReduceCase c;
      c.format = format;
      c.block = block;
      c.to_sum = to_sum;
      const auto add = [&](auto change) {
        cases.push_back(c);
        change(cases.back());
      };
      if (small) {
        if (block == 64) add([](ReduceCase& x) { x.numel = 1111, x.own_rank = 1; });
        continue;
      }
      for (const int numel : {0, 1, 63, 64, 65, 130, 4095, 4096, 4097})
        add([&](ReduceCase& x) { x.numel = numel, x.own_rank = numel % 4 - 1; });
      add([](ReduceCase& x) { x.numel = 700, x.members = 1; });
      add([](ReduceCase& x) {
        x.numel = 700, x.members = 1, x.own_rank = 0, x.kind = Kind::spread;
      });
      add([](ReduceCase& x) { x.numel = 700, x.own_rank = 0, x.kind = Kind::spread; });
      add([](ReduceCase& x) { x.numel = 9000, x.members = 11, x.own_rank = 9; });
      add([](ReduceCase& x) { x.numel = 5000, x.members = 8, x.kind = Kind::tied; });
      add([](ReduceCase& x) { x.numel = 5000, x.own_rank = 2, x.kind = Kind::tiny; });
      add([](ReduceCase& x) { x.numel = 1500, x.with_error = false, x.stochastic = true; });
      add([](ReduceCase& x) { x.numel = 1501, x.own_rank = 2, x.shift = 1, x.payload_shift = 1; });
      add([](ReduceCase& x) { x.numel = 1502, x.own_rank = 1, x.shift = 2, x.payload_shift = 2; });
      add([](ReduceCase& x) { x.numel = 1504, x.payload_shift = 4, x.padding = 3; });
      add([](ReduceCase& x) { x.numel = 1504, x.padding = 16; });
    }
  }
  if (!small) cases.push_back({.format = Format::topk, .numel = 17000, .members = 4});
  return cases;
}

// ---- values that are bad -------------------------------------------------------------------------

struct BadCase {
  Format format;
  int block;
  float value;
};

// Where a value is NaN or infinite, so is what its block (of top-k: a kept value) decodes to; other
// blocks are as if nothing were wrong.
bool run_bad(const BadCase& c) {
  constexpr int64_t kNumel = 9000, kBad = 4200;
  Random random(1);
  const DeltaCodec codec{c.format, c.block, false, 0};
  std::vector<float> values = normals(random, kNumel);
  std::vector<uint8_t> payload(size_t(payload_bytes(codec, kNumel)));
  const DeltaPart part{values.data(), DType::f32, 1.0f, 0};
  DeltaEncodeArgs encode{};
  encode.parts = &part;
  encode.num_parts = 1;
  encode.numel = kNumel;
  encode.codec = codec;
  encode.payload = payload.data();
  DeltaReduceArgs decode{};
  decode.payloads = payload.data();
  decode.members = 1;
  decode.numel = kNumel;
  decode.codec = codec;
  Pair<float> decoded(kNumel);
  decode.sum = decoded.cpu.data();
  bool good = cpu::delta_encode(encode) == -1 && cpu::delta_reduce(decode) == -1;
  values[kBad] = c.value;
  good &= launched(cuda::delta_encode(encode, nullptr), "delta_encode");
  decode.sum = decoded.cuda.data();
  good &= launched(cuda::delta_reduce(decode, nullptr), "delta_reduce");
  const int64_t block = c.format == Format::topk                               ? kTopkChunk
                        : c.format == Format::fp32 || c.format == Format::bf16 ? 1
                                                                               : c.block;
  if (std::isfinite(decoded.cuda[kBad])) {
    std::printf("  the bad value decodes to %g\n", double(decoded.cuda[kBad]));
    return false;
  }
  for (int64_t i = kBad / block * block; i < std::min(kNumel, (kBad / block + 1) * block); ++i)
    decoded.cuda[size_t(i)] = decoded.cpu[size_t(i)];
  return good && decoded.same("decoded");
}

std::string name_of(const BadCase& c) {
  return std::string("bad value in ") + kFormats[int(c.format)];
}

std::vector<BadCase> bad_cases(bool small) {
  std::vector<BadCase> cases;
  for (const auto& [format, block] : codecs()) {
    if (small) break;
    cases.push_back({format, block, std::numeric_limits<float>::quiet_NaN()});
    cases.push_back({format, block, -std::numeric_limits<float>::infinity()});
  }
  return cases;
}

// ---- hash ----------------------------------------------------------------------------------------

struct HashCase {
  int64_t bytes;
  int shift;
};

bool run_hash(const HashCase& c) {
  Random random(unsigned(c.bytes));
  std::vector<uint8_t> bytes(size_t(c.bytes + c.shift));
  for (uint8_t& byte : bytes) byte = uint8_t(random.below(256));
  uint64_t of_cpu = 0, of_cuda = 0;
  cpu::hash_bits({bytes.data() + c.shift, c.bytes, &of_cpu});
  if (!launched(cuda::hash_bits({bytes.data() + c.shift, c.bytes, &of_cuda}, nullptr), "hash_bits"))
    return false;
  if (of_cpu == of_cuda) return true;
  std::printf("  cpu %016llx, cuda %016llx\n", static_cast<unsigned long long>(of_cpu),
              static_cast<unsigned long long>(of_cuda));
  return false;
}

std::string name_of(const HashCase& c) {
  return "hash of " + std::to_string(c.bytes) + " bytes, shift " + std::to_string(c.shift);
}

std::vector<HashCase> hash_cases(bool small) {
  if (small) return {{9001, 0}, {1001, 1}};
  std::vector<HashCase> cases;
  for (const int bytes : {0, 1, 3, 4, 5, 15, 16, 17, 4095, 100003})
    for (const int shift : {0, 1, 2, 4}) cases.push_back({bytes, shift});
  return cases;
}

}  // namespace

int run_delta_cases(bool small) {
  return failures(encode_cases(small), run_encode) + failures(reduce_cases(small), run_reduce) +
         failures(bad_cases(small), run_bad) + failures(hash_cases(small), run_hash);
}

}  // namespace fomoe::driver
