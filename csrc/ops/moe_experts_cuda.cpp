// expand, contract and combine in one torch op on CUDA, and its backward: between them only the
// pre-activations are kept. Nothing waits for the device; values in its memory are not checked.
#include <tuple>

#include "experts_cuda.h"
#include "moe_experts.h"

namespace fomoe::ops {
namespace {

void require_readable(const MoeCall& call, const Tensor& x, const Tensor& tiles,
                      const Tensor& expand_weight, const Tensor& contract_weight) {
  require_schedule(tiles, call.slots, call.residents);
  require_chunks(x, "x", "hidden size", call.hidden);
  require_chunks(expand_weight, "expand_weight", "expert size", call.expert_size);
  require_chunks(contract_weight, "contract_weight", "expert size", call.expert_size);
}

std::tuple<Tensor, Tensor> moe_experts(const Tensor& x, const Tensor& weights,
                                       const Tensor& token_of_row, const Tensor& slot_of_row,
                                       const Tensor& row_of_slot, const Tensor& offsets,
                                       const Tensor& tiles, const Tensor& expand_weight,
                                       const std::optional<Tensor>& expand_bias,
                                       const Tensor& contract_weight,
                                       const std::optional<Tensor>& contract_bias,
                                       int64_t activation, bool save_preact) {
  const DeviceOf device(x, "x");
  const MoeCall call(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, tiles,
                     expand_weight, expand_bias, contract_weight, contract_bias, activation);
  require_readable(call, x, tiles, expand_weight, contract_weight);
  void* stream = device.stream();
  const Tensor preact = empty(x, {save_preact ? call.slots : 0, call.preact_width()});
  const Tensor act = empty(x, {call.slots, call.expert_size});
  const Tensor rows = empty(x, {call.slots, call.hidden});
  const Tensor y = empty(x, {call.tokens, call.hidden});
  check_launch(cuda::expand(call.expand(act.mutable_data_ptr(),
                                        save_preact ? preact.mutable_data_ptr() : nullptr),
                            stream),
               "expand");
  check_launch(cuda::contract(call.contract(act.const_data_ptr(), rows.mutable_data_ptr()), stream),
               "contract");
  check_launch(cuda::combine(call.combine(rows.const_data_ptr(), true, y), stream), "combine");
  return {y, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weights, const Tensor& token_of_row,
    const Tensor& slot_of_row, const Tensor& row_of_slot, const Tensor& offsets,
    const Tensor& tiles, const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
    const Tensor& contract_weight, const std::optional<Tensor>& contract_bias, const Tensor& preact,
    int64_t activation, bool need_x, bool need_expand, bool need_contract,
    const std::optional<Tensor>& expand_total, const std::optional<Tensor>& contract_total) {
  const DeviceOf device(x, "x");
  const MoeCall layer(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, tiles,
                      expand_weight, expand_bias, contract_weight, contract_bias, activation);
  require_readable(layer, x, tiles, expand_weight, contract_weight);
  require_chunks(grad_y, "grad_y", "hidden size", layer.hidden);
  require_chunks(preact, "preact", "expert size", layer.expert_size);
  if (expand_total) require_chunks(*expand_total, "expand_total", "hidden size", layer.hidden);
  if (contract_total)
    require_chunks(*contract_total, "contract_total", "expert size", layer.expert_size);
  const MoeBackwardCall call(layer, x, weights, grad_y, preact, need_x, need_expand, need_contract,
                             expand_total, contract_total);
  void* stream = device.stream();
  const Tensor grad_preact = empty(x, {call.slots, call.preact_width()});
  {
    const Tensor scaled_act = empty(x, {call.slots, call.expert_size});
    ContractBackwardArgs args =
        call.contract_backward(grad_preact.mutable_data_ptr(), scaled_act.mutable_data_ptr());
    const Tensor workspace = empty(weights, {cuda::contract_backward_workspace(args)});
    args.workspace = mutable_pointer<float>(workspace);
    check_launch(cuda::contract_backward(args, stream), "contract_backward");
    if (need_contract)
      check_launch(
          cuda::weight_grad(call.contract_weight_grad(scaled_act.const_data_ptr()), stream),
          "weight_grad");
  }
  if (call.at_contract_bias != nullptr)
    check_launch(cuda::bias_grad(call.contract_bias_grad(), stream), "bias_grad");
  if (need_expand)
    check_launch(cuda::weight_grad(call.expand_weight_grad(grad_preact.const_data_ptr()), stream),
                 "weight_grad");
  if (call.at_expand_bias != nullptr)
    check_launch(cuda::bias_grad(call.expand_bias_grad(grad_preact.const_data_ptr()), stream),
                 "bias_grad");
  if (need_x) {
    const Tensor rows = empty(x, {call.slots, call.hidden});
    check_launch(cuda::grouped_rows(
                     call.grad_rows(grad_preact.const_data_ptr(), rows.mutable_data_ptr()), stream),
                 "grouped_rows");
    check_launch(cuda::combine(call.combine(rows.const_data_ptr(), false, call.grad_x), stream),
                 "combine");
  }
  return {call.grad_x,           call.grad_weights,  call.grad_expand,
          call.grad_expand_bias, call.grad_contract, call.grad_contract_bias};
}

FOMOE_CUDA_OPS(m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace
}  // namespace fomoe::ops
