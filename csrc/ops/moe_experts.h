// What the CPU and the CUDA op of moe_experts and its backward check alike, and the arguments of the
// kernels that each is a sequence of. Temporaries, `void*` here, are the device's own business.
#pragma once

#include "experts.h"

namespace fomoe::ops {

// The arguments that forward and backward share, checked but for values, and the sizes they give.
struct MoeCall {
  MoeCall(const Tensor& x, const Tensor& weights, const Tensor& token_of_row,
          const Tensor& slot_of_row, const Tensor& row_of_slot, const Tensor& offsets,
          const Tensor& tiles, const Tensor& expand_weight,
          const std::optional<Tensor>& expand_bias, const Tensor& contract_weight,
          const std::optional<Tensor>& contract_bias, int64_t activation_id)
      : activation(as_activation(activation_id)) {
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    tokens = x.size(0), hidden = x.size(1);
    expert_size = check_expand_weight(expand_weight, x, activation);
    residents = int32_t(expand_weight.size(0)), slots = slots_of(token_of_row, "token_of_row");
    check(contract_weight, "contract_weight").same_device(x, "x").same_dtype(x, "x");
    check(contract_weight, "contract_weight").shape({residents, hidden, expert_size}).contiguous();
    check_bias(expand_bias, "expand_bias", residents, preact_width(), x, "x");
    check_bias(contract_bias, "contract_bias", residents, hidden, x, "x");
    check(weights, "weights").same_device(x, "x").dtype(ScalarType::Float);
    check(weights, "weights").shape({tokens, kAny}).contiguous();
    top_k = as_int32(weights.size(1), "top_k");
    require(slots == tokens * top_k, "token_of_row: has ", slots,
            " rows, wanted tokens * top_k = ", tokens * top_k);
    check_offsets(offsets, residents, x, "x");
    check_table(token_of_row, "token_of_row", {slots}, x, "x");
    check_table(slot_of_row, "slot_of_row", {slots}, x, "x");
    check_table(row_of_slot, "row_of_slot", {tokens, top_k}, x, "x");
    check_tiles(tiles, x, "x");
    dtype = dtype_of(x, "x");
    element = int64_t(x.element_size());
    at_x = x.const_data_ptr(), at_weights = pointer<float>(weights);
    at_token_of_row = pointer<int32_t>(token_of_row);
    at_slot_of_row = pointer<int32_t>(slot_of_row);
    at_row_of_slot = pointer<int32_t>(row_of_slot);
    at_offsets = pointer<int32_t>(offsets), at_tiles = pointer<int32_t>(tiles);
    at_expand_weight = expand_weight.const_data_ptr(), at_expand_bias = data_of(expand_bias);
    at_contract_weight = contract_weight.const_data_ptr();
    at_contract_bias = data_of(contract_bias);
  }

  int64_t preact_width() const { return gates(activation) * expert_size; }

  // preact may be null.
  ExpandArgs expand(void* act, void* preact) const {
    return {.x = at_x,
            .weight = at_expand_weight,
            .bias = at_expand_bias,
            .token_of_row = at_token_of_row,
            .offsets = at_offsets,
            .tiles = at_tiles,
            .dtype = dtype,
            .residents = residents,
            .tokens = tokens,
            .slots = slots,
            .hidden = hidden,
            .expert_size = expert_size,
            .activation = activation,
            .act = act,
            .preact = preact};
  }

  ContractArgs contract(const void* act, void* rows) const {
    return {.act = act,
            .weight = at_contract_weight,
            .bias = at_contract_bias,
            .offsets = at_offsets,
            .tiles = at_tiles,
            .dtype = dtype,
            .residents = residents,
            .slots = slots,
            .hidden = hidden,
            .expert_size = expert_size,
            .rows = rows};
  }

  // y [tokens, hidden] = sum of the rows in slot order, `weighted` or as they are.
  CombineArgs combine(const void* rows, bool weighted, const Tensor& y) const {
    return {.rows = rows,
            .weights = weighted ? at_weights : nullptr,
            .row_of_slot = at_row_of_slot,
            .dtype = dtype,
            .tokens = tokens,
            .hidden = hidden,
            .top_k = top_k,
            .y = y.mutable_data_ptr()};
  }

