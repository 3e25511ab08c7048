// The grouped expert GEMMs as torch ops on the CPU.
#include <tuple>

#include "experts_cpu.h"

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor> expand(const ExpandInputs& in) {
  check(in.x, "x").cpu();
  const ExpandCall call(in);
  const ExpandArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, args.slots);
  check_index(args.token_of_row, "token_of_row", rows, args.tokens);
  check_rows(pointer<int32_t>(in.row_of_slot), args.slots, rows);  // what the backward sums over
  cpu::expand(args);
  zero_tail(call.act, rows);
  if (in.save_preact) zero_tail(call.preact, rows);
  return {call.act, call.preact};
}

Tensor contract(const ContractInputs& in) {
  check(in.act, "act").cpu();
  const ContractCall call(in);
  const int64_t rows = rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::contract(call.args);
  zero_tail(call.rows, rows);
  return call.rows;
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const ContractBackwardInputs& in) {
  check(in.grad_y, "grad_y").cpu();
  const ContractBackwardCall call(in);
  const ContractBackwardArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, args.slots);
  check_index(args.token_of_row, "token_of_row", rows, args.tokens);
  check_index(args.slot_of_row, "slot_of_row", rows, args.slots);
  cpu::contract_backward(args);
  return {call.grad_preact, call.scaled_act, call.grad_weights};
}

Tensor grouped_rows(const GroupedRowsInputs& in) {
  check(in.rows, "rows").cpu();
  const GroupedRowsCall call(in);
  rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::grouped_rows(call.args);
  return call.rows_out;
}

void run_weight_grad(const WeightGradCall& call) {
  const WeightGradArgs& args = call.args;
  const int64_t rows = rows_of(args.offsets, args.residents, call.slots);
  check_index(args.left_index, "left_index", rows, args.left_lines);
  check_index(args.right_index, "right_index", rows, args.right_lines);
  require(args.left_index || args.left_lines >= rows, "left must have at least ", rows,
          " rows, got ", args.left_lines);
  require(args.right_index || args.right_lines >= rows, "right must have at least ", rows,
          " rows, got ", args.right_lines);
  cpu::weight_grad(args);
}

Tensor weight_grad(const WeightGradInputs& in) {
  check(in.left, "left").cpu();
  const WeightGradCall call(in);
  run_weight_grad(call);
  return call.grad;
}

void weight_grad_add(const WeightGradAddInputs& in) {
  check(in.left, "left").cpu();
  run_weight_grad(WeightGradCall(in));
}

Tensor bias_grad(const BiasGradInputs& in) {
  check(in.rows, "rows").cpu();
  const BiasGradCall call(in);
  const int64_t count = rows_of(call.args.offsets, call.args.residents, call.slots);
  check_index(call.args.index, "index", count, in.rows.size(0));
  check_index(call.args.slot_of_row, "slot_of_row", count, call.slots);
  require(in.index || in.rows.size(0) >= count, "rows must have at least ", count, " rows, got ",
          in.rows.size(0));
  cpu::bias_grad(call.args);
  return call.grad;
}

Tensor activation_backward(const ActivationBackwardInputs& in) {
  check(in.grad_act, "grad_act").cpu();
  const ActivationBackwardCall call(in);
  rows_of(call.args.offsets, call.args.residents, call.args.slots);
  cpu::activation_backward(call.args);
  return call.grad_preact;
}

int64_t expand_rows_computed() { return cpu::expand_rows_computed(); }

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  implement<&expand>(m);
  implement<&contract>(m);
  implement<&contract_backward>(m);
  implement<&grouped_rows>(m);
  implement<&weight_grad>(m);
  implement<&weight_grad_add>(m);
  implement<&bias_grad>(m);
  implement<&activation_backward>(m);
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl(std::string(schemas::expand_rows_computed.name()).c_str(),
         TORCH_BOX(&expand_rows_computed));
}

}  // namespace
}  // namespace fomoe::ops
