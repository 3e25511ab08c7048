// expand, contract and combine in one torch op on the CPU, and its backward: between them only the
// pre-activations are kept, and their temporaries are in memory that is used again.
#include <algorithm>
#include <tuple>

#include "../cpu/huge_pages.h"
#include "../cpu/workspace.h"
#include "experts.h"

namespace fomoe::ops {
namespace {

// The arguments that forward and backward share, checked, and the sizes they give.
struct Layer {
  Layer(const Tensor& x, const Tensor& weights, const Tensor& token_of_row,
        const Tensor& slot_of_row, const Tensor& row_of_slot, const Tensor& offsets,
        const Tensor& expand_weight, const Tensor& contract_weight, int64_t activation_id)
      : activation(as_activation(activation_id)) {
    check(x, "x").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    tokens = x.size(0), hidden = x.size(1);
    expert_size = check_expand_weight(expand_weight, x, activation);
    residents = expand_weight.size(0), slots = token_of_row.size(0);
    check(contract_weight, "contract_weight").cpu().same_dtype(x, "x");
    check(contract_weight, "contract_weight").shape({residents, hidden, expert_size}).contiguous();
    check(weights, "weights").cpu().dtype(ScalarType::Float).shape({tokens, kAny}).contiguous();
    top_k = as_int32(weights.size(1), "top_k");
    require(slots == tokens * top_k, "token_of_row: has ", slots,
            " rows, wanted tokens * top_k = ", tokens * top_k);
    rows = check_offsets(offsets, residents, slots);
    check_index(token_of_row, "token_of_row", slots, rows, tokens);
    check_index(slot_of_row, "slot_of_row", slots, rows, slots);
    check_rows(row_of_slot, tokens, slots, rows);
    dtype = dtype_of(x, "x");
    element = int64_t(x.element_size());
  }

  int64_t preact_width() const { return gates(activation) * expert_size; }
  // Of a temporary with a line for every row that is computed.
  int64_t bytes(int64_t width) const { return cpu::Workspace::padded(rows * width * element); }

