// Of moe_experts and its backward on CPU and CUDA: inputs, their checks, and the arguments of the
// kernels that each of them runs. moe_experts_passes.h runs them, and allocates what they write.
#pragma once

#include "experts.h"

namespace fomoe::ops {

struct MoeExpertsInputs : Inputs<schemas::moe_experts> {
  using Inputs::Inputs;
  const Tensor& x = take<"x">();
  const Tensor& weights = take<"weights">();
  const Tensor& token_of_row = take<"token_of_row">();
  const Tensor& slot_of_row = take<"slot_of_row">();
  const Tensor& row_of_slot = take<"row_of_slot">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
  const Tensor& expand_weight = take<"expand_weight">();
  const std::optional<Tensor>& expand_bias = take<"expand_bias">();
  const Tensor& contract_weight = take<"contract_weight">();
  const std::optional<Tensor>& contract_bias = take<"contract_bias">();
  const int64_t activation = take<"activation">();
  const bool save_preact = take<"save_preact">();
};

struct MoeExpertsBackwardInputs : Inputs<schemas::moe_experts_backward> {
  using Inputs::Inputs;
  const Tensor& grad_y = take<"grad_y">();
  const Tensor& x = take<"x">();
  const Tensor& weights = take<"weights">();
  const Tensor& token_of_row = take<"token_of_row">();
  const Tensor& slot_of_row = take<"slot_of_row">();
  const Tensor& row_of_slot = take<"row_of_slot">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
  const Tensor& expand_weight = take<"expand_weight">();
  const std::optional<Tensor>& expand_bias = take<"expand_bias">();
  const Tensor& contract_weight = take<"contract_weight">();
  const std::optional<Tensor>& contract_bias = take<"contract_bias">();
  const Tensor& preact = take<"preact">();
  const int64_t activation = take<"activation">();
  const bool need_x = take<"need_x">();
  const bool need_expand = take<"need_expand">();
  const bool need_contract = take<"need_contract">();
  const std::optional<Tensor>& expand_total = take<"expand_total">();
  const std::optional<Tensor>& contract_total = take<"contract_total">();
  const std::optional<Tensor>& preact_to_free = take<"preact_to_free">();
};

// What forward and backward share: their common inputs, checked except for values, and sizes.
struct MoeCall {
  template <class Given>  // MoeExpertsInputs or MoeExpertsBackwardInputs
  explicit MoeCall(const Given& in) : activation(as_activation(in.activation)) {
    const Tensor &x = in.x, &weights = in.weights;
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    tokens = x.size(0), hidden = x.size(1);
    intermediate_size = check_expand_weight(in.expand_weight, x, activation);
    residents = int32_t(in.expand_weight.size(0));
    slots = slots_of(in.token_of_row, "token_of_row");
    check(in.contract_weight, "contract_weight").same_device(x, "x").same_dtype(x, "x");
    check(in.contract_weight, "contract_weight")
        .shape({residents, hidden, intermediate_size})
        .contiguous();
    check_bias(in.expand_bias, "expand_bias", residents, preact_width(), x, "x");
    check_bias(in.contract_bias, "contract_bias", residents, hidden, x, "x");
    check(weights, "weights").same_device(x, "x").dtype(ScalarType::Float);
    check(weights, "weights").shape({tokens, kAny}).contiguous();
    top_k = as_int32(weights.size(1), "weights.shape[1] (top_k)");
    require(slots == tokens * top_k, "token_of_row must have tokens * top_k = ", tokens * top_k,
            " entries, got ", slots);
    check_offsets(in.offsets, residents, x, "x");
    check_table(in.token_of_row, "token_of_row", {slots}, x, "x");
    check_table(in.slot_of_row, "slot_of_row", {slots}, x, "x");
    check_table(in.row_of_slot, "row_of_slot", {tokens, top_k}, x, "x");
    check_tiles(in.tiles, x, "x");
    dtype = dtype_of(x, "x");
    element = int64_t(x.element_size());
    at_x = x.const_data_ptr(), at_weights = pointer<float>(weights);
    at_token_of_row = pointer<int32_t>(in.token_of_row);
    at_slot_of_row = pointer<int32_t>(in.slot_of_row);
    at_row_of_slot = pointer<int32_t>(in.row_of_slot);
    at_offsets = pointer<int32_t>(in.offsets), at_tiles = pointer<int32_t>(in.tiles);
    at_expand_weight = in.expand_weight.const_data_ptr(), at_expand_bias = data_of(in.expand_bias);
    at_contract_weight = in.contract_weight.const_data_ptr();
    at_contract_bias = data_of(in.contract_bias);
  }

