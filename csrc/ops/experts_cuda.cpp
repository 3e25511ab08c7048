// The grouped expert GEMMs as torch ops on CUDA. Values in device memory are not checked.
#include "experts_cuda.h"

#include <tuple>

namespace fomoe::ops {
namespace {

// Public results have no undefined rows.
void zero_tail(const Tensor& rows, const Tensor& offsets, const DeviceOf& device) {
  const int64_t row_bytes = rows.size(1) * int64_t(rows.element_size());
  check_launch(cuda::zero_tail(rows.mutable_data_ptr(), row_bytes, rows.size(0),
                               pointer<int32_t>(offsets) + offsets.size(0) - 1, device.stream()),
               "zero_tail");
}

std::tuple<Tensor, Tensor> expand(const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const Tensor& token_of_row,
                                  const Tensor& row_of_slot, const Tensor& offsets,
                                  const Tensor& tiles, int64_t activation, bool save_preact) {
  const DeviceOf device(x, "x");
  const ExpandCall call(x, weight, bias, token_of_row, row_of_slot, offsets, tiles, activation,
                        save_preact);
  require_schedule(tiles, call.args.slots, call.args.residents);
  require_chunks(x, "x", "hidden size", call.args.hidden);
  require_chunks(weight, "expand_weight", "expert size", call.args.expert_size);
  check_launch(cuda::expand(call.args, device.stream()), "expand");
  zero_tail(call.act, offsets, device);
  if (save_preact) zero_tail(call.preact, offsets, device);
  return {call.act, call.preact};
}

Tensor contract(const Tensor& act, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& offsets, const Tensor& tiles) {
  const DeviceOf device(act, "act");
  const ContractCall call(act, weight, bias, offsets, tiles);
  require_schedule(tiles, call.args.slots, call.args.residents);
  require_chunks(act, "act", "expert size", call.args.expert_size);
  require_chunks(weight, "contract_weight", "hidden size", call.args.hidden);
  check_launch(cuda::contract(call.args, device.stream()), "contract");
  zero_tail(call.rows, offsets, device);
  return call.rows;
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(
    const Tensor& grad_y, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& preact, const Tensor& weights, const Tensor& token_of_row,
    const Tensor& slot_of_row, const Tensor& offsets, const Tensor& tiles, int64_t activation) {
  const DeviceOf device(grad_y, "grad_y");
  ContractBackwardCall call(grad_y, weight, bias, preact, weights, token_of_row, slot_of_row,
                            offsets, tiles, activation);
  require_schedule(tiles, call.args.slots, call.args.residents);
  require_chunks(grad_y, "grad_y", "hidden size", call.args.hidden);
  require_chunks(weight, "contract_weight", "expert size", call.args.expert_size);
  require_chunks(preact, "preact", "expert size", call.args.expert_size);
  const Tensor workspace = empty(weights, {cuda::contract_backward_workspace(call.args)});
  call.args.workspace = mutable_pointer<float>(workspace);
  check_launch(cuda::contract_backward(call.args, device.stream()), "contract_backward");
  return {call.grad_preact, call.scaled_act, call.grad_weights};
}

Tensor grouped_rows(const Tensor& rows_in, const Tensor& weight, const Tensor& offsets,
                    const Tensor& tiles) {
  const DeviceOf device(rows_in, "rows");
  const GroupedRowsCall call(rows_in, weight, offsets, tiles);
  require_schedule(tiles, call.args.slots, call.args.residents);
  require_chunks(rows_in, "rows", "width", call.args.in);
  require_chunks(weight, "weight", "width", call.args.out);
  check_launch(cuda::grouped_rows(call.args, device.stream()), "grouped_rows");
  return call.rows_out;
}

void run_weight_grad(const WeightGradCall& call, const Tensor& left, const Tensor& right,
                     const DeviceOf& device) {
  require(call.args.residents <= kMaxResidents, "offsets: have ", call.args.residents,
          " residents, wanted at most ", kMaxResidents, " on CUDA");
  require_chunks(left, "left", "width", call.args.left_size);
  require_chunks(right, "right", "width", call.args.right_size);
  require_chunks(call.grad, "total", "width", call.args.right_size);
  check_launch(cuda::weight_grad(call.args, device.stream()), "weight_grad");
}

Tensor weight_grad(const Tensor& left, const Tensor& right, const std::optional<Tensor>& left_index,
                   const std::optional<Tensor>& right_index, const Tensor& offsets) {
  const DeviceOf device(left, "left");
  const WeightGradCall call(left, right, left_index, right_index, offsets);
  run_weight_grad(call, left, right, device);
  return call.grad;
}

void weight_grad_add(const Tensor& total, const Tensor& left, const Tensor& right,
                     const std::optional<Tensor>& left_index,
                     const std::optional<Tensor>& right_index, const Tensor& offsets) {
  const DeviceOf device(left, "left");
  run_weight_grad(WeightGradCall(left, right, left_index, right_index, offsets, total), left, right,
                  device);
}

Tensor bias_grad(const Tensor& rows, const std::optional<Tensor>& index,
                 const std::optional<Tensor>& weights, const std::optional<Tensor>& slot_of_row,
                 const Tensor& offsets) {
  const DeviceOf device(rows, "rows");
  const BiasGradCall call(rows, index, weights, slot_of_row, offsets);
  check_launch(cuda::bias_grad(call.args, device.stream()), "bias_grad");
  return call.grad;
}

Tensor activation_backward(const Tensor& grad_act, const Tensor& preact, const Tensor& offsets,
                           int64_t activation) {
  const DeviceOf device(grad_act, "grad_act");
  const ActivationBackwardCall call(grad_act, preact, offsets, activation);
  check_launch(cuda::activation_backward(call.args, device.stream()), "activation_backward");
  return call.grad_preact;
}

FOMOE_CUDA_OPS(m) {
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("contract_backward", TORCH_BOX(&contract_backward));
  m.impl("grouped_rows", TORCH_BOX(&grouped_rows));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
  m.impl("weight_grad_add", TORCH_BOX(&weight_grad_add));
  m.impl("bias_grad", TORCH_BOX(&bias_grad));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace
}  // namespace fomoe::ops
