// The grouped expert GEMMs as torch ops on CUDA. Values in device memory are not checked.
#include "experts_cuda.h"

#include <tuple>

namespace fomoe::ops {
namespace {

// Public results have no undefined rows. How many there are is known to the device only, so that this
// is launched whether or not slots were skipped: once for all of a verb's results.
void zero_tail(const Tensor& rows, const Tensor* others, const Tensor& offsets,
               const DeviceOf& device) {
  ZeroTailArgs args{.rows = {rows.mutable_data_ptr(), nullptr},
                    .row_bytes = {rows.size(1) * int64_t(rows.element_size()), 0},
                    .slots = rows.size(0),
                    .row_count = pointer<int32_t>(offsets) + offsets.size(0) - 1};
  if (others != nullptr) {
    args.rows[1] = others->mutable_data_ptr();
    args.row_bytes[1] = others->size(1) * int64_t(others->element_size());
  }
  check_launch(cuda::zero_tail(args, device.stream()), "zero_tail");
}

std::tuple<Tensor, Tensor> expand(const ExpandInputs& in) {
  const DeviceOf device(in.x, "x");
  const ExpandCall call(in);
  require_schedule(in.tiles, call.args.slots, call.args.residents);
  require_chunks(in.x, "x", "hidden size", call.args.hidden);
  require_chunks(in.expand_weight, "expand_weight", "intermediate size",
                 call.args.intermediate_size);
  check_launch(cuda::expand(call.args, device.stream()), "expand");
  zero_tail(call.act, in.save_preact ? &call.preact : nullptr, in.offsets, device);
  return {call.act, call.preact};
}

Tensor contract(const ContractInputs& in) {
  const DeviceOf device(in.act, "act");
  const ContractCall call(in);
  require_schedule(in.tiles, call.args.slots, call.args.residents);
  require_chunks(in.act, "act", "intermediate size", call.args.intermediate_size);
  require_chunks(in.contract_weight, "contract_weight", "hidden size", call.args.hidden);
  check_launch(cuda::contract(call.args, device.stream()), "contract");
  zero_tail(call.rows, nullptr, in.offsets, device);
  return call.rows;
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const ContractBackwardInputs& in) {
  const DeviceOf device(in.grad_y, "grad_y");
  ContractBackwardCall call(in);
  require_schedule(in.tiles, call.args.slots, call.args.residents);
  require_chunks(in.grad_y, "grad_y", "hidden size", call.args.hidden);
  require_chunks(in.contract_weight, "contract_weight", "intermediate size",
                 call.args.intermediate_size);
  require_chunks(in.preact, "preact", "intermediate size", call.args.intermediate_size);
  const Tensor workspace = empty(in.weights, {cuda::contract_backward_workspace(call.args)});
  call.args.workspace = mutable_pointer<float>(workspace);
  check_launch(cuda::contract_backward(call.args, device.stream()), "contract_backward");
  return {call.grad_preact, call.scaled_act, call.grad_weights};
}

Tensor grouped_rows(const GroupedRowsInputs& in) {
  const DeviceOf device(in.rows, "rows");
  const GroupedRowsCall call(in);
  require_schedule(in.tiles, call.args.slots, call.args.residents);
  require_chunks(in.rows, "rows", "width", call.args.in);
  require_chunks(in.weight, "weight", "width", call.args.out);
  check_launch(cuda::grouped_rows(call.args, device.stream()), "grouped_rows");
  return call.rows_out;
}

void run_weight_grad(const WeightGradCall& call, const Tensor& left, const Tensor& right,
                     const DeviceOf& device) {
  require_residents(call.args.residents);
  require_chunks(left, "left", "width", call.args.left_size);
  require_chunks(right, "right", "width", call.args.right_size);
  require_chunks(call.grad, "total", "width", call.args.right_size);
  check_launch(cuda::weight_grad(call.args, device.stream()), "weight_grad");
}

Tensor weight_grad(const WeightGradInputs& in) {
  const DeviceOf device(in.left, "left");
  const WeightGradCall call(in);
  run_weight_grad(call, in.left, in.right, device);
  return call.grad;
}

void weight_grad_add(const WeightGradAddInputs& in) {
  const DeviceOf device(in.left, "left");
  run_weight_grad(WeightGradCall(in), in.left, in.right, device);
}

Tensor bias_grad(const BiasGradInputs& in) {
  const DeviceOf device(in.rows, "rows");
  const BiasGradCall call(in);
  check_launch(cuda::bias_grad(call.args, device.stream()), "bias_grad");
  return call.grad;
}

Tensor activation_backward(const ActivationBackwardInputs& in) {
  const DeviceOf device(in.grad_act, "grad_act");
  const ActivationBackwardCall call(in);
  check_launch(cuda::activation_backward(call.args, device.stream()), "activation_backward");
  return call.grad_preact;
}

FOMOE_CUDA_OPS(m) {
  implement<&expand>(m);
  implement<&contract>(m);
  implement<&contract_backward>(m);
  implement<&grouped_rows>(m);
  implement<&weight_grad>(m);
  implement<&weight_grad_add>(m);
  implement<&bias_grad>(m);
  implement<&activation_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
