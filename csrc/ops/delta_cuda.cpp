// The delta codecs and hashes as torch ops on CUDA. Values in device memory are not checked: that would
// wait for the device (csrc/kernels.h says what becomes of NaN and infinities).
#include <algorithm>

#include "cuda.h"
#include "delta.h"

namespace fomoe::ops {
namespace {

// The table of parts is an argument of the kernel, of at most kMaxDeltaParts. A call with more parts
// first writes the values of all of them, weight * (anchor - local), as fp32 into one tensor, which
// is then the only part. The kernel itself does this: an fp32 payload is the values.
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

void delta_encode(const DeltaEncodeInputs& in) {
  const DeviceOf device(in.payload, "payload");
  DeltaEncodeCall call(in);
  if (call.args.num_parts <= kMaxDeltaParts) {
    check_launch(cuda::delta_encode(call.args, device.stream()), "delta_encode");
    return;
  }
  const Tensor joined = empty(in.payload, {in.numel}, ScalarType::Float);
  const DeltaPart part = join_parts(call.args, joined, device.stream());
  call.args.anchor = nullptr;
  call.args.parts = &part;
  call.args.num_parts = 1;
  check_launch(cuda::delta_encode(call.args, device.stream()), "delta_encode");
}

void delta_reduce(const DeltaReduceInputs& in) {
  const DeviceOf device(in.payloads, "payloads");
  const DeltaReduceCall call(in);
  check_launch(cuda::delta_reduce(call.args, device.stream()), "delta_reduce");
}

Tensor hash_bits(const HashInputs& in) {
  HashCall call(in);
  const DeviceOf device(call.hashes, "tensors[0]");
  torch::stable::zero_(call.hashes);
  for (const HashArgs& args : call.args)
    check_launch(cuda::hash_bits(args, device.stream()), "hash_bits");
  return call.hashes;
}

FOMOE_CUDA_OPS(m) {
  implement<&delta_encode>(m);
  implement<&delta_reduce>(m);
  implement<&hash_bits>(m);
}

}  // namespace
}  // namespace fomoe::ops
