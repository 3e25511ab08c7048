// What the CPU and the CUDA op of combine check alike, and the arguments they hand on.
#pragma once

#include "common.h"

namespace fomoe::ops {

// rows [T * K, D], weights [T, K] or none, row_of_slot [T, K]: shapes, dtypes, device, layout.
inline void check_combine(const Tensor& rows, const std::optional<Tensor>& weights,
                          const Tensor& row_of_slot) {
  check(row_of_slot, "row_of_slot").dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
  as_int32(row_of_slot.size(1), "row_of_slot: top_k (dimension 1)", 0);
  const int64_t slots = row_of_slot.size(0) * row_of_slot.size(1);
  check(rows, "rows").same_device(row_of_slot, "row_of_slot").dtype(kFloatTypes);
  check(rows, "rows").shape({slots, kAny}).contiguous();
  if (!weights) return;
  check(*weights, "weights").same_device(row_of_slot, "row_of_slot").dtype(ScalarType::Float);
  check(*weights, "weights").shape({row_of_slot.size(0), row_of_slot.size(1)}).contiguous();
}

// After check_combine. `y` is [T, D] of the dtype of rows.
inline CombineArgs combine_args(const Tensor& rows, const std::optional<Tensor>& weights,
                                const Tensor& row_of_slot, const Tensor& y) {
  return {.rows = rows.const_data_ptr(),
          .weights = pointer<float>(weights),
          .row_of_slot = pointer<int32_t>(row_of_slot),
          .dtype = dtype_of(rows, "rows"),
          .tokens = row_of_slot.size(0),
          .hidden = rows.size(1),
          .top_k = int32_t(row_of_slot.size(1)),
          .y = y.mutable_data_ptr()};
}

// A call of combine_backward: outputs allocated, arguments checked but for values in device memory.
// rows none: grad_weights is empty.
struct CombineBackwardCall {
  CombineBackwardCall(const Tensor& grad_y, const std::optional<Tensor>& rows,
                      const Tensor& weights, const Tensor& row_of_slot) {
    check(row_of_slot, "row_of_slot").dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
    const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1);
    as_int32(tokens * top_k, "row_of_slot: number of slots", 0);
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

// A call of gather: x [T, D], row_of_slot [T, K], offsets [R + 1].
struct GatherCall {
  GatherCall(const Tensor& x, const Tensor& row_of_slot, const Tensor& offsets) {
    check(x, "x").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
    check(row_of_slot, "row_of_slot").same_device(x, "x").dtype(ScalarType::Int);
    check(row_of_slot, "row_of_slot").shape({x.size(0), kAny}).contiguous();
    check(offsets, "offsets").same_device(x, "x").dtype(ScalarType::Int);
    check(offsets, "offsets").shape({kAny}).contiguous();
    require(offsets.size(0) > 0, "offsets: is empty, wanted num_resident + 1 numbers");
    const int64_t slots = row_of_slot.numel();
    as_int32(slots, "row_of_slot: number of slots", 0);
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
