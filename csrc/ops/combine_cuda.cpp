// combine, its gradients and gather as torch ops on CUDA. Values in device memory are not checked.
#include "combine.h"

#include <tuple>

#include "cuda.h"

namespace fomoe::ops {
namespace {

Tensor combine(const CombineInputs& in) {
  const DeviceOf device(in.row_of_slot, "row_of_slot");
  check_combine(in);
  Tensor y = empty(in.rows, {in.row_of_slot.size(0), in.rows.size(1)});
  check_launch(cuda::combine(combine_args(in, y), device.stream()), "combine");
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const CombineBackwardInputs& in) {
  const DeviceOf device(in.row_of_slot, "row_of_slot");
  CombineBackwardCall call(in);
  const Tensor row_count = empty(in.row_of_slot, {1});
  call.args.workspace = mutable_pointer<int32_t>(row_count);
  check_launch(cuda::combine_backward(call.args, device.stream()), "combine_backward");
  return {call.grad_rows, call.grad_weights};
}

Tensor gather(const GatherInputs& in) {
  const DeviceOf device(in.x, "x");
  const GatherCall call(in);
  check_launch(cuda::gather(call.args, device.stream()), "gather");
  return call.rows;
}

FOMOE_CUDA_OPS(m) {
  implement<&combine>(m);
  implement<&combine_backward>(m);
  implement<&gather>(m);
}

}  // namespace
}  // namespace fomoe::ops
