// route and its gradient as torch ops on the CPU.
#include "route.h"

#include <tuple>

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> route(const RouteInputs& in) {
  check(in.logits, "logits").cpu();
  const RouteCall call(in);
  const float* bias = call.args.selection_bias;
  for (int64_t e = 0; bias != nullptr && e < call.args.experts; ++e)
    require(std::isfinite(bias[e]), "selection_bias must be finite, got ", bias[e], " at expert ",
            e);
  require(cpu::route(call.args),
          "logits must be finite, got NaN or, for softmax, a row whose largest value is infinite");
  return {call.weights, call.expert_ids, call.statistics};
}

Tensor route_backward(const RouteBackwardInputs& in) {
  check(in.logits, "logits").cpu();
  const RouteBackwardCall call(in);
  const int32_t* ids = call.args.expert_ids;
  for (int64_t slot = 0; slot < call.args.tokens * call.args.top_k; ++slot)
    require(ids[slot] >= -1 && ids[slot] < call.args.experts, "experts must be in -1 .. ",
            call.args.experts - 1, ", got ", ids[slot], " at slot ", slot);
  cpu::route_backward(call.args);
  return call.grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  implement<&route>(m);
  implement<&route_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
