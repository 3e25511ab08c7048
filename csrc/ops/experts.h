// Of the grouped GEMMs on CPU and CUDA: inputs, their checks, and the arguments of the kernels.
//
// Each <Verb>Call checks shapes, dtypes, devices and layouts, allocates the outputs and fills in the
// kernel's arguments. It reads no value of a tensor and leaves workspaces to the op of the device.
#pragma once

#include "inputs.h"

namespace fomoe::ops {

// ---- checks ----------------------------------------------------------------------------------------

inline int64_t gates(Activation activation) { return is_gated(activation) ? 2 : 1; }

// An int32 table of row, slot or token numbers, on the device of `like`.
inline void check_table(const Tensor& table, const char* name, std::initializer_list<int64_t> shape,
                        const Tensor& like, const char* like_name) {
  check(table, name).same_device(like, like_name).dtype(ScalarType::Int).shape(shape).contiguous();
}

// The number of slots, from a list with an entry for each.
inline int64_t slots_of(const Tensor& index, const char* name) {
  check(index, name).shape({kAny});
  const int64_t slots = index.size(0), most = std::numeric_limits<int32_t>::max();
  require(slots <= most, name, ".shape[0] must be in 0 .. ", most, ", got ", slots);
  return slots;
}

// R, from offsets [R + 1].
inline int32_t residents_of(const Tensor& offsets) {
  check(offsets, "offsets").shape({kAny});
  require(offsets.size(0) >= 1, "offsets must have residents + 1 entries, got none");
  return as_int32(offsets.size(0) - 1, "offsets (number of residents)", 0);
}

inline void check_offsets(const Tensor& offsets, int64_t residents, const Tensor& like,
                          const char* like_name) {
  check_table(offsets, "offsets", {residents + 1}, like, like_name);
}

// The tile schedule of compact, of any length here: only the CUDA kernels read it.
inline void check_tiles(const Tensor& tiles, const Tensor& like, const char* like_name) {
  check_table(tiles, "tiles", {kAny, 2}, like, like_name);
}

// A bias with a line per resident, or none.
inline void check_bias(const std::optional<Tensor>& bias, const char* name, int64_t residents,
                       int64_t width, const Tensor& like, const char* like_name) {
  if (!bias) return;
  check(*bias, name).same_device(like, like_name).same_dtype(like, like_name);
  check(*bias, name).shape({residents, width}).contiguous();
}

inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// N, from the expand weight [R, G*N, D], which is checked against x [*, D].
inline int64_t check_expand_weight(const Tensor& weight, const Tensor& x, Activation activation) {
  check(weight, "expand_weight").same_device(x, "x").same_dtype(x, "x");
  check(weight, "expand_weight").shape({kAny, kAny, x.size(1)}).contiguous();
  as_int32(weight.size(0), "expand_weight.shape[0] (residents)", 0);
  require(weight.size(1) % gates(activation) == 0, "expand_weight must have an even shape[1] for ",
          kActivationNames[int32_t(activation)], ", which is gated, got shape ",
          shape_name(weight.sizes()));
  return weight.size(1) / gates(activation);
}

// ---- calls -----------------------------------------------------------------------------------------

struct ExpandInputs : Inputs<schemas::expand> {
  using Inputs::Inputs;
  const Tensor& x = take<"x">();
  const Tensor& expand_weight = take<"expand_weight">();
  const std::optional<Tensor>& expand_bias = take<"expand_bias">();
  const Tensor& token_of_row = take<"token_of_row">();
  const Tensor& row_of_slot = take<"row_of_slot">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
  const int64_t activation = take<"activation">();
  const bool save_preact = take<"save_preact">();
};

struct ExpandCall {
  explicit ExpandCall(const ExpandInputs& in) {
    const Tensor &x = in.x, &weight = in.expand_weight, &row_of_slot = in.row_of_slot;
    const Activation activation = as_activation(in.activation);
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t intermediate_size = check_expand_weight(weight, x, activation);
    const int64_t residents = weight.size(0), slots = slots_of(in.token_of_row, "token_of_row");
    check_bias(in.expand_bias, "expand_bias", residents, weight.size(1), x, "x");
    check_table(in.token_of_row, "token_of_row", {slots}, x, "x");
    check_table(row_of_slot, "row_of_slot", {x.size(0), kAny}, x, "x");
    require(row_of_slot.numel() == slots, "row_of_slot must have an entry for each of ", slots,
            " slots, got shape ", shape_name(row_of_slot.sizes()));
    check_offsets(in.offsets, residents, x, "x");
    check_tiles(in.tiles, x, "x");
    act = empty(x, {slots, intermediate_size});
    preact = empty(x, {in.save_preact ? slots : 0, weight.size(1)});
    args = {.x = x.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(in.expand_bias),
            .token_of_row = pointer<int32_t>(in.token_of_row),
            .offsets = pointer<int32_t>(in.offsets),
            .tiles = pointer<int32_t>(in.tiles),
            .dtype = dtype_of(x, "x"),
            .residents = int32_t(residents),
            .tokens = x.size(0),
            .slots = slots,
            .hidden = x.size(1),
            .intermediate_size = intermediate_size,
            .activation = activation,
            .act = act.mutable_data_ptr(),
            .preact = in.save_preact ? preact.mutable_data_ptr() : nullptr};
  }

