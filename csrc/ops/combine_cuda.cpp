// combine, its gradients and gather as torch ops on CUDA. Values in device memory are not checked.
#include "combine.h"

#include <tuple>

#include "cuda.h"

namespace fomoe::ops {
namespace {

Tensor combine(const Tensor& rows, const std::optional<Tensor>& weights,
               const Tensor& row_of_slot) {
  const DeviceOf device(row_of_slot, "row_of_slot");
  check_combine(rows, weights, row_of_slot);
  Tensor y = empty(rows, {row_of_slot.size(0), rows.size(1)});
  check_launch(cuda::combine(combine_args(rows, weights, row_of_slot, y), device.stream()),
               "combine");
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_y, const std::optional<Tensor>& rows,
                                            const Tensor& weights, const Tensor& row_of_slot) {
  const DeviceOf device(row_of_slot, "row_of_slot");
  CombineBackwardCall call(grad_y, rows, weights, row_of_slot);
  const Tensor row_count = empty(row_of_slot, {1});
  call.args.workspace = mutable_pointer<int32_t>(row_count);
  check_launch(cuda::combine_backward(call.args, device.stream()), "combine_backward");
  return {call.grad_rows, call.grad_weights};
}

Tensor gather(const Tensor& x, const Tensor& row_of_slot, const Tensor& offsets) {
  const DeviceOf device(x, "x");
  const GatherCall call(x, row_of_slot, offsets);
  check_launch(cuda::gather(call.args, device.stream()), "gather");
  return call.rows;
}

FOMOE_CUDA_OPS(m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
  m.impl("gather", TORCH_BOX(&gather));
}

}  // namespace
}  // namespace fomoe::ops
