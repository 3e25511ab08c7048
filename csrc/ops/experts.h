// What the CPU and the CUDA ops of the grouped GEMMs check alike, and the arguments they hand on.
//
// Each <Verb>Call checks shapes, dtypes, devices and layouts, allocates the outputs and fills in the
// kernel's arguments. No value of a tensor is read, and workspaces are left to the device's own op.
#pragma once

#include "common.h"

namespace fomoe::ops {

// ---- checks ----------------------------------------------------------------------------------------

inline int64_t gates(Activation activation) { return is_gated(activation) ? 2 : 1; }

// A table of numbers of rows, slots or tokens, on the device of `like`.
inline void check_table(const Tensor& table, const char* name, std::initializer_list<int64_t> shape,
                        const Tensor& like, const char* like_name) {
  check(table, name).same_device(like, like_name).dtype(ScalarType::Int).shape(shape).contiguous();
}

// The slots of a list with an entry for each row.
inline int64_t slots_of(const Tensor& index, const char* name) {
  check(index, name).shape({kAny});
  return as_int32(index.size(0), name, 0);
}

// The resident experts of offsets [R + 1].
inline int32_t residents_of(const Tensor& offsets) {
  check(offsets, "offsets").shape({kAny});
  require(offsets.size(0) >= 1, "offsets: is empty, wanted residents + 1 entries");
  return as_int32(offsets.size(0) - 1, "offsets: number of residents", 0);
}

inline void check_offsets(const Tensor& offsets, int64_t residents, const Tensor& like,
                          const char* like_name) {
  check_table(offsets, "offsets", {residents + 1}, like, like_name);
}

// The schedule of compact, of whatever length: only the CUDA kernels follow it.
inline void check_tiles(const Tensor& tiles, const Tensor& like, const char* like_name) {
  check_table(tiles, "tiles", {kAny, 2}, like, like_name);
}

// A bias of one line per resident.
inline void check_bias(const std::optional<Tensor>& bias, const char* name, int64_t residents,
                       int64_t width, const Tensor& like, const char* like_name) {
  if (!bias) return;
  check(*bias, name).same_device(like, like_name).same_dtype(like, like_name);
  check(*bias, name).shape({residents, width}).contiguous();
}

inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Expert size from the expand weight [R, G*N, D]; checks it against x [*, D].
inline int64_t check_expand_weight(const Tensor& weight, const Tensor& x, Activation activation) {
  check(weight, "expand_weight").same_device(x, "x").same_dtype(x, "x");
  check(weight, "expand_weight").shape({kAny, kAny, x.size(1)}).contiguous();
  as_int32(weight.size(0), "expand_weight: number of residents", 0);
  require(weight.size(1) % gates(activation) == 0, "expand_weight: has shape ",
          shape_name(weight.sizes()),
          ", wanted an even size of dimension 1 for a gated activation");
  return weight.size(1) / gates(activation);
}

// ---- calls -----------------------------------------------------------------------------------------

struct ExpandCall {
  ExpandCall(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& token_of_row, const Tensor& row_of_slot, const Tensor& offsets,
             const Tensor& tiles, int64_t activation_id, bool save_preact) {
    const Activation activation = as_activation(activation_id);
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t expert_size = check_expand_weight(weight, x, activation);
    const int64_t residents = weight.size(0), slots = slots_of(token_of_row, "token_of_row");
    check_bias(bias, "expand_bias", residents, weight.size(1), x, "x");
    check_table(token_of_row, "token_of_row", {slots}, x, "x");
    check_table(row_of_slot, "row_of_slot", {x.size(0), kAny}, x, "x");
    require(row_of_slot.numel() == slots, "row_of_slot: has shape ",
            shape_name(row_of_slot.sizes()), ", wanted one entry for each of ", slots, " slots");
    check_offsets(offsets, residents, x, "x");
    check_tiles(tiles, x, "x");
    act = empty(x, {slots, expert_size});
    preact = empty(x, {save_preact ? slots : 0, weight.size(1)});
    args = {.x = x.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(bias),
            .token_of_row = pointer<int32_t>(token_of_row),
            .offsets = pointer<int32_t>(offsets),
            .tiles = pointer<int32_t>(tiles),
            .dtype = dtype_of(x, "x"),
            .residents = int32_t(residents),
            .tokens = x.size(0),
            .slots = slots,
            .hidden = x.size(1),
            .expert_size = expert_size,
            .activation = activation,
            .act = act.mutable_data_ptr(),
            .preact = save_preact ? preact.mutable_data_ptr() : nullptr};
  }

