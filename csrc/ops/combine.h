// Of combine and gather on CPU and CUDA: inputs, their checks, and the arguments of the kernels.
#pragma once

#include "inputs.h"

namespace fomoe::ops {

struct CombineInputs : Inputs<schemas::combine> {
  using Inputs::Inputs;
  const Tensor& rows = take<"rows">();
  const std::optional<Tensor>& weights = take<"weights">();
  const Tensor& row_of_slot = take<"row_of_slot">();
};

// rows [T * K, D], weights [T, K] or none, row_of_slot [T, K]: shapes, dtypes, device, layout.
inline void check_combine(const CombineInputs& in) {
  const Tensor &rows = in.rows, &row_of_slot = in.row_of_slot;
  check(row_of_slot, "row_of_slot").dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
  as_int32(row_of_slot.size(1), "row_of_slot.shape[1] (top_k)", 0);
  const int64_t slots = row_of_slot.size(0) * row_of_slot.size(1);
  check(rows, "rows").same_device(row_of_slot, "row_of_slot").dtype(kFloatTypes);
  check(rows, "rows").shape({slots, kAny}).contiguous();
  if (!in.weights) return;
  check(*in.weights, "weights").same_device(row_of_slot, "row_of_slot").dtype(ScalarType::Float);
  check(*in.weights, "weights").shape({row_of_slot.size(0), row_of_slot.size(1)}).contiguous();
}

// After check_combine. `y` is [T, D] of the dtype of rows.
inline CombineArgs combine_args(const CombineInputs& in, const Tensor& y) {
  return {.rows = in.rows.const_data_ptr(),
          .weights = pointer<float>(in.weights),
          .row_of_slot = pointer<int32_t>(in.row_of_slot),
          .dtype = dtype_of(in.rows, "rows"),
          .tokens = in.row_of_slot.size(0),
          .hidden = in.rows.size(1),
          .top_k = int32_t(in.row_of_slot.size(1)),
          .y = y.mutable_data_ptr()};
}

struct CombineBackwardInputs : Inputs<schemas::combine_backward> {
  using Inputs::Inputs;
  const Tensor& grad_y = take<"grad_y">();
  const std::optional<Tensor>& rows = take<"rows">();
  const Tensor& weights = take<"weights">();
  const Tensor& row_of_slot = take<"row_of_slot">();
};

// A call of combine_backward: outputs allocated, arguments checked except for values in device
// memory. Without rows grad_weights is empty.
struct CombineBackwardCall {
  explicit CombineBackwardCall(const CombineBackwardInputs& in) {
    const Tensor &grad_y = in.grad_y, &weights = in.weights, &row_of_slot = in.row_of_slot;
    const std::optional<Tensor>& rows = in.rows;
    check(row_of_slot, "row_of_slot").dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
    const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1);
    as_int32(tokens * top_k, "row_of_slot (number of slots)", 0);
    check(grad_y, "grad_y").same_device(row_of_slot, "row_of_slot").dtype(kFloatTypes);
    check(grad_y, "grad_y").shape({tokens, kAny}).contiguous();
    const int64_t hidden = grad_y.size(1), slots = tokens * top_k;
    check(weights, "weights").same_device(row_of_slot, "row_of_slot").dtype(ScalarType::Float);
    check(weights, "weights").shape({tokens, top_k}).contiguous();
    if (rows) {
      check(*rows, "rows").same_device(row_of_slot, "row_of_slot").same_dtype(grad_y, "grad_y");
      check(*rows, "rows").shape({slots, hidden}).contiguous();
    }
    grad_rows = empty(grad_y, {slots, hidden});
    grad_weights = empty(weights, {rows ? tokens : 0, top_k});
    args = {.grad_y = grad_y.const_data_ptr(),
            .rows = rows ? rows->const_data_ptr() : nullptr,
            .weights = pointer<float>(weights),
            .row_of_slot = pointer<int32_t>(row_of_slot),
            .dtype = dtype_of(grad_y, "grad_y"),
            .tokens = tokens,
            .hidden = hidden,
            .top_k = int32_t(top_k),
            .grad_rows = grad_rows.mutable_data_ptr(),
            .grad_weights = rows ? mutable_pointer<float>(grad_weights) : nullptr,
            .workspace = nullptr};
  }

  CombineBackwardArgs args;
  Tensor grad_rows, grad_weights;
};

struct GatherInputs : Inputs<schemas::gather> {
  using Inputs::Inputs;
  const Tensor& x = take<"x">();
  const Tensor& row_of_slot = take<"row_of_slot">();
  const Tensor& offsets = take<"offsets">();
};

// A call of gather: x [T, D], row_of_slot [T, K], offsets [R + 1].
struct GatherCall {
  explicit GatherCall(const GatherInputs& in) {
    const Tensor &x = in.x, &row_of_slot = in.row_of_slot, &offsets = in.offsets;
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(row_of_slot, "row_of_slot").same_device(x, "x").dtype(ScalarType::Int);
    check(row_of_slot, "row_of_slot").shape({x.size(0), kAny}).contiguous();
    check(offsets, "offsets").same_device(x, "x").dtype(ScalarType::Int);
    check(offsets, "offsets").shape({kAny}).contiguous();
    require(offsets.size(0) > 0, "offsets must have num_resident + 1 numbers, got none");
    const int64_t slots = row_of_slot.numel();
    as_int32(slots, "row_of_slot (number of slots)", 0);
    rows = empty(x, {slots, x.size(1)});
    args = {.x = x.const_data_ptr(),
            .row_of_slot = pointer<int32_t>(row_of_slot),
            .row_count = pointer<int32_t>(offsets) + offsets.size(0) - 1,
            .dtype = dtype_of(x, "x"),
            .tokens = x.size(0),
            .hidden = x.size(1),
            .top_k = int32_t(row_of_slot.size(1)),
            .rows = rows.mutable_data_ptr()};
  }

  GatherArgs args;
  Tensor rows;
};

}  // namespace fomoe::ops
