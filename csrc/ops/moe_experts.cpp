// expand, contract and combine in one torch op on the CPU, and its backward: between them only the
// pre-activations are kept, and their temporaries are in memory that is used again.
#include "moe_experts.h"

#include <algorithm>
#include <tuple>

#include "../cpu/huge_pages.h"
#include "../cpu/workspace.h"
#include "experts_cpu.h"

namespace fomoe::ops {
namespace {

// Checks the values of the row tables and returns the number of rows.
int64_t check_values(const MoeCall& layer) {
  const int64_t rows = rows_of(layer.at_offsets, layer.residents, layer.slots);
  check_index(layer.at_token_of_row, "token_of_row", rows, layer.tokens);
  check_index(layer.at_slot_of_row, "slot_of_row", rows, layer.slots);
  check_rows(layer.at_row_of_slot, layer.slots, rows);
  return rows;
}

// Of a temporary with a line of `width` elements for every row that is computed.
int64_t bytes(const MoeCall& layer, int64_t rows, int64_t width) {
  return cpu::Workspace::padded(rows * width * layer.element);
}

void combine_into(const MoeCall& layer, const void* rows, bool weighted, const Tensor& y) {
  cpu::prefer_huge_pages(y.mutable_data_ptr(), layer.tokens * layer.hidden * layer.element);
  cpu::combine(layer.combine(rows, weighted, y));
}

// Rows of the second result past the last one computed are undefined.
std::tuple<Tensor, Tensor> moe_experts(const Tensor& x, const Tensor& weights,
                                       const Tensor& token_of_row, const Tensor& slot_of_row,
                                       const Tensor& row_of_slot, const Tensor& offsets,
                                       const Tensor& tiles, const Tensor& expand_weight,
                                       const std::optional<Tensor>& expand_bias,
                                       const Tensor& contract_weight,
                                       const std::optional<Tensor>& contract_bias,
                                       int64_t activation, bool save_preact) {
  check(x, "x").cpu();
  const MoeCall layer(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, tiles,
                      expand_weight, expand_bias, contract_weight, contract_bias, activation);
  const int64_t row_count = check_values(layer);
  Tensor preact = empty(x, {save_preact ? layer.slots : 0, layer.preact_width()});
  const int64_t act_bytes = bytes(layer, row_count, layer.expert_size);
  const int64_t row_bytes = bytes(layer, row_count, layer.hidden);
  cpu::Workspace workspace(act_bytes + row_bytes);
  void* act = workspace.take(act_bytes);
  void* rows = workspace.take(row_bytes);
  cpu::expand(layer.expand(act, save_preact ? preact.mutable_data_ptr() : nullptr));
  cpu::contract(layer.contract(act, rows));
  Tensor y = empty(x, {layer.tokens, layer.hidden});
  combine_into(layer, rows, true, y);
  return {y, preact};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weights, const Tensor& token_of_row,
    const Tensor& slot_of_row, const Tensor& row_of_slot, const Tensor& offsets,
    const Tensor& tiles, const Tensor& expand_weight, const std::optional<Tensor>& expand_bias,
    const Tensor& contract_weight, const std::optional<Tensor>& contract_bias, const Tensor& preact,
    int64_t activation, bool need_x, bool need_expand, bool need_contract,
    const std::optional<Tensor>& expand_total, const std::optional<Tensor>& contract_total) {
  check(x, "x").cpu();
  const MoeCall layer(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, tiles,
                      expand_weight, expand_bias, contract_weight, contract_bias, activation);
  const MoeBackwardCall call(layer, x, weights, grad_y, preact, need_x, need_expand, need_contract,
                             expand_total, contract_total);
  const int64_t rows = check_values(call);
  // The row gradients of x may take the place of the scaled activations, which are used before.
  const int64_t grad_bytes = bytes(call, rows, call.preact_width());
  const int64_t shared_bytes =
      std::max(bytes(call, rows, call.expert_size), bytes(call, rows, call.hidden));
  cpu::Workspace workspace(grad_bytes + shared_bytes);
  void* grad_preact = workspace.take(grad_bytes);
  void* scaled_act = workspace.take(shared_bytes);

  cpu::contract_backward(call.contract_backward(grad_preact, scaled_act));
  if (need_contract) cpu::weight_grad(call.contract_weight_grad(scaled_act));
  if (contract_bias) cpu::bias_grad(call.contract_bias_grad());
  if (need_expand) cpu::weight_grad(call.expand_weight_grad(grad_preact));
  if (expand_bias) cpu::bias_grad(call.expand_bias_grad(grad_preact));
  if (need_x) {
    void* grad_rows = scaled_act;
    cpu::grouped_rows(call.grad_rows(grad_preact, grad_rows));
    combine_into(call, grad_rows, false, call.grad_x);
  }
  return {call.grad_x,           call.grad_weights,  call.grad_expand,
          call.grad_expand_bias, call.grad_contract, call.grad_contract_bias};
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace
}  // namespace fomoe::ops
