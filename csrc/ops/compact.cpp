// compact as a torch op on the CPU.
#include <tuple>

#include "common.h"

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> compact(const Tensor& expert_ids,
                                                   const Tensor& resident_index,
                                                   int64_t num_resident) {
  check(expert_ids, "experts").cpu().dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
  check(resident_index, "resident_index").cpu().dtype(ScalarType::Int).shape({kAny}).contiguous();
  const int64_t tokens = expert_ids.size(0), top_k = expert_ids.size(1);
  const int64_t slots = tokens * top_k, experts = resident_index.size(0);
  as_int32(slots, "experts: number of slots", 0);
  as_int32(experts, "resident_index: number of experts", 0);
  require(num_resident >= 0 && num_resident <= experts, "num_resident: got ", num_resident,
          ", wanted 0 .. ", experts, " (the length of resident_index)");
  const int32_t* index = pointer<int32_t>(resident_index);
  for (int64_t e = 0; e < experts; ++e)
    require(index[e] >= -1 && index[e] < num_resident, "resident_index: is ", index[e],
            " at expert ", e, ", wanted -1 .. ", num_resident - 1);
  Tensor token_of_row = empty(expert_ids, {slots});
  Tensor slot_of_row = empty(expert_ids, {slots});
  Tensor row_of_slot = empty(expert_ids, {tokens, top_k});
  Tensor offsets = empty(expert_ids, {num_resident + 1});
  const bool valid = cpu::compact({.expert_ids = pointer<int32_t>(expert_ids),
                                   .resident_index = index,
                                   .tokens = tokens,
                                   .top_k = int32_t(top_k),
                                   .experts = int32_t(experts),
                                   .residents = int32_t(num_resident),
                                   .token_of_row = mutable_pointer<int32_t>(token_of_row),
                                   .slot_of_row = mutable_pointer<int32_t>(slot_of_row),
                                   .row_of_slot = mutable_pointer<int32_t>(row_of_slot),
                                   .offsets = mutable_pointer<int32_t>(offsets)});
  require(valid, "experts: holds a number outside -1 .. ", experts - 1,
          " (the length of resident_index is ", experts, ")");
  return {token_of_row, slot_of_row, row_of_slot, offsets};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fomoe, m) {
  m.def(
      "compact(Tensor experts, Tensor resident_index, int num_resident) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) { m.impl("compact", TORCH_BOX(&compact)); }

}  // namespace
}  // namespace fomoe::ops
