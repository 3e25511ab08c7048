// route and its gradient as torch ops on CUDA. Values in device memory are not checked: that would
// wait for the device (csrc/kernels.h says what bad ones do).
#include <tuple>

#include "cuda.h"
#include "route.h"

namespace fomoe::ops {
namespace {

void check_limits(int64_t experts, int64_t top_k) {
  require(experts <= kMaxExperts, "logits: got ", experts, " experts, wanted at most ", kMaxExperts,
          " on CUDA");
  require(top_k <= kMaxTopK, "top_k: got ", top_k, ", wanted at most ", kMaxTopK, " on CUDA");
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, int64_t scoring,
                                         const std::optional<Tensor>& selection_bias,
                                         const std::optional<Tensor>& allowed, int64_t num_groups,
                                         int64_t groups_kept, bool renormalize, double scale,
                                         bool statistics) {
  const DeviceOf device(logits, "logits");
  const RouteCall call(logits, top_k, scoring, selection_bias, allowed, num_groups, groups_kept,
                       renormalize, scale, statistics);
  check_limits(call.args.experts, top_k);
  check_launch(cuda::route(call.args, device.stream()), "route");
  return {call.weights, call.expert_ids, call.statistics};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                      const std::optional<Tensor>& allowed, int64_t scoring, bool renormalize,
                      double scale) {
  const DeviceOf device(logits, "logits");
  const RouteBackwardCall call(grad_weights, logits, expert_ids, allowed, scoring, renormalize,
                               scale);
  check_limits(call.args.experts, call.args.top_k);
  check_launch(cuda::route_backward(call.args, device.stream()), "route_backward");
  return call.grad_logits;
}

FOMOE_CUDA_OPS(m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace
}  // namespace fomoe::ops
