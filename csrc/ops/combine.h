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

}  // namespace fomoe::ops
