// combine and its gradients as torch ops on the CPU.
#include "combine.h"

#include <cstring>
#include <tuple>
#include <vector>

namespace fomoe::ops {
namespace {

// Every entry -1 or a row of `rows`.
void check_range(const Tensor& row_of_slot, int64_t rows) {
  const int32_t* row = pointer<int32_t>(row_of_slot);
  for (int64_t slot = 0; slot < row_of_slot.numel(); ++slot)
    require(row[slot] >= -1 && row[slot] < rows, "row_of_slot: has ", row[slot], " at slot ", slot,
            ", wanted -1 .. ", rows - 1);
}

// The number of rows n, checked to be 0 .. n-1, each once, as `compact` gives them: only then is
// every row's gradient written, and by one slot.
int64_t check_each_row_once(const Tensor& row_of_slot) {
  const int32_t* row = pointer<int32_t>(row_of_slot);
  const int64_t slots = row_of_slot.numel();
  int64_t rows = 0;
  for (int64_t slot = 0; slot < slots; ++slot) rows += row[slot] >= 0;
  check_range(row_of_slot, rows);
  std::vector<uint8_t> seen(size_t(rows), 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (row[slot] < 0) continue;
    require(!seen[size_t(row[slot])], "row_of_slot: has row ", row[slot],
            " in two slots, wanted each row once");
    seen[size_t(row[slot])] = 1;
  }
  return rows;
}

Tensor combine(const Tensor& rows, const std::optional<Tensor>& weights,
               const Tensor& row_of_slot) {
  check(row_of_slot, "row_of_slot").cpu();
  check_combine(rows, weights, row_of_slot);
  check_range(row_of_slot, rows.size(0));
  Tensor y = empty(rows, {row_of_slot.size(0), rows.size(1)});
  cpu::combine(combine_args(rows, weights, row_of_slot, y));
  return y;
}

// rows none: grad_weights is empty.
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_y, const std::optional<Tensor>& rows,
                                            const Tensor& weights, const Tensor& row_of_slot) {
  check(row_of_slot, "row_of_slot").cpu().dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
  const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1);
  check(grad_y, "grad_y").cpu().dtype(kFloatTypes).shape({tokens, kAny}).contiguous();
  const int64_t hidden = grad_y.size(1), slots = tokens * top_k;
  check(weights, "weights").cpu().dtype(ScalarType::Float).shape({tokens, top_k}).contiguous();
  if (rows) {
    check(*rows, "rows").cpu().same_dtype(grad_y, "grad_y").shape({slots, hidden}).contiguous();
  }
  const int64_t row_count = check_each_row_once(row_of_slot);
  Tensor grad_rows = empty(grad_y, {slots, hidden});
  Tensor grad_weights = empty(weights, {rows ? tokens : 0, top_k});
  cpu::combine_backward({.grad_y = grad_y.const_data_ptr(),
                         .rows = rows ? rows->const_data_ptr() : nullptr,
                         .weights = pointer<float>(weights),
                         .row_of_slot = pointer<int32_t>(row_of_slot),
                         .dtype = dtype_of(grad_y, "grad_y"),
                         .tokens = tokens,
                         .hidden = hidden,
                         .top_k = as_int32(top_k, "row_of_slot: top_k (dimension 1)"),
                         .grad_rows = grad_rows.mutable_data_ptr(),
                         .grad_weights = rows ? mutable_pointer<float>(grad_weights) : nullptr});
  const int64_t row_bytes = hidden * int64_t(grad_rows.element_size());
  std::memset(static_cast<char*>(grad_rows.mutable_data_ptr()) + row_count * row_bytes, 0,
              size_t((slots - row_count) * row_bytes));
  return {grad_rows, grad_weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fomoe, m) {
  m.def("combine(Tensor rows, Tensor? weights, Tensor row_of_slot) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_y, Tensor? rows, Tensor weights, Tensor row_of_slot) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace
}  // namespace fomoe::ops