  int64_t preact_width() const { return gates(activation) * intermediate_size; }

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
            .intermediate_size = intermediate_size,
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
            .intermediate_size = intermediate_size,
            .rows = rows};
  }

  // y [tokens, hidden] = sum of each token's rows in slot order, times their weights if `weighted`.
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
  int64_t tokens, hidden, intermediate_size, slots, element;
  const void *at_x, *at_expand_weight, *at_expand_bias, *at_contract_weight, *at_contract_bias;
  const float* at_weights;
  const int32_t *at_token_of_row, *at_slot_of_row, *at_row_of_slot, *at_offsets, *at_tiles;
};

// A call of the backward. A gradient has shape[0] = 0 where it is not needed, where it is added to a
// total (fp32, of the weight's shape), and where there is no such bias.
struct MoeBackwardCall : MoeCall {
  explicit MoeBackwardCall(const MoeExpertsBackwardInputs& in) : MoeCall(in), in(in) {
    const Tensor &x = in.x, &grad_y = in.grad_y, &preact = in.preact;
    check(grad_y, "grad_y").same_device(x, "x").same_dtype(x, "x");
    check(grad_y, "grad_y").shape({tokens, hidden}).contiguous();
    check(preact, "preact").same_device(x, "x").same_dtype(x, "x");
    check(preact, "preact").shape({slots, preact_width()}).contiguous();
    check_total(in.expand_total, "expand_total", {residents, preact_width(), hidden}, x);
    check_total(in.contract_total, "contract_total", {residents, hidden, intermediate_size}, x);
    if (in.preact_to_free) {
      check(*in.preact_to_free, "preact_to_free").same_device(x, "x").same_dtype(x, "x");
      check(*in.preact_to_free, "preact_to_free").shape({slots, preact_width()}).contiguous();
      require(in.preact_to_free->const_data_ptr() == preact.const_data_ptr(),
              "preact_to_free must be preact, got a tensor elsewhere in memory");
    }
    at_grad_y = grad_y.const_data_ptr(), at_preact = preact.const_data_ptr();
  }

  // Gradients, allocated by whoever is about to fill them in.
  Tensor new_grad_x() const { return empty(in.x, {in.need_x ? tokens : 0, hidden}); }
  Tensor new_grad_weights() const { return empty(in.weights, {tokens, top_k}); }
  Tensor new_grad_expand() const {
    return empty(in.x, {makes_expand() ? residents : 0, preact_width(), hidden});
  }
  Tensor new_grad_contract() const {
    return empty(in.x, {makes_contract() ? residents : 0, hidden, intermediate_size});
  }
  Tensor new_grad_expand_bias() const {
    return empty(in.x, {at_expand_bias ? residents : 0, preact_width()});
  }
  Tensor new_grad_contract_bias() const {
    return empty(in.x, {at_contract_bias ? residents : 0, hidden});
  }
  bool makes_expand() const { return in.need_expand && !in.expand_total; }
  bool makes_contract() const { return in.need_contract && !in.contract_total; }

  // grad_preact [slots, preact_width], which may be preact itself, and scaled_act
  // [slots, intermediate_size] are temporaries of dtype; the caller sets `workspace`.
  ContractBackwardArgs contract_backward(void* grad_preact, void* scaled_act,
                                         const Tensor& grad_weights) const {
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
            .intermediate_size = intermediate_size,
            .activation = activation,
            .grad_preact = grad_preact,
            .scaled_act = scaled_act,
            .grad_weights = mutable_pointer<float>(grad_weights),
            .workspace = nullptr};
  }

  // Where need_contract.
  WeightGradArgs contract_weight_grad(const void* scaled_act, const Tensor& grad_contract) const {
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
            .right_size = intermediate_size,
            .add = in.contract_total.has_value(),
            .grad_weight = in.contract_total.value_or(grad_contract).mutable_data_ptr()};
  }

  // Where at_contract_bias is not null.
  BiasGradArgs contract_bias_grad(const Tensor& grad_contract_bias) const {
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
  WeightGradArgs expand_weight_grad(const void* grad_preact, const Tensor& grad_expand) const {
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
            .add = in.expand_total.has_value(),
            .grad_weight = in.expand_total.value_or(grad_expand).mutable_data_ptr()};
  }

  // Where at_expand_bias is not null.
  BiasGradArgs expand_bias_grad(const void* grad_preact, const Tensor& grad_expand_bias) const {
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

  // Where need_x. The gradient of x is the sum of these rows per token, `combine(rows, false, grad_x)`.
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

  const MoeExpertsBackwardInputs& in;

 private:
  static void check_total(const std::optional<Tensor>& total, const char* name,
                          std::initializer_list<int64_t> shape, const Tensor& x) {
    if (!total) return;
    check(*total, name).same_device(x, "x").dtype(ScalarType::Float).shape(shape).contiguous();
  }

  const void *at_grad_y, *at_preact;
};

}  // namespace fomoe::ops