  Activation activation;
  DType dtype;
  int32_t top_k;
  int64_t tokens, hidden, expert_size, residents, slots, rows, element;
};

// y [tokens, hidden] = sum of the rows in slot order, weighted unless `weights` is null.
Tensor combined(const Layer& layer, const Tensor& like, const void* rows, const float* weights,
                const Tensor& row_of_slot) {
  Tensor y = empty(like, {layer.tokens, layer.hidden});
  cpu::prefer_huge_pages(y.mutable_data_ptr(), layer.tokens * layer.hidden * layer.element);
  cpu::combine({.rows = rows,
                .weights = weights,
                .row_of_slot = pointer<int32_t>(row_of_slot),
                .dtype = layer.dtype,
                .tokens = layer.tokens,
                .hidden = layer.hidden,
                .top_k = layer.top_k,
                .y = y.mutable_data_ptr()});
  return y;
}

// Rows of the second result past the last one computed are undefined.
std::tuple<Tensor, Tensor> moe_experts(const Tensor& x, const Tensor& weights,
                                       const Tensor& token_of_row, const Tensor& slot_of_row,
                                       const Tensor& row_of_slot, const Tensor& offsets,
                                       const Tensor& expand_weight, const Tensor& contract_weight,
                                       int64_t activation_id, bool save_preact) {
  const Layer layer(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, expand_weight,
                    contract_weight, activation_id);
  Tensor preact = empty(x, {save_preact ? layer.slots : 0, layer.preact_width()});
  const int64_t act_bytes = layer.bytes(layer.expert_size), row_bytes = layer.bytes(layer.hidden);
  cpu::Workspace workspace(act_bytes + row_bytes);
  void* act = workspace.take(act_bytes);
  void* rows = workspace.take(row_bytes);
  cpu::expand({.x = x.const_data_ptr(),
               .weight = expand_weight.const_data_ptr(),
               .token_of_row = pointer<int32_t>(token_of_row),
               .offsets = pointer<int32_t>(offsets),
               .dtype = layer.dtype,
               .residents = int32_t(layer.residents),
               .hidden = layer.hidden,
               .expert_size = layer.expert_size,
               .activation = layer.activation,
               .act = act,
               .preact = save_preact ? preact.mutable_data_ptr() : nullptr});
  cpu::contract({.act = act,
                 .weight = contract_weight.const_data_ptr(),
                 .offsets = pointer<int32_t>(offsets),
                 .dtype = layer.dtype,
                 .residents = int32_t(layer.residents),
                 .hidden = layer.hidden,
                 .expert_size = layer.expert_size,
                 .rows = rows});
  return {combined(layer, x, rows, pointer<float>(weights), row_of_slot), preact};
}

// Gradients of moe_experts to x, weights, expand_weight and contract_weight; one that is not
// needed has a first dimension of 0.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weights, const Tensor& token_of_row,
    const Tensor& slot_of_row, const Tensor& row_of_slot, const Tensor& offsets,
    const Tensor& expand_weight, const Tensor& contract_weight, const Tensor& preact,
    int64_t activation_id, bool need_x, bool need_expand, bool need_contract) {
  const Layer layer(x, weights, token_of_row, slot_of_row, row_of_slot, offsets, expand_weight,
                    contract_weight, activation_id);
  check(grad_y, "grad_y").cpu().same_dtype(x, "x").shape({layer.tokens, layer.hidden});
  check(grad_y, "grad_y").contiguous();
  check(preact, "preact").cpu().same_dtype(x, "x").shape({layer.slots, layer.preact_width()});
  check(preact, "preact").contiguous();
  const int32_t* at = pointer<int32_t>(offsets);
  const int32_t residents = int32_t(layer.residents);
  const int64_t width = layer.preact_width();
  // The row gradients of x may take the place of the scaled activations, which are used before.
  const int64_t grad_bytes = layer.bytes(width);
  const int64_t shared_bytes = std::max(layer.bytes(layer.expert_size), layer.bytes(layer.hidden));
  cpu::Workspace workspace(grad_bytes + shared_bytes);
  void* grad_preact = workspace.take(grad_bytes);
  void* scaled_act = workspace.take(shared_bytes);

  Tensor grad_weights = empty(weights, {layer.tokens, layer.top_k});
  cpu::contract_backward({.grad_y = grad_y.const_data_ptr(),
                          .weight = contract_weight.const_data_ptr(),
                          .preact = preact.const_data_ptr(),
                          .weights = pointer<float>(weights),
                          .token_of_row = pointer<int32_t>(token_of_row),
                          .slot_of_row = pointer<int32_t>(slot_of_row),
                          .offsets = at,
                          .dtype = layer.dtype,
                          .residents = residents,
                          .hidden = layer.hidden,
                          .expert_size = layer.expert_size,
                          .slots = layer.slots,
                          .activation = layer.activation,
                          .grad_preact = grad_preact,
                          .scaled_act = scaled_act,
                          .grad_weights = mutable_pointer<float>(grad_weights)});

  Tensor grad_contract =
      empty(x, {need_contract ? layer.residents : 0, layer.hidden, layer.expert_size});
  if (need_contract)
    cpu::weight_grad({.left = grad_y.const_data_ptr(),
                      .right = scaled_act,
                      .left_index = pointer<int32_t>(token_of_row),
                      .right_index = nullptr,
                      .offsets = at,
                      .dtype = layer.dtype,
                      .residents = residents,
                      .left_size = layer.hidden,
                      .right_size = layer.expert_size,
                      .grad_weight = grad_contract.mutable_data_ptr()});

  Tensor grad_expand = empty(x, {need_expand ? layer.residents : 0, width, layer.hidden});
  if (need_expand)
    cpu::weight_grad({.left = grad_preact,
                      .right = x.const_data_ptr(),
                      .left_index = nullptr,
                      .right_index = pointer<int32_t>(token_of_row),
                      .offsets = at,
                      .dtype = layer.dtype,
                      .residents = residents,
                      .left_size = width,
                      .right_size = layer.hidden,
                      .grad_weight = grad_expand.mutable_data_ptr()});

  if (!need_x) return {empty(x, {0, layer.hidden}), grad_weights, grad_expand, grad_contract};
  void* grad_rows = scaled_act;
  cpu::grouped_rows({.rows_in = grad_preact,
                     .weight = expand_weight.const_data_ptr(),
                     .offsets = at,
                     .dtype = layer.dtype,
                     .residents = residents,
                     .in = width,
                     .out = layer.hidden,
                     .rows_out = grad_rows});
  Tensor grad_x = combined(layer, x, grad_rows, nullptr, row_of_slot);
  return {grad_x, grad_weights, grad_expand, grad_contract};
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
}

}  // namespace
}  // namespace fomoe::ops
