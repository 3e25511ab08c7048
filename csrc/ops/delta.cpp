// The delta codecs and hashes as torch ops on the CPU.
#include "delta.h"

namespace fomoe::ops {
namespace {

void delta_encode(const DeltaEncodeInputs& in) {
  check(in.payload, "payload").cpu();
  const DeltaEncodeCall call(in);
  const int64_t bad = cpu::delta_encode(call.args);
  require(bad < 0, "values must be finite, got element ", bad, " (of ",
          in.anchor ? "anchor - local" : "local", in.error ? " plus error" : "",
          "), which is NaN or infinite");
}

void delta_reduce(const DeltaReduceInputs& in) {
  check(in.payloads, "payloads").cpu();
  const DeltaReduceCall call(in);
  const int64_t bad = cpu::delta_reduce(call.args);
  require(bad < 0, "payloads must have a finite sum", in.error ? " with error" : "",
          ", got element ", bad, ", which is NaN or infinite");
}

Tensor hash_bits(const HashInputs& in) {
  const HashCall call(in);
  check(call.hashes, "tensors[0]").cpu();
  for (const HashArgs& args : call.args) cpu::hash_bits(args);
  return call.hashes;
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  implement<&delta_encode>(m);
  implement<&delta_reduce>(m);
  implement<&hash_bits>(m);
}

}  // namespace
}  // namespace fomoe::ops
