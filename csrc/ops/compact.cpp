// compact as a torch op on the CPU.
#include "compact.h"

#include <tuple>

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(const Tensor& expert_ids,
                                                           const Tensor& resident_index,
                                                           int64_t num_resident,
                                                           int64_t tile_rows) {
  check(expert_ids, "experts").cpu();
  const CompactCall call(expert_ids, resident_index, num_resident, tile_rows);
  const int32_t experts = call.args.experts;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t index = call.args.resident_index[e];
    require(index >= -1 && index < num_resident, "resident_index: is ", index, " at expert ", e,
            ", wanted -1 .. ", num_resident - 1);
  }
  require(cpu::compact(call.args), "experts: holds a number outside -1 .. ", experts - 1,
          " (the length of resident_index is ", experts, ")");
  return {call.token_of_row, call.slot_of_row, call.row_of_slot, call.offsets, call.tiles};
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) { m.impl("compact", TORCH_BOX(&compact)); }

}  // namespace
}  // namespace fomoe::ops