  Activation activation;
  DType dtype;
  int32_t top_k, residents;
  int64_t tokens, hidden, expert_size, slots, element;
  const void *at_x, *at_expand_weight, *at_expand_bias, *at_contract_weight, *at_contract_bias;
  const float* at_weights;
  const int32_t *at_token_of_row, *at_slot_of_row, *at_row_of_slot, *at_offsets, *at_tiles;
};

// A call of the backward: outputs allocated. A gradient that is not needed, or is added to a total
// [as its weight, fp32], has a first dimension of 0, as that of a bias that is not there.
struct MoeBackwardCall : MoeCall {
  MoeBackwardCall(const MoeCall& layer, const Tensor& x, const Tensor& weights,
                  const Tensor& grad_y, const Tensor& preact, bool need_x, bool need_expand,
                  bool need_contract, const std::optional<Tensor>& expand_total,
                  const std::optional<Tensor>& contract_total)
      : MoeCall(layer), need_x(need_x), need_expand(need_expand), need_contract(need_contract) {
    check(grad_y, "grad_y").same_device(x, "x").same_dtype(x, "x");
    check(grad_y, "grad_y").shape({tokens, hidden}).contiguous();
    check(preact, "preact").same_device(x, "x").same_dtype(x, "x");
    check(preact, "preact").shape({slots, preact_width()}).contiguous();
    at_grad_y = grad_y.const_data_ptr(), at_preact = preact.const_data_ptr();
    check_total(expand_total, "expand_total", {residents, preact_width(), hidden}, x);
    check_total(contract_total, "contract_total", {residents, hidden, expert_size}, x);
    add_expand = expand_total.has_value(), add_contract = contract_total.has_value();
    grad_x = empty(x, {need_x ? tokens : 0, hidden});
    grad_weights = empty(weights, {tokens, top_k});
    grad_expand = empty(x, {need_expand && !add_expand ? residents : 0, preact_width(), hidden});
    grad_contract = empty(x, {need_contract && !add_contract ? residents : 0, hidden, expert_size});
    grad_expand_bias = empty(x, {at_expand_bias ? residents : 0, preact_width()});
    grad_contract_bias = empty(x, {at_contract_bias ? residents : 0, hidden});
    at_grad_expand = (add_expand ? *expand_total : grad_expand).mutable_data_ptr();
    at_grad_contract = (add_contract ? *contract_total : grad_contract).mutable_data_ptr();
  }

  // The kernels in order; grad_preact [slots, preact_width] and scaled_act [slots, expert_size] are
  // temporaries of dtype. `workspace` is left null.
  ContractBackwardArgs contract_backward(void* grad_preact, void* scaled_act) const {
    return {.grad_y = at_grad_y,
            .weight = at_contract_weight,
            .bias = at_contract_bias,
            .preact = at_preact,
            .weights = at_weights,
            .token_of_row = at_token_of_row,
            .slot_of_row = at_slot_of_row,
            .offsets = at_offsets,
            .tiles = at_tiles,
            .dtype = dtype,
            .residents = residents,
            .tokens = tokens,
            .slots = slots,
            .hidden = hidden,
            .expert_size = expert_size,
            .activation = activation,
            .grad_preact = grad_preact,
            .scaled_act = scaled_act,
            .grad_weights = mutable_pointer<float>(grad_weights),
            .workspace = nullptr};
  }

  // Where need_contract.
  WeightGradArgs contract_weight_grad(const void* scaled_act) const {
    return {.left = at_grad_y,
            .right = scaled_act,
            .left_index = at_token_of_row,
            .right_index = nullptr,
            .offsets = at_offsets,
            .dtype = dtype,
            .residents = residents,
            .left_lines = tokens,
            .right_lines = slots,
            .left_size = hidden,
            .right_size = expert_size,
            .add = add_contract,
            .grad_weight = at_grad_contract};
  }

  // Where there is such a bias, at_contract_bias.
  BiasGradArgs contract_bias_grad() const {
    return {.in = at_grad_y,
            .index = at_token_of_row,
            .weights = at_weights,
            .slot_of_row = at_slot_of_row,
            .offsets = at_offsets,
            .dtype = dtype,
            .residents = residents,
            .width = hidden,
            .grad_bias = grad_contract_bias.mutable_data_ptr()};
  }

  // Where need_expand.
  WeightGradArgs expand_weight_grad(const void* grad_preact) const {
    return {.left = grad_preact,
            .right = at_x,
            .left_index = nullptr,
            .right_index = at_token_of_row,
            .offsets = at_offsets,
            .dtype = dtype,
            .residents = residents,
            .left_lines = slots,
            .right_lines = tokens,
            .left_size = preact_width(),
            .right_size = hidden,
            .add = add_expand,
            .grad_weight = at_grad_expand};
  }

  // Where there is such a bias, at_expand_bias.
  BiasGradArgs expand_bias_grad(const void* grad_preact) const {
    return {.in = grad_preact,
            .index = nullptr,
            .weights = nullptr,
            .slot_of_row = nullptr,
            .offsets = at_offsets,
            .dtype = dtype,
            .residents = residents,
            .width = preact_width(),
            .grad_bias = grad_expand_bias.mutable_data_ptr()};
  }

  // Where need_x: the rows whose sums `combine(rows, false, grad_x)` is the gradient of x.
  GroupedRowsArgs grad_rows(const void* grad_preact, void* rows) const {
    return {.rows_in = grad_preact,
            .weight = at_expand_weight,
            .offsets = at_offsets,
            .tiles = at_tiles,
            .dtype = dtype,
            .residents = residents,
            .slots = slots,
            .in = preact_width(),
            .out = hidden,
            .rows_out = rows};
  }

  bool need_x, need_expand, need_contract, add_expand, add_contract;
  Tensor grad_x, grad_weights, grad_expand, grad_expand_bias, grad_contract, grad_contract_bias;

 private:
  static void check_total(const std::optional<Tensor>& total, const char* name,
                          std::initializer_list<int64_t> shape, const Tensor& x) {
    if (!total) return;
    check(*total, name).same_device(x, "x").dtype(ScalarType::Float).shape(shape).contiguous();
  }

  const void *at_grad_y, *at_preact;
  void *at_grad_expand, *at_grad_contract;
};

}  // namespace fomoe::ops