  ExpandArgs args;
  Tensor act, preact;
};

struct ContractCall {
  ContractCall(const Tensor& act, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& offsets, const Tensor& tiles) {
    check(act, "act").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(weight, "contract_weight").same_device(act, "act").same_dtype(act, "act");
    check(weight, "contract_weight").shape({kAny, kAny, act.size(1)}).contiguous();
    check_bias(bias, "contract_bias", weight.size(0), weight.size(1), act, "act");
    check_offsets(offsets, weight.size(0), act, "act");
    check_tiles(tiles, act, "act");
    rows = empty(act, {act.size(0), weight.size(1)});
    args = {.act = act.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(bias),
            .offsets = pointer<int32_t>(offsets),
            .tiles = pointer<int32_t>(tiles),
            .dtype = dtype_of(act, "act"),
            .residents = as_int32(weight.size(0), "contract_weight: number of residents", 0),
            .slots = as_int32(act.size(0), "act: number of slots", 0),
            .hidden = weight.size(1),
            .expert_size = act.size(1),
            .rows = rows.mutable_data_ptr()};
  }

  ContractArgs args;
  Tensor rows;
};

struct ContractBackwardCall {
  ContractBackwardCall(const Tensor& grad_y, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Tensor& preact,
                       const Tensor& weights, const Tensor& token_of_row, const Tensor& slot_of_row,
                       const Tensor& offsets, const Tensor& tiles, int64_t activation_id) {
    const Activation activation = as_activation(activation_id);
    check(grad_y, "grad_y").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t tokens = grad_y.size(0), hidden = grad_y.size(1);
    const int64_t slots = slots_of(token_of_row, "token_of_row");
    check(weight, "contract_weight").same_device(grad_y, "grad_y").same_dtype(grad_y, "grad_y");
    check(weight, "contract_weight").shape({kAny, hidden, kAny}).contiguous();
    const int64_t residents = weight.size(0), expert_size = weight.size(2);
    check_bias(bias, "contract_bias", residents, hidden, grad_y, "grad_y");
    check(preact, "preact").same_device(grad_y, "grad_y").same_dtype(grad_y, "grad_y");
    check(preact, "preact").shape({slots, gates(activation) * expert_size}).contiguous();
    check(weights, "weights").same_device(grad_y, "grad_y").dtype(ScalarType::Float);
    check(weights, "weights").shape({tokens, kAny}).contiguous();
    require(weights.numel() == slots, "weights: has shape ", shape_name(weights.sizes()),
            ", wanted one weight for each of ", slots, " slots");
    check_table(token_of_row, "token_of_row", {slots}, grad_y, "grad_y");
    check_table(slot_of_row, "slot_of_row", {slots}, grad_y, "grad_y");
    check_offsets(offsets, residents, grad_y, "grad_y");
    check_tiles(tiles, grad_y, "grad_y");
    grad_preact = empty(grad_y, {slots, preact.size(1)});
    scaled_act = empty(grad_y, {slots, expert_size});
    grad_weights = empty(weights, {tokens, weights.size(1)});
    args = {.grad_y = grad_y.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .bias = data_of(bias),
            .preact = preact.const_data_ptr(),
            .weights = pointer<float>(weights),
            .token_of_row = pointer<int32_t>(token_of_row),
            .slot_of_row = pointer<int32_t>(slot_of_row),
            .offsets = pointer<int32_t>(offsets),
            .tiles = pointer<int32_t>(tiles),
            .dtype = dtype_of(grad_y, "grad_y"),
            .residents = as_int32(residents, "contract_weight: number of residents", 0),
            .tokens = tokens,
            .slots = slots,
            .hidden = hidden,
            .expert_size = expert_size,
            .activation = activation,
            .grad_preact = grad_preact.mutable_data_ptr(),
            .scaled_act = scaled_act.mutable_data_ptr(),
            .grad_weights = mutable_pointer<float>(grad_weights),
            .workspace = nullptr};
  }

