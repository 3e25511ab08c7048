// expand, contract and combine in one torch op on the CPU, and its backward. Only the pre-activations
// are kept between them.
#include "../cpu/huge_pages.h"
#include "experts_cpu.h"
#include "moe_experts_passes.h"

namespace fomoe::ops {
namespace {

// Checks the values of the row tables and returns the number of rows.
int64_t check_values(const MoeCall& layer) {
  const int64_t rows = rows_of(layer.at_offsets, layer.residents, layer.slots);
  check_index(layer.at_token_of_row, "token_of_row", rows, layer.tokens);
  check_index(layer.at_slot_of_row, "slot_of_row", rows, layer.slots);
  check_rows(layer.at_row_of_slot, layer.slots, rows);
  return rows;
}

struct CpuKernels {
  void expand(const ExpandArgs& args) const { cpu::expand(args); }
  void contract(const ContractArgs& args) const { cpu::contract(args); }
  void combine(const CombineArgs& args) const {
    const int64_t element = args.dtype == DType::f32 ? 4 : 2;
    cpu::prefer_huge_pages(args.y, args.tokens * args.hidden * element);
    cpu::combine(args);
  }
  void contract_backward(const ContractBackwardArgs& args) const { cpu::contract_backward(args); }
  void weight_grad(const WeightGradArgs& args) const { cpu::weight_grad(args); }
  void bias_grad(const BiasGradArgs& args) const { cpu::bias_grad(args); }
  void grouped_rows(const GroupedRowsArgs& args) const { cpu::grouped_rows(args); }
};

std::tuple<Tensor, Tensor> moe_experts(const MoeExpertsInputs& in) {
  check(in.x, "x").cpu();
  const MoeCall call(in);
  return run_moe_experts(in, call, check_values(call), CpuKernels());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const MoeExpertsBackwardInputs& in) {
  check(in.x, "x").cpu();
  const MoeBackwardCall call(in);
  return run_moe_experts_backward(call, check_values(call), CpuKernels());
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) {
  implement<&moe_experts>(m);
  implement<&moe_experts_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
