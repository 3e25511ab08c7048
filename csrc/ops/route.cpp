// route and its gradient as torch ops on the CPU.
#include "route.h"

#include <tuple>

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, int64_t scoring,
                                         const std::optional<Tensor>& selection_bias,
                                         const std::optional<Tensor>& allowed, int64_t num_groups,
                                         int64_t groups_kept, bool renormalize, double scale,
                                         bool statistics) {
  check(logits, "logits").cpu();
  const RouteCall call(logits, top_k, scoring, selection_bias, allowed, num_groups, groups_kept,
                       renormalize, scale, statistics);
  const float* bias = call.args.selection_bias;
  for (int64_t e = 0; bias != nullptr && e < call.args.experts; ++e)
    require(std::isfinite(bias[e]), "selection_bias: is ", bias[e], " at expert ", e,
            ", wanted a finite number");
  require(cpu::route(call.args),
          "logits: contain NaN or, under softmax, a row whose largest value is infinite; ",
          "wanted finite numbers");
  return {call.weights, call.expert_ids, call.statistics};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                      const std::optional<Tensor>& allowed, int64_t scoring, bool renormalize,
                      double scale) {
  check(logits, "logits").cpu();
  const RouteBackwardCall call(grad_weights, logits, expert_ids, allowed, scoring, renormalize,
                               scale);
  const int32_t* ids = call.args.expert_ids;
  for (int64_t slot = 0; slot < call.args.tokens * call.args.top_k; ++slot)
    require(ids[slot] >= -1 && ids[slot] < call.args.experts, "experts: has ", ids[slot],
            " at slot ", slot, ", wanted -1 .. ", call.args.experts - 1);
  cpu::route_backward(call.args);
  return call.grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace
}  // namespace fomoe::ops
