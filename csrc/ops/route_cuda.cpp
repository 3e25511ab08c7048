// route and its gradient as torch ops on CUDA. Values in device memory are not checked: that would
// wait for the device (csrc/kernels.h says what bad ones do).
#include <tuple>

#include "cuda.h"
#include "route.h"

namespace fomoe::ops {
namespace {

void check_limits(int64_t experts, int64_t top_k) {
  require(experts <= kMaxExperts, "logits.shape[1] (experts) must be at most ", kMaxExperts,
          " on CUDA, got ", experts);
  require(top_k <= kMaxTopK, "top_k must be at most ", kMaxTopK, " on CUDA, got ", top_k);
}

std::tuple<Tensor, Tensor, Tensor> route(const RouteInputs& in) {
  const DeviceOf device(in.logits, "logits");
  const RouteCall call(in);
  check_limits(call.args.experts, call.args.top_k);
  check_launch(cuda::route(call.args, device.stream()), "route");
  return {call.weights, call.expert_ids, call.statistics};
}

Tensor route_backward(const RouteBackwardInputs& in) {
  const DeviceOf device(in.logits, "logits");
  const RouteBackwardCall call(in);
  check_limits(call.args.experts, call.args.top_k);
  check_launch(cuda::route_backward(call.args, device.stream()), "route_backward");
  return call.grad_logits;
}

FOMOE_CUDA_OPS(m) {
  implement<&route>(m);
  implement<&route_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
