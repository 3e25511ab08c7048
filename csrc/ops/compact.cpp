// compact as a torch op on the CPU.
#include "compact.h"

#include <tuple>

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(const CompactInputs& in) {
  check(in.experts, "experts").cpu();
  const CompactCall call(in);
  const int32_t experts = call.args.experts;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t index = call.args.resident_index[e];
    require(index >= -1 && index < in.num_resident, "resident_index must be in -1 .. ",
            in.num_resident - 1, ", got ", index, " at expert ", e);
  }
  require(cpu::compact(call.args), "experts must be in -1 .. ", experts - 1,
          " (the length of resident_index is ", experts, "), got a number outside");
  return {call.token_of_row, call.slot_of_row, call.row_of_slot, call.offsets, call.tiles};
}

STABLE_TORCH_LIBRARY_IMPL(FOMOE_NAMESPACE, CPU, m) { implement<&compact>(m); }

}  // namespace
}  // namespace fomoe::ops
