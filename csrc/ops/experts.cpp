// The grouped expert GEMMs as torch ops on the CPU.
#include <cstring>
#include <tuple>

#include "experts.h"

namespace fomoe::ops {
namespace {

// Public results have no undefined rows: zeroes those past the last one that was computed.
void zero_tail(const Tensor& rows_by_width, int64_t rows) {
  const int64_t row_bytes = rows_by_width.size(1) * int64_t(rows_by_width.element_size());
  std::memset(static_cast<char*>(rows_by_width.mutable_data_ptr()) + rows * row_bytes, 0,
              size_t((rows_by_width.size(0) - rows) * row_bytes));
}

std::tuple<Tensor, Tensor> expand(const Tensor& x, const Tensor& weight, const Tensor& token_of_row,
                                  const Tensor& row_of_slot, const Tensor& offsets,
                                  int64_t activation_id, bool save_preact) {
  const Activation activation = as_activation(activation_id);
  check(x, "x").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  const int64_t expert_size = check_expand_weight(weight, x, activation);
  const int64_t slots = token_of_row.size(0);
  const int64_t rows = check_offsets(offsets, weight.size(0), slots);
  check_index(token_of_row, "token_of_row", slots, rows, x.size(0));
  check_rows(row_of_slot, x.size(0), slots, rows);  // what the backward sums over
  Tensor act = empty(x, {slots, expert_size});
  Tensor preact = empty(x, {save_preact ? slots : 0, weight.size(1)});
  cpu::expand({.x = x.const_data_ptr(),
               .weight = weight.const_data_ptr(),
               .token_of_row = pointer<int32_t>(token_of_row),
               .offsets = pointer<int32_t>(offsets),
               .dtype = dtype_of(x, "x"),
               .residents = int32_t(weight.size(0)),
               .hidden = x.size(1),
               .expert_size = expert_size,
               .activation = activation,
               .act = act.mutable_data_ptr(),
               .preact = save_preact ? preact.mutable_data_ptr() : nullptr});
  zero_tail(act, rows);
  if (save_preact) zero_tail(preact, rows);
  return {act, preact};
}

Tensor contract(const Tensor& act, const Tensor& weight, const Tensor& offsets) {
  check(act, "act").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  check(weight, "contract_weight").cpu().same_dtype(act, "act").shape({kAny, kAny, act.size(1)});
  check(weight, "contract_weight").contiguous();
  const int64_t row_count = check_offsets(offsets, weight.size(0), act.size(0));
  Tensor rows = empty(act, {act.size(0), weight.size(1)});
  cpu::contract({.act = act.const_data_ptr(),
                 .weight = weight.const_data_ptr(),
                 .offsets = pointer<int32_t>(offsets),
                 .dtype = dtype_of(act, "act"),
                 .residents = int32_t(weight.size(0)),
                 .hidden = weight.size(1),
                 .expert_size = act.size(1),
                 .rows = rows.mutable_data_ptr()});
  zero_tail(rows, row_count);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const Tensor& grad_y, const Tensor& weight,
                                                     const Tensor& preact, const Tensor& weights,
                                                     const Tensor& token_of_row,
                                                     const Tensor& slot_of_row,
                                                     const Tensor& offsets, int64_t activation_id) {
  const Activation activation = as_activation(activation_id);
  check(grad_y, "grad_y").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  const int64_t tokens = grad_y.size(0), hidden = grad_y.size(1), slots = token_of_row.size(0);
  check(weight, "contract_weight").cpu().same_dtype(grad_y, "grad_y");
  check(weight, "contract_weight").shape({kAny, hidden, kAny}).contiguous();
  const int64_t expert_size = weight.size(2);
  check(preact, "preact").cpu().same_dtype(grad_y, "grad_y");
  check(preact, "preact").shape({slots, gates(activation) * expert_size}).contiguous();
  check(weights, "weights").cpu().dtype(ScalarType::Float).shape({tokens, kAny}).contiguous();
  require(tokens * weights.size(1) == slots, "weights: has shape ", shape_name(weights.sizes()),
          ", wanted one weight for each of ", slots, " slots");
  const int64_t rows = check_offsets(offsets, weight.size(0), slots);
  check_index(token_of_row, "token_of_row", slots, rows, tokens);
  check_index(slot_of_row, "slot_of_row", slots, rows, slots);
  Tensor grad_preact = empty(grad_y, {slots, preact.size(1)});
  Tensor scaled_act = empty(grad_y, {slots, expert_size});
  Tensor grad_weights = empty(weights, {tokens, weights.size(1)});
  cpu::contract_backward({.grad_y = grad_y.const_data_ptr(),
                          .weight = weight.const_data_ptr(),
                          .preact = preact.const_data_ptr(),
                          .weights = pointer<float>(weights),
                          .token_of_row = pointer<int32_t>(token_of_row),
                          .slot_of_row = pointer<int32_t>(slot_of_row),
                          .offsets = pointer<int32_t>(offsets),
                          .dtype = dtype_of(grad_y, "grad_y"),
                          .residents = int32_t(weight.size(0)),
                          .hidden = hidden,
                          .expert_size = expert_size,
                          .slots = slots,
                          .activation = activation,
                          .grad_preact = grad_preact.mutable_data_ptr(),
                          .scaled_act = scaled_act.mutable_data_ptr(),
                          .grad_weights = mutable_pointer<float>(grad_weights)});
  return {grad_preact, scaled_act, grad_weights};
}

Tensor grouped_rows(const Tensor& rows_in, const Tensor& weight, const Tensor& offsets) {
  check(rows_in, "rows").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  check(weight, "weight").cpu().same_dtype(rows_in, "rows").shape({kAny, rows_in.size(1), kAny});
  check(weight, "weight").contiguous();
  check_offsets(offsets, weight.size(0), rows_in.size(0));
  Tensor rows_out = empty(rows_in, {rows_in.size(0), weight.size(2)});
  cpu::grouped_rows({.rows_in = rows_in.const_data_ptr(),
                     .weight = weight.const_data_ptr(),
                     .offsets = pointer<int32_t>(offsets),
                     .dtype = dtype_of(rows_in, "rows"),
                     .residents = int32_t(weight.size(0)),
                     .in = rows_in.size(1),
                     .out = weight.size(2),
                     .rows_out = rows_out.mutable_data_ptr()});
  return rows_out;
}

Tensor weight_grad(const Tensor& left, const Tensor& right, const std::optional<Tensor>& left_index,
                   const std::optional<Tensor>& right_index, const Tensor& offsets) {
  check(left, "left").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  check(right, "right").cpu().same_dtype(left, "left").shape({kAny, kAny}).contiguous();
  check(offsets, "offsets").shape({kAny});
  require(offsets.size(0) >= 1, "offsets: is empty, wanted residents + 1 entries");
  const int64_t residents = offsets.size(0) - 1;
  const int64_t slots = left_index    ? left_index->size(0)
                        : right_index ? right_index->size(0)
                                      : left.size(0);
  const int64_t rows = check_offsets(offsets, residents, slots);
  if (left_index) check_index(*left_index, "left_index", slots, rows, left.size(0));
  if (right_index) check_index(*right_index, "right_index", slots, rows, right.size(0));
  require(left_index || left.size(0) >= rows, "left: has ", left.size(0), " rows, wanted ", rows);
  require(right_index || right.size(0) >= rows, "right: has ", right.size(0), " rows, wanted ",
          rows);
  Tensor grad = empty(left, {residents, left.size(1), right.size(1)});
  cpu::weight_grad({.left = left.const_data_ptr(),
                    .right = right.const_data_ptr(),
                    .left_index = pointer<int32_t>(left_index),
                    .right_index = pointer<int32_t>(right_index),
                    .offsets = pointer<int32_t>(offsets),
                    .dtype = dtype_of(left, "left"),
                    .residents = int32_t(residents),
                    .left_size = left.size(1),
                    .right_size = right.size(1),
                    .grad_weight = grad.mutable_data_ptr()});
  return grad;
}

Tensor activation_backward(const Tensor& grad_act, const Tensor& preact, const Tensor& offsets,
                           int64_t activation_id) {
  const Activation activation = as_activation(activation_id);
  check(grad_act, "grad_act").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  const int64_t slots = grad_act.size(0), expert_size = grad_act.size(1);
  check(preact, "preact").cpu().same_dtype(grad_act, "grad_act");
  check(preact, "preact").shape({slots, gates(activation) * expert_size}).contiguous();
  check(offsets, "offsets").shape({kAny});
  require(offsets.size(0) >= 1, "offsets: is empty, wanted residents + 1 entries");
  const int64_t residents = offsets.size(0) - 1;
  check_offsets(offsets, residents, slots);
  Tensor grad_preact = empty(grad_act, {slots, preact.size(1)});
  cpu::activation_backward({.grad_act = grad_act.const_data_ptr(),
                            .preact = preact.const_data_ptr(),
                            .offsets = pointer<int32_t>(offsets),
                            .dtype = dtype_of(grad_act, "grad_act"),
                            .residents = int32_t(residents),
                            .expert_size = expert_size,
                            .activation = activation,
                            .grad_preact = grad_preact.mutable_data_ptr()});
  return grad_preact;
}

int64_t expand_rows_computed() { return cpu::expand_rows_computed(); }

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("contract_backward", TORCH_BOX(&contract_backward));
  m.impl("grouped_rows", TORCH_BOX(&grouped_rows));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("expand_rows_computed", TORCH_BOX(&expand_rows_computed));
}

}  // namespace
}  // namespace fomoe::ops