  ExpandArgs args;
  Tensor act, preact;
};

struct ContractInputs : Inputs<schemas::contract> {
  using Inputs::Inputs;
  const Tensor& act = take<"act">();
  const Tensor& contract_weight = take<"contract_weight">();
  const std::optional<Tensor>& contract_bias = take<"contract_bias">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
};

struct ContractCall {
  explicit ContractCall(const ContractInputs& in) {
    const Tensor &act = in.act, &weight = in.contract_weight;
    check(act, "act").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(weight, "contract_weight").same_device(act, "act").same_dtype(act, "act");
    check(weight, "contract_weight").shape({kAny, kAny, act.size(1)}).contiguous();
    check_bias(in.contract_bias, "contract_bias", weight.size(0), weight.size(1), act, "act");
    check_offsets(in.offsets, weight.size(0), act, "act");
    check_tiles(in.tiles, act, "act");
    rows = empty(act, {act.size(0), weight.size(1)});
    args = {.act = act.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(in.contract_bias),
            .offsets = pointer<int32_t>(in.offsets),
            .tiles = pointer<int32_t>(in.tiles),
            .dtype = dtype_of(act, "act"),
            .residents = as_int32(weight.size(0), "contract_weight.shape[0] (residents)", 0),
            .slots = as_int32(act.size(0), "act.shape[0] (slots)", 0),
            .hidden = weight.size(1),
            .intermediate_size = act.size(1),
            .rows = rows.mutable_data_ptr()};
  }

  ContractArgs args;
  Tensor rows;
};

struct ContractBackwardInputs : Inputs<schemas::contract_backward> {
  using Inputs::Inputs;
  const Tensor& grad_y = take<"grad_y">();
  const Tensor& contract_weight = take<"contract_weight">();
  const std::optional<Tensor>& contract_bias = take<"contract_bias">();
  const Tensor& preact = take<"preact">();
  const Tensor& weights = take<"weights">();
  const Tensor& token_of_row = take<"token_of_row">();
  const Tensor& slot_of_row = take<"slot_of_row">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
  const int64_t activation = take<"activation">();
};

struct ContractBackwardCall {
  explicit ContractBackwardCall(const ContractBackwardInputs& in) {
    const Tensor &grad_y = in.grad_y, &weight = in.contract_weight, &preact = in.preact;
    const Tensor& weights = in.weights;
    const Activation activation = as_activation(in.activation);
    check(grad_y, "grad_y").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t tokens = grad_y.size(0), hidden = grad_y.size(1);
    const int64_t slots = slots_of(in.token_of_row, "token_of_row");
    check(weight, "contract_weight").same_device(grad_y, "grad_y").same_dtype(grad_y, "grad_y");
    check(weight, "contract_weight").shape({kAny, hidden, kAny}).contiguous();
    const int64_t residents = weight.size(0), intermediate_size = weight.size(2);
    check_bias(in.contract_bias, "contract_bias", residents, hidden, grad_y, "grad_y");
    check(preact, "preact").same_device(grad_y, "grad_y").same_dtype(grad_y, "grad_y");
    check(preact, "preact").shape({slots, gates(activation) * intermediate_size}).contiguous();
    check(weights, "weights").same_device(grad_y, "grad_y").dtype(ScalarType::Float);
    check(weights, "weights").shape({tokens, kAny}).contiguous();
    require(weights.numel() == slots, "weights must have a weight for each of ", slots,
            " slots, got shape ", shape_name(weights.sizes()));
    check_table(in.token_of_row, "token_of_row", {slots}, grad_y, "grad_y");
    check_table(in.slot_of_row, "slot_of_row", {slots}, grad_y, "grad_y");
    check_offsets(in.offsets, residents, grad_y, "grad_y");
    check_tiles(in.tiles, grad_y, "grad_y");
    grad_preact = empty(grad_y, {slots, preact.size(1)});
    scaled_act = empty(grad_y, {slots, intermediate_size});
    grad_weights = empty(weights, {tokens, weights.size(1)});
    args = {.grad_y = grad_y.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(in.contract_bias),
            .preact = preact.const_data_ptr(),
            .weights = pointer<float>(weights),
            .token_of_row = pointer<int32_t>(in.token_of_row),
            .slot_of_row = pointer<int32_t>(in.slot_of_row),
            .offsets = pointer<int32_t>(in.offsets),
            .tiles = pointer<int32_t>(in.tiles),
            .dtype = dtype_of(grad_y, "grad_y"),
            .residents = as_int32(residents, "contract_weight.shape[0] (residents)", 0),
            .tokens = tokens,
            .slots = slots,
            .hidden = hidden,
            .intermediate_size = intermediate_size,
            .activation = activation,
            .grad_preact = grad_preact.mutable_data_ptr(),
            .scaled_act = scaled_act.mutable_data_ptr(),
            .grad_weights = mutable_pointer<float>(grad_weights),
            .workspace = nullptr};
  }

