// compact as a torch op on CUDA. Values in device memory are not checked: ids out of range count as
// skipped.
#include <tuple>

#include "compact.h"
#include "cuda.h"

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(const Tensor& expert_ids,
                                                           const Tensor& resident_index,
                                                           int64_t num_resident,
                                                           int64_t tile_rows) {
  const DeviceOf device(expert_ids, "experts");
  CompactCall call(expert_ids, resident_index, num_resident, tile_rows);
  require(num_resident <= kMaxResidents, "num_resident: got ", num_resident, ", wanted at most ",
          kMaxResidents, " on CUDA");
  const Tensor workspace = empty(expert_ids, {cuda::compact_workspace(call.args)});
  call.args.workspace = mutable_pointer<int32_t>(workspace);
  check_launch(cuda::compact(call.args, device.stream()), "compact");
  return {call.token_of_row, call.slot_of_row, call.row_of_slot, call.offsets, call.tiles};
}

FOMOE_CUDA_OPS(m) { m.impl("compact", TORCH_BOX(&compact)); }

}  // namespace
}  // namespace fomoe::ops
