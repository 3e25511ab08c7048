// compact as a torch op on CUDA. Values in device memory are not checked: ids out of range count as
// skipped.
#include <tuple>

#include "compact.h"
#include "cuda.h"

namespace fomoe::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact(const CompactInputs& in) {
  const DeviceOf device(in.experts, "experts");
  CompactCall call(in);
  require(in.num_resident <= kMaxResidents, "num_resident must be at most ", kMaxResidents,
          " on CUDA, got ", in.num_resident);
  const Tensor workspace = empty(in.experts, {cuda::compact_workspace(call.args)});
  call.args.workspace = mutable_pointer<int32_t>(workspace);
  check_launch(cuda::compact(call.args, device.stream()), "compact");
  return {call.token_of_row, call.slot_of_row, call.row_of_slot, call.offsets, call.tiles};
}

FOMOE_CUDA_OPS(m) { implement<&compact>(m); }

}  // namespace
}  // namespace fomoe::ops