  ContractBackwardArgs args;
  Tensor grad_preact, scaled_act, grad_weights;
};

struct GroupedRowsInputs : Inputs<schemas::grouped_rows> {
  using Inputs::Inputs;
  const Tensor& rows = take<"rows">();
  const Tensor& weight = take<"weight">();
  const Tensor& offsets = take<"offsets">();
  const Tensor& tiles = take<"tiles">();
};

struct GroupedRowsCall {
  explicit GroupedRowsCall(const GroupedRowsInputs& in) {
    const Tensor &rows_in = in.rows, &weight = in.weight;
    check(rows_in, "rows").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(weight, "weight").same_device(rows_in, "rows").same_dtype(rows_in, "rows");
    check(weight, "weight").shape({kAny, rows_in.size(1), kAny}).contiguous();
    check_offsets(in.offsets, weight.size(0), rows_in, "rows");
    check_tiles(in.tiles, rows_in, "rows");
    rows_out = empty(rows_in, {rows_in.size(0), weight.size(2)});
    args = {.rows_in = rows_in.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .offsets = pointer<int32_t>(in.offsets),
            .tiles = pointer<int32_t>(in.tiles),
            .dtype = dtype_of(rows_in, "rows"),
            .residents = as_int32(weight.size(0), "weight.shape[0] (residents)", 0),
            .slots = as_int32(rows_in.size(0), "rows.shape[0] (slots)", 0),
            .in = rows_in.size(1),
            .out = weight.size(2),
            .rows_out = rows_out.mutable_data_ptr()};
  }

  GroupedRowsArgs args;
  Tensor rows_out;
};

struct WeightGradInputs : Inputs<schemas::weight_grad> {
  using Inputs::Inputs;
  const Tensor& left = take<"left">();
  const Tensor& right = take<"right">();
  const std::optional<Tensor>& left_index = take<"left_index">();
  const std::optional<Tensor>& right_index = take<"right_index">();
  const Tensor& offsets = take<"offsets">();
};

struct WeightGradAddInputs : Inputs<schemas::weight_grad_add> {
  using Inputs::Inputs;
  const Tensor& total = take<"total">();
  const Tensor& left = take<"left">();
  const Tensor& right = take<"right">();
  const std::optional<Tensor>& left_index = take<"left_index">();
  const std::optional<Tensor>& right_index = take<"right_index">();
  const Tensor& offsets = take<"offsets">();
};

// Of weight_grad, and with `total` [R, left_size, right_size] of weight_grad_add.
struct WeightGradCall {
  explicit WeightGradCall(const WeightGradInputs& in) : WeightGradCall(in, std::nullopt) {}
  explicit WeightGradCall(const WeightGradAddInputs& in) : WeightGradCall(in, in.total) {}

  WeightGradArgs args;
  int64_t slots;
  Tensor grad;

