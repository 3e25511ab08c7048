// The delta codecs and hashes as torch ops on the CPU.
#include "delta.h"

namespace fomoe::ops {
namespace {

void delta_encode(const std::optional<Tensor>& anchor, const std::vector<Tensor>& local,
                  const std::vector<int64_t>& begins, const std::vector<double>& weights,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first, const Tensor& payload) {
  check(payload, "payload").cpu();
  const DeltaEncodeCall call(anchor, local, begins, weights, error, numel, format, block,
                             stochastic, seed, first, payload);
  const int64_t bad = cpu::delta_encode(call.args);
  require(bad < 0, "values: element ", bad, " (of ", anchor ? "anchor - local" : "local",
          error ? " plus error" : "", ") is NaN or infinite, wanted finite numbers");
}

void delta_reduce(const Tensor& payloads, const std::optional<Tensor>& own, int64_t own_rank,
                  const std::optional<Tensor>& error, int64_t numel, int64_t format, int64_t block,
                  bool stochastic, int64_t seed, int64_t first,
                  const std::optional<Tensor>& payload, const std::optional<Tensor>& sum) {
  check(payloads, "payloads").cpu();
  const DeltaReduceCall call(payloads, own, own_rank, error, numel, format, block, stochastic, seed,
                             first, payload, sum);
  const int64_t bad = cpu::delta_reduce(call.args);
  require(bad < 0, "payloads: element ", bad, " of the members' sum", error ? " plus error" : "",
          " is NaN or infinite, wanted finite numbers");
}

Tensor hash_bits(const std::vector<Tensor>& tensors) {
  const HashCall call(tensors);
  check(call.hashes, "tensors[0]").cpu();
  for (const HashArgs& args : call.args) cpu::hash_bits(args);
  return call.hashes;
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("delta_encode", TORCH_BOX(&delta_encode));
  m.impl("delta_reduce", TORCH_BOX(&delta_reduce));
  m.impl("hash_bits", TORCH_BOX(&hash_bits));
}

}  // namespace
}  // namespace fomoe::ops
