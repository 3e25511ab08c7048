// What the CPU and the CUDA ops of the delta codecs check alike, and the arguments they hand on.
#pragma once

#include <cmath>
#include <vector>

#include "common.h"

namespace fomoe::ops {

// `block` counts for the formats that have blocks only.
inline DeltaCodec delta_codec(int64_t format, int64_t block, bool stochastic, int64_t seed) {
  const Format f = static_cast<Format>(as_int32(format, "format", 0, 5));
  const bool blocks = f == Format::int8 || f == Format::int4 || f == Format::int2;
  require(!blocks || block == 64 || block == 128, "block: got ", block, ", wanted 64 or 128");
  require(seed >= 0, "seed: got ", seed, ", wanted at least 0");
  return {f, blocks ? int32_t(block) : 64, stochastic, uint64_t(seed)};
}

// A flat fp32 tensor of `numel` values on the device of `like`.
inline void check_values(const Tensor& values, const char* name, int64_t numel, const Tensor& like,
                         const char* like_name) {
  check(values, name).same_device(like, like_name).dtype(ScalarType::Float);
  check(values, name).shape({numel}).contiguous();
}

inline void check_payload(const Tensor& payload, const DeltaCodec& codec, int64_t numel) {
  check(payload, "payload").dtype(ScalarType::Byte).shape({kAny}).contiguous();
  const int64_t wanted = payload_bytes(codec, numel);
  require(payload.numel() == wanted, "payload: has ", payload.numel(), " bytes, wanted ", wanted,
          " for ", numel, " values");
}

// A call of delta_encode. Everything is on the device of `payload`; local[p] gives the values from
// begins[p] up to the next part's begin, an empty tensor none.
struct DeltaEncodeCall {
  DeltaEncodeCall(const std::optional<Tensor>& anchor, const std::vector<Tensor>& local,
                  const std::vector<int64_t>& begins, const std::vector<double>& weights,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first, const Tensor& payload) {
    require(numel >= 0, "numel: got ", numel, ", wanted at least 0");
    require(first >= 0, "first: got ", first, ", wanted at least 0");
    const DeltaCodec codec = delta_codec(format, block, stochastic, seed);
    check_payload(payload, codec, numel);
    if (anchor) check_values(*anchor, "anchor", numel, payload, "payload");
    if (error) check_values(*error, "error", numel, payload, "payload");
    fill_parts(local, begins, weights, numel, payload);
    args = {.anchor = pointer<float>(anchor),
            .parts = parts.data(),
            .num_parts = as_int32(int64_t(parts.size()), "local: number of tensors"),
            .error = error ? mutable_pointer<float>(*error) : nullptr,
            .numel = numel,
            .codec = codec,
            .first = uint64_t(first),
            .payload = mutable_pointer<uint8_t>(payload)};
  }
  DeltaEncodeCall(const DeltaEncodeCall&) = delete;  // args point into parts

  DeltaEncodeArgs args;
  std::vector<DeltaPart> parts;