 private:
  template <class Given>
  WeightGradCall(const Given& in, const std::optional<Tensor>& total) {
    const Tensor &left = in.left, &right = in.right, &offsets = in.offsets;
    const std::optional<Tensor>&left_index = in.left_index, &right_index = in.right_index;
    check(left, "left").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(right, "right").same_device(left, "left").same_dtype(left, "left");
    check(right, "right").shape({kAny, kAny}).contiguous();
    const int32_t residents = residents_of(offsets);
    check_offsets(offsets, residents, left, "left");
    slots = left_index    ? slots_of(*left_index, "left_index")
            : right_index ? slots_of(*right_index, "right_index")
                          : left.size(0);
    if (left_index) check_table(*left_index, "left_index", {slots}, left, "left");
    if (right_index) check_table(*right_index, "right_index", {slots}, left, "left");
    if (total) {
      check(*total, "total").same_device(left, "left").dtype(ScalarType::Float);
      check(*total, "total").shape({residents, left.size(1), right.size(1)}).contiguous();
    }
    grad = total ? *total : empty(left, {residents, left.size(1), right.size(1)});
    args = {.left = left.const_data_ptr(),
            .right = right.const_data_ptr(),
            .left_index = pointer<int32_t>(left_index),
            .right_index = pointer<int32_t>(right_index),
            .offsets = pointer<int32_t>(offsets),
            .dtype = dtype_of(left, "left"),
            .residents = residents,
            .left_lines = left.size(0),
            .right_lines = right.size(0),
            .left_size = left.size(1),
            .right_size = right.size(1),
            .add = total.has_value(),
            .grad_weight = grad.mutable_data_ptr()};
  }
};

struct BiasGradInputs : Inputs<schemas::bias_grad> {
  using Inputs::Inputs;
  const Tensor& rows = take<"rows">();
  const std::optional<Tensor>& index = take<"index">();
  const std::optional<Tensor>& weights = take<"weights">();
  const std::optional<Tensor>& slot_of_row = take<"slot_of_row">();
  const Tensor& offsets = take<"offsets">();
};

struct BiasGradCall {
  explicit BiasGradCall(const BiasGradInputs& in) {
    const Tensor &rows = in.rows, &offsets = in.offsets;
    const std::optional<Tensor>&index = in.index, &weights = in.weights;
    const std::optional<Tensor>& slot_of_row = in.slot_of_row;
    check(rows, "rows").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int32_t residents = residents_of(offsets);
    check_offsets(offsets, residents, rows, "rows");
    slots = index         ? slots_of(*index, "index")
            : slot_of_row ? slots_of(*slot_of_row, "slot_of_row")
                          : rows.size(0);
    if (index) check_table(*index, "index", {slots}, rows, "rows");
    require(weights.has_value() == slot_of_row.has_value(),
            "slot_of_row must be given with weights, got only ",
            slot_of_row ? "slot_of_row" : "weights");
    if (weights) {
      check(*weights, "weights").same_device(rows, "rows").dtype(ScalarType::Float).contiguous();
      require(weights->numel() == slots, "weights must have a weight for each of ", slots,
              " slots, got shape ", shape_name(weights->sizes()));
      check_table(*slot_of_row, "slot_of_row", {slots}, rows, "rows");
    }
    grad = empty(rows, {residents, rows.size(1)});
    args = {.in = rows.const_data_ptr(),
            .index = pointer<int32_t>(index),
            .weights = pointer<float>(weights),
            .slot_of_row = pointer<int32_t>(slot_of_row),
            .offsets = pointer<int32_t>(offsets),
            .dtype = dtype_of(rows, "rows"),
            .residents = residents,
            .width = rows.size(1),
            .grad_bias = grad.mutable_data_ptr()};
  }

  BiasGradArgs args;
  int64_t slots;
  Tensor grad;
};

struct ActivationBackwardInputs : Inputs<schemas::activation_backward> {
  using Inputs::Inputs;
  const Tensor& grad_act = take<"grad_act">();
  const Tensor& preact = take<"preact">();
  const Tensor& offsets = take<"offsets">();
  const int64_t activation = take<"activation">();
};

struct ActivationBackwardCall {
  explicit ActivationBackwardCall(const ActivationBackwardInputs& in) {
    const Tensor &grad_act = in.grad_act, &preact = in.preact, &offsets = in.offsets;
    const Activation activation = as_activation(in.activation);
    check(grad_act, "grad_act").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t slots = grad_act.size(0), intermediate_size = grad_act.size(1);
    check(preact, "preact").same_device(grad_act, "grad_act").same_dtype(grad_act, "grad_act");
    check(preact, "preact").shape({slots, gates(activation) * intermediate_size}).contiguous();
    const int32_t residents = residents_of(offsets);
    check_offsets(offsets, residents, grad_act, "grad_act");
    grad_preact = empty(grad_act, {slots, preact.size(1)});
    args = {.grad_act = grad_act.const_data_ptr(),
            .preact = preact.const_data_ptr(),
            .offsets = pointer<int32_t>(offsets),
            .dtype = dtype_of(grad_act, "grad_act"),
            .residents = residents,
            .slots = as_int32(slots, "grad_act.shape[0] (slots)", 0),
            .intermediate_size = intermediate_size,
            .activation = activation,
            .grad_preact = grad_preact.mutable_data_ptr()};
  }

  ActivationBackwardArgs args;
  Tensor grad_preact;
};

}  // namespace fomoe::ops
