// The delta codecs and hashes as torch ops on CUDA. Values in device memory are not checked: that would
// wait for the device (csrc/kernels.h says what becomes of NaN and infinities).
#include <algorithm>

#include "cuda.h"
#include "delta.h"

namespace fomoe::ops {
namespace {

// The table of parts is an argument of the kernel and has room for so many. More of them are brought
// into one by the kernel itself, as fp32 payloads of what they give: weight * (anchor - local).
DeltaPart join_parts(const DeltaEncodeArgs& args, const Tensor& joined, void* stream) {
  auto* values = mutable_pointer<float>(joined);
  for (int32_t p = 0; p < args.num_parts; p += kMaxDeltaParts) {
    const int32_t next = std::min(p + kMaxDeltaParts, args.num_parts);
    const int64_t begin = args.parts[p].begin;
    const int64_t end = next < args.num_parts ? args.parts[next].begin : args.numel;
    std::vector<DeltaPart> parts(args.parts + p, args.parts + next);
    for (DeltaPart& part : parts) part.begin -= begin;
    const DeltaEncodeArgs some = {
        .anchor = args.anchor == nullptr ? nullptr : args.anchor + begin,
        .parts = parts.data(),
        .num_parts = int32_t(parts.size()),
        .error = nullptr,
        .numel = end - begin,
        .codec = {.format = Format::fp32, .block = 64, .stochastic = false, .seed = 0},
        .first = 0,
        .payload = reinterpret_cast<uint8_t*>(values + begin)};
    check_launch(cuda::delta_encode(some, stream), "delta_encode");
  }
  return {.local = values, .dtype = DType::f32, .weight = 1.0f, .begin = 0};
}

void delta_encode(const std::optional<Tensor>& anchor, const std::vector<Tensor>& local,
                  const std::vector<int64_t>& begins, const std::vector<double>& weights,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first, const Tensor& payload) {
  const DeviceOf device(payload, "payload");
  DeltaEncodeCall call(anchor, local, begins, weights, error, numel, format, block, stochastic,
                       seed, first, payload);
  if (call.args.num_parts <= kMaxDeltaParts) {
    check_launch(cuda::delta_encode(call.args, device.stream()), "delta_encode");
    return;
  }
  const Tensor joined = empty(payload, {numel}, ScalarType::Float);
  const DeltaPart part = join_parts(call.args, joined, device.stream());
  call.args.anchor = nullptr;
  call.args.parts = &part;
  call.args.num_parts = 1;
  check_launch(cuda::delta_encode(call.args, device.stream()), "delta_encode");
}

void delta_reduce(const Tensor& payloads, const std::optional<Tensor>& own, int64_t own_rank,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first,
                  const std::optional<Tensor>& payload, const std::optional<Tensor>& sum) {
  const DeviceOf device(payloads, "payloads");
  const DeltaReduceCall call(payloads, own, own_rank, error, numel, format, block, stochastic, seed,
                             first, payload, sum);
  check_launch(cuda::delta_reduce(call.args, device.stream()), "delta_reduce");
}

Tensor hash_bits(const std::vector<Tensor>& tensors) {
  HashCall call(tensors);
  const DeviceOf device(call.hashes, "tensors[0]");
  torch::stable::zero_(call.hashes);
  for (const HashArgs& args : call.args)
    check_launch(cuda::hash_bits(args, device.stream()), "hash_bits");
  return call.hashes;
}

FOMOE_CUDA_OPS(m) {
  m.impl("delta_encode", TORCH_BOX(&delta_encode));
  m.impl("delta_reduce", TORCH_BOX(&delta_reduce));
  m.impl("hash_bits", TORCH_BOX(&hash_bits));
}

}  // namespace
}  // namespace fomoe::ops
