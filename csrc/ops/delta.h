// Of the delta codecs on CPU and CUDA: inputs, their checks, and the arguments of the kernels.
#pragma once

#include <cmath>
#include <vector>

#include "inputs.h"

namespace fomoe::ops {

// `block` matters only for the formats that have blocks.
inline DeltaCodec delta_codec(int64_t format, int64_t block, bool stochastic, int64_t seed) {
  const Format f = as_enum<Format>(format, "format", kFormatNames);
  const bool blocks = f == Format::int8 || f == Format::int4 || f == Format::int2;
  require(!blocks || block == 64 || block == 128, "block must be 64 or 128, got ", block);
  require(seed >= 0, "seed must be at least 0, got ", seed);
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
  require(payload.numel() == wanted, "payload must have ", wanted, " bytes for ", numel,
          " values, got ", payload.numel());
}

struct DeltaEncodeInputs : Inputs<schemas::delta_encode> {
  using Inputs::Inputs;
  const std::optional<Tensor>& anchor = take<"anchor">();
  const std::vector<Tensor>& local = take<"local">();
  const std::vector<int64_t>& begins = take<"begins">();
  const std::vector<double>& weights = take<"weights">();
  const std::optional<Tensor>& error = take<"error">();
  const int64_t numel = take<"numel">();
  const int64_t format = take<"format">();
  const int64_t block = take<"block">();
  const bool stochastic = take<"stochastic">();
  const int64_t seed = take<"seed">();
  const int64_t first = take<"first">();
  const Tensor& payload = take<"payload">();
};

// A call of delta_encode. Everything is on the device of `payload`; local[p] gives the values from
// begins[p] up to the next part's begin, an empty tensor none.
struct DeltaEncodeCall {
  explicit DeltaEncodeCall(const DeltaEncodeInputs& in) {
    const std::optional<Tensor>&anchor = in.anchor, &error = in.error;
    const Tensor& payload = in.payload;
    const int64_t numel = in.numel, first = in.first;
    require(numel >= 0, "numel must be at least 0, got ", numel);
    require(first >= 0, "first must be at least 0, got ", first);
    const DeltaCodec codec = delta_codec(in.format, in.block, in.stochastic, in.seed);
    check_payload(payload, codec, numel);
    if (anchor) check_values(*anchor, "anchor", numel, payload, "payload");
    if (error) check_values(*error, "error", numel, payload, "payload");
    fill_parts(in);
    args = {.anchor = pointer<float>(anchor),
            .parts = parts.data(),
            .num_parts = as_int32(int64_t(parts.size()), "local (number of tensors)"),
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
  void fill_parts(const DeltaEncodeInputs& in) {
    const std::vector<Tensor>& local = in.local;
    const std::vector<int64_t>& begins = in.begins;
    const std::vector<double>& weights = in.weights;
    const int64_t numel = in.numel;
    const size_t count = local.size();
    require(begins.size() == count && weights.size() == count, "begins and weights must have ",
            count, " numbers, one per tensor of local, got ", begins.size(), " and ",
            weights.size());
    require((count == 0) == (numel == 0), "local must have ",
            numel == 0 ? "no tensor" : "at least one tensor", " for ", numel, " values, got ",
            count);
    parts.reserve(count);
    for (size_t p = 0; p < count; ++p) {
      const int64_t begin = begins[p], end = p + 1 < count ? begins[p + 1] : numel;
      require(p > 0 || begin == 0, "begins must start with 0, got ", begin);
      require(begin < end, "begins must be rising numbers under numel, got ", begin, " before ",
              end);
      const std::string name = "local[" + std::to_string(p) + "]";
      const Tensor& part = local[p];
      check(part, name.c_str()).same_device(in.payload, "payload").dtype(kFloatTypes);
      check(part, name.c_str()).shape({kAny}).contiguous();
      require(part.numel() == 0 || part.numel() == end - begin, name, " must have ", end - begin,
              " values or none, got ", part.numel());
      require(std::isfinite(weights[p]), "weights must be finite, got ", weights[p]);
      parts.push_back({.local = part.numel() == 0 ? nullptr : part.const_data_ptr(),
                       .dtype = dtype_of(part, name.c_str()),
                       .weight = float(weights[p]),
                       .begin = begin});
    }
  }
};

struct DeltaReduceInputs : Inputs<schemas::delta_reduce> {
  using Inputs::Inputs;
  const Tensor& payloads = take<"payloads">();
  const std::optional<Tensor>& own = take<"own">();
  const int64_t own_rank = take<"own_rank">();
  const std::optional<Tensor>& error = take<"error">();
  const int64_t numel = take<"numel">();
  const int64_t format = take<"format">();
  const int64_t block = take<"block">();
  const bool stochastic = take<"stochastic">();
  const int64_t seed = take<"seed">();
  const int64_t first = take<"first">();
  const std::optional<Tensor>& payload = take<"payload">();
  const std::optional<Tensor>& sum = take<"sum">();
};

// A call of delta_reduce. Everything is on the device of `payloads` [rows, payload bytes]; the
// members are its rows and, with `own`, one more.
struct DeltaReduceCall {
  explicit DeltaReduceCall(const DeltaReduceInputs& in) {
    const Tensor& payloads = in.payloads;
    const std::optional<Tensor>&own = in.own, &error = in.error, &payload = in.payload;
    const std::optional<Tensor>& sum = in.sum;
    const int64_t own_rank = in.own_rank, numel = in.numel, first = in.first;
    require(numel >= 0, "numel must be at least 0, got ", numel);
    require(first >= 0, "first must be at least 0, got ", first);
    const DeltaCodec codec = delta_codec(in.format, in.block, in.stochastic, in.seed);
    const int64_t bytes = payload_bytes(codec, numel);
    check(payloads, "payloads").dtype(ScalarType::Byte).shape({kAny, bytes});
    require(bytes < 2 || payloads.stride(1) == 1, "payloads must have contiguous rows, got stride ",
            payloads.stride(1));
    const int64_t members = payloads.size(0) + (own ? 1 : 0);
    as_int32(members, "payloads (number of members)", 1);
    if (own) check_values(*own, "own", numel, payloads, "payloads");
    as_int32(own_rank, "own_rank", 0, own ? members - 1 : 0);
    require(payload.has_value() != sum.has_value(),
            "payload or sum must be given, one of them, got ", payload ? "both" : "neither");
    require(!(error && sum), "error must be None with sum, got a tensor");
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

struct HashInputs : Inputs<schemas::hash_bits> {
  using Inputs::Inputs;
  const std::vector<Tensor>& tensors = take<"tensors">();
};

// A call of hash_bits: `hashes` int64 [number of tensors] on their device, not yet written.
struct HashCall {
  explicit HashCall(const HashInputs& in) {
    const std::vector<Tensor>& tensors = in.tensors;
    require(!tensors.empty(), "tensors must have at least one tensor, got none");
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
