// combine, its gradients and gather as torch ops on the CPU.
#include "combine.h"

#include <tuple>
#include <vector>

#include "../cpu/huge_pages.h"

namespace fomoe::ops {
namespace {

// Every entry -1 or a row of `rows`.
void check_range(const Tensor& row_of_slot, int64_t rows) {
  const int32_t* row = pointer<int32_t>(row_of_slot);
  for (int64_t slot = 0; slot < row_of_slot.numel(); ++slot)
    require(row[slot] >= -1 && row[slot] < rows, "row_of_slot must be in -1 .. ", rows - 1,
            ", got ", row[slot], " at slot ", slot);
}

// The number of rows n, checked to be 0 .. n-1, each once, as `compact` gives them: only then is
// every row written, and by one slot.
int64_t check_each_row_once(const Tensor& row_of_slot) {
  const int32_t* row = pointer<int32_t>(row_of_slot);
  const int64_t slots = row_of_slot.numel();
  int64_t rows = 0;
  for (int64_t slot = 0; slot < slots; ++slot) rows += row[slot] >= 0;
  check_range(row_of_slot, rows);
  std::vector<uint8_t> seen(size_t(rows), 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (row[slot] < 0) continue;
    require(!seen[size_t(row[slot])], "row_of_slot must have each row once, got row ", row[slot],
            " in two slots");
    seen[size_t(row[slot])] = 1;
  }
  return rows;
}

Tensor combine(const CombineInputs& in) {
  check(in.row_of_slot, "row_of_slot").cpu();
  check_combine(in);
  check_range(in.row_of_slot, in.rows.size(0));
  Tensor y = empty(in.rows, {in.row_of_slot.size(0), in.rows.size(1)});
  cpu::combine(combine_args(in, y));
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const CombineBackwardInputs& in) {
  check(in.row_of_slot, "row_of_slot").cpu();
  const CombineBackwardCall call(in);
  check_each_row_once(in.row_of_slot);
  cpu::prefer_huge_pages(call.args.grad_rows,
                         call.grad_rows.numel() * int64_t(call.grad_rows.element_size()));
  cpu::combine_backward(call.args);
  return {call.grad_rows, call.grad_weights};
}

Tensor gather(const GatherInputs& in) {
  check(in.x, "x").cpu();
  const GatherCall call(in);
  const int64_t rows = check_each_row_once(in.row_of_slot);
  require(*call.args.row_count == rows, "offsets must end at ", rows,
          ", the rows of row_of_slot, got ", *call.args.row_count);
  cpu::prefer_huge_pages(call.args.rows, call.rows.numel() * int64_t(call.rows.element_size()));
  cpu::gather(call.args);
  return call.rows;
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  implement<&combine>(m);
  implement<&combine_backward>(m);
  implement<&gather>(m);
}

}  // namespace
}  // namespace fomoe::ops
