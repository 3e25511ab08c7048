// The grouped expert GEMMs as torch ops on the CPU.
#include <tuple>

#include "experts_cpu.h"

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor> expand(const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const Tensor& token_of_row,
                                  const Tensor& row_of_slot, const Tensor& offsets,
                                  const Tensor& tiles, int64_t activation, bool save_preact) {
  check(x, "x").cpu();
  const ExpandCall call(x, weight, bias, token_of_row, row_of_slot, offsets, tiles, activation,
                        save_preact);
  const ExpandArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, args.slots);
  check_index(args.token_of_row, "token_of_row", rows, args.tokens);
  check_rows(pointer<int32_t>(row_of_slot), args.slots, rows);  // what the backward sums over
  cpu::expand(args);
  zero_tail(call.act, rows);
  if (save_preact) zero_tail(call.preact, rows);
  return {call.act, call.preact};
}

Tensor contract(const Tensor& act, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& offsets, const Tensor& tiles) {
  check(act, "act").cpu();
  const ContractCall call(act, weight, bias, offsets, tiles);
  const int64_t rows = rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::contract(call.args);
  zero_tail(call.rows, rows);
  return call.rows;
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(
    const Tensor& grad_y, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& preact, const Tensor& weights, const Tensor& token_of_row,
    const Tensor& slot_of_row, const Tensor& offsets, const Tensor& tiles, int64_t activation) {
  check(grad_y, "grad_y").cpu();
  const ContractBackwardCall call(grad_y, weight, bias, preact, weights, token_of_row, slot_of_row,
                                  offsets, tiles, activation);
  const ContractBackwardArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, args.slots);
  check_index(args.token_of_row, "token_of_row", rows, args.tokens);
  check_index(args.slot_of_row, "slot_of_row", rows, args.slots);
  cpu::contract_backward(args);
  return {call.grad_preact, call.scaled_act, call.grad_weights};
}

Tensor grouped_rows(const Tensor& rows_in, const Tensor& weight, const Tensor& offsets,
                    const Tensor& tiles) {
  check(rows_in, "rows").cpu();
  const GroupedRowsCall call(rows_in, weight, offsets, tiles);
  rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::grouped_rows(call.args);
  return call.rows_out;
}

void run_weight_grad(const WeightGradCall& call) {
  const WeightGradArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, call.slots);
  check_index(args.left_index, "left_index", rows, args.left_lines);
  check_index(args.right_index, "right_index", rows, args.right_lines);
  require(args.left_index || args.left_lines >= rows, "left: has ", args.left_lines,
          " rows, wanted ", rows);
  require(args.right_index || args.right_lines >= rows, "right: has ", args.right_lines,
          " rows, wanted ", rows);
  cpu::weight_grad(args);
}

Tensor weight_grad(const Tensor& left, const Tensor& right, const std::optional<Tensor>& left_index,
                   const std::optional<Tensor>& right_index, const Tensor& offsets) {
  check(left, "left").cpu();
  const WeightGradCall call(left, right, left_index, right_index, offsets);
  run_weight_grad(call);
  return call.grad;
}

void weight_grad_add(const Tensor& total, const Tensor& left, const Tensor& right,
                     const std::optional<Tensor>& left_index,
                     const std::optional<Tensor>& right_index, const Tensor& offsets) {
  check(left, "left").cpu();
  run_weight_grad(WeightGradCall(left, right, left_index, right_index, offsets, total));
}

Tensor bias_grad(const Tensor& rows, const std::optional<Tensor>& index,
                 const std::optional<Tensor>& weights, const std::optional<Tensor>& slot_of_row,
                 const Tensor& offsets) {
  check(rows, "rows").cpu();
  const BiasGradCall call(rows, index, weights, slot_of_row, offsets);
  const int64_t count = rows_of(call.args.offsets, call.args.residents, call.slots);
  check_index(call.args.index, "index", count, rows.size(0));
  check_index(call.args.slot_of_row, "slot_of_row", count, call.slots);
  require(index || rows.size(0) >= count, "rows: has ", rows.size(0), " rows, wanted ", count);
  cpu::bias_grad(call.args);
  return call.grad;
}

Tensor activation_backward(const Tensor& grad_act, const Tensor& preact, const Tensor& offsets,
                           int64_t activation) {
  check(grad_act, "grad_act").cpu();
  const ActivationBackwardCall call(grad_act, preact, offsets, activation);
  rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::activation_backward(call.args);
  return call.grad_preact;
}

int64_t expand_rows_computed() { return cpu::expand_rows_computed(); }

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("contract_backward", TORCH_BOX(&contract_backward));
  m.impl("grouped_rows", TORCH_BOX(&grouped_rows));
  m.impl("weight_grad", TORCH_BOX(&weight_grad));
  m.impl("weight_grad_add", TORCH_BOX(&weight_grad_add));
  m.impl("bias_grad", TORCH_BOX(&bias_grad));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("expand_rows_computed", TORCH_BOX(&expand_rows_computed));
}

}  // namespace
}  // namespace fomoe::ops