  ContractBackwardArgs args;
  Tensor grad_preact, scaled_act, grad_weights;
};

struct GroupedRowsCall {
  GroupedRowsCall(const Tensor& rows_in, const Tensor& weight, const Tensor& offsets,
                  const Tensor& tiles) {
    check(rows_in, "rows").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(weight, "weight").same_device(rows_in, "rows").same_dtype(rows_in, "rows");
    check(weight, "weight").shape({kAny, rows_in.size(1), kAny}).contiguous();
    check_offsets(offsets, weight.size(0), rows_in, "rows");
    check_tiles(tiles, rows_in, "rows");
    rows_out = empty(rows_in, {rows_in.size(0), weight.size(2)});
    args = {.rows_in = rows_in.const_data_ptr(),
            .weight = weight.const_data_ptr(),
            .offsets = pointer<int32_t>(offsets),
            .tiles = pointer<int32_t>(tiles),
            .dtype = dtype_of(rows_in, "rows"),
            .residents = as_int32(weight.size(0), "weight: number of residents", 0),
            .slots = as_int32(rows_in.size(0), "rows: number of slots", 0),
            .in = rows_in.size(1),
            .out = weight.size(2),
            .rows_out = rows_out.mutable_data_ptr()};
  }

  GroupedRowsArgs args;
  Tensor rows_out;
};

// Of weight_grad, and with `total` [R, left_size, right_size] of weight_grad_add.
struct WeightGradCall {
  WeightGradCall(const Tensor& left, const Tensor& right, const std::optional<Tensor>& left_index,
                 const std::optional<Tensor>& right_index, const Tensor& offsets,
                 const std::optional<Tensor>& total = std::nullopt) {
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

  WeightGradArgs args;
  int64_t slots;
  Tensor grad;
};

struct BiasGradCall {
  BiasGradCall(const Tensor& rows, const std::optional<Tensor>& index,
               const std::optional<Tensor>& weights, const std::optional<Tensor>& slot_of_row,
               const Tensor& offsets) {
    check(rows, "rows").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int32_t residents = residents_of(offsets);
    check_offsets(offsets, residents, rows, "rows");
    slots = index         ? slots_of(*index, "index")
            : slot_of_row ? slots_of(*slot_of_row, "slot_of_row")
                          : rows.size(0);
    if (index) check_table(*index, "index", {slots}, rows, "rows");
    require(weights.has_value() == slot_of_row.has_value(), "slot_of_row: is ",
            slot_of_row ? "given without" : "missing beside",
            " weights, wanted both or neither of them");
    if (weights) {
      check(*weights, "weights").same_device(rows, "rows").dtype(ScalarType::Float).contiguous();
      require(weights->numel() == slots, "weights: has shape ", shape_name(weights->sizes()),
              ", wanted one weight for each of ", slots, " slots");
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

struct ActivationBackwardCall {
  ActivationBackwardCall(const Tensor& grad_act, const Tensor& preact, const Tensor& offsets,
                         int64_t activation_id) {
    const Activation activation = as_activation(activation_id);
    check(grad_act, "grad_act").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    const int64_t slots = grad_act.size(0), expert_size = grad_act.size(1);
    check(preact, "preact").same_device(grad_act, "grad_act").same_dtype(grad_act, "grad_act");
    check(preact, "preact").shape({slots, gates(activation) * expert_size}).contiguous();
    const int32_t residents = residents_of(offsets);
    check_offsets(offsets, residents, grad_act, "grad_act");
    grad_preact = empty(grad_act, {slots, preact.size(1)});
    args = {.grad_act = grad_act.const_data_ptr(),
            .preact = preact.const_data_ptr(),
            .offsets = pointer<int32_t>(offsets),
            .dtype = dtype_of(grad_act, "grad_act"),
            .residents = residents,
            .slots = as_int32(slots, "grad_act: number of slots", 0),
            .expert_size = expert_size,
            .activation = activation,
            .grad_preact = grad_preact.mutable_data_ptr()};
  }

  ActivationBackwardArgs args;
  Tensor grad_preact;
};

}  // namespace fomoe::ops