 private:
  void fill_parts(const std::vector<Tensor>& local, const std::vector<int64_t>& begins,
                  const std::vector<double>& weights, int64_t numel, const Tensor& payload) {
    const size_t count = local.size();
    require(begins.size() == count && weights.size() == count, "begins, weights: have ",
            begins.size(), " and ", weights.size(), " numbers, wanted ", count, " as local");
    require((count == 0) == (numel == 0), "local: has ", count, " tensors for ", numel,
            " values, wanted ", numel == 0 ? "none" : "at least one");
    parts.reserve(count);
    for (size_t p = 0; p < count; ++p) {
      const int64_t begin = begins[p], end = p + 1 < count ? begins[p + 1] : numel;
      require(p > 0 || begin == 0, "begins: starts with ", begin, ", wanted 0");
      require(begin < end, "begins: has ", begin, " before ", end,
              ", wanted rising numbers under numel");
      const std::string name = "local[" + std::to_string(p) + "]";
      const Tensor& part = local[p];
      check(part, name.c_str()).same_device(payload, "payload").dtype(kFloatTypes);
      check(part, name.c_str()).shape({kAny}).contiguous();
      require(part.numel() == 0 || part.numel() == end - begin, name, ": has ", part.numel(),
              " values, wanted ", end - begin, ", or none");
      require(std::isfinite(weights[p]), "weights: has ", weights[p], ", wanted finite numbers");
      parts.push_back({.local = part.numel() == 0 ? nullptr : part.const_data_ptr(),
                       .dtype = dtype_of(part, name.c_str()),
                       .weight = float(weights[p]),
                       .begin = begin});
    }
  }
};

// A call of delta_reduce. Everything is on the device of `payloads` [rows, payload bytes]; the
// members are its rows and, with `own`, one more.
struct DeltaReduceCall {
  DeltaReduceCall(const Tensor& payloads, const std::optional<Tensor>& own, int64_t own_rank,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first,
                  const std::optional<Tensor>& payload, const std::optional<Tensor>& sum) {
    require(numel >= 0, "numel: got ", numel, ", wanted at least 0");
    require(first >= 0, "first: got ", first, ", wanted at least 0");
    const DeltaCodec codec = delta_codec(format, block, stochastic, seed);
    const int64_t bytes = payload_bytes(codec, numel);
    check(payloads, "payloads").dtype(ScalarType::Byte).shape({kAny, bytes});
    require(bytes < 2 || payloads.stride(1) == 1, "payloads: has rows with stride ",
            payloads.stride(1), ", wanted contiguous rows");
    const int64_t members = payloads.size(0) + (own ? 1 : 0);
    as_int32(members, "payloads: number of members", 1);
    if (own) check_values(*own, "own", numel, payloads, "payloads");
    as_int32(own_rank, "own_rank", 0, own ? members - 1 : 0);
    require(payload.has_value() != sum.has_value(), "payload, sum: got ",
            payload ? "both" : "neither", ", wanted one of them");
    require(!(error && sum), "error: got one with sum, wanted it with payload only");
    if (error) check_values(*error, "error", numel, payloads, "payloads");
    if (sum) check_values(*sum, "sum", numel, payloads, "payloads");
    if (payload) {
      check(*payload, "payload").same_device(payloads, "payloads");
      check_payload(*payload, codec, numel);
    }
    args = {.payloads = pointer<uint8_t>(payloads),
            .stride = payloads.size(0) > 1 ? payloads.stride(0) : bytes,
            .members = int32_t(members),
            .own_rank = int32_t(own_rank),
            .own = pointer<float>(own),
            .error = error ? mutable_pointer<float>(*error) : nullptr,
            .numel = numel,
            .codec = codec,
            .first = uint64_t(first),
            .payload = payload ? mutable_pointer<uint8_t>(*payload) : nullptr,
            .sum = sum ? mutable_pointer<float>(*sum) : nullptr};
  }

  DeltaReduceArgs args;
};

// A call of hash_bits: `hashes` int64 [number of tensors] on their device, not yet written.
struct HashCall {
  explicit HashCall(const std::vector<Tensor>& tensors) {
    require(!tensors.empty(), "tensors: is empty, wanted at least one");
    for (size_t t = 0; t < tensors.size(); ++t) {
      const std::string name = "tensors[" + std::to_string(t) + "]";
      check(tensors[t], name.c_str()).same_device(tensors[0], "tensors[0]").contiguous();
    }
    hashes = empty(tensors[0], {int64_t(tensors.size())}, ScalarType::Long);
    auto* hash = reinterpret_cast<uint64_t*>(mutable_pointer<int64_t>(hashes));
    for (size_t t = 0; t < tensors.size(); ++t)
      args.push_back({.bytes = tensors[t].const_data_ptr(),
                      .numel = tensors[t].numel() * int64_t(tensors[t].element_size()),
                      .hash = hash + t});
  }

  std::vector<HashArgs> args;
  Tensor hashes;
};

}  // namespace fomoe::ops
