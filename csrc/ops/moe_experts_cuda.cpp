// expand, contract and combine in one torch op on CUDA, and its backward. Only the pre-activations
// are kept between them. The host does not wait for the device, so values are not checked.
#include "experts_cuda.h"
#include "moe_experts_passes.h"

namespace fomoe::ops {
namespace {

template <class Given>
void require_readable(const MoeCall& call, const Given& in) {
  require_schedule(in.tiles, call.slots, call.residents);
  require_chunks(in.x, "x", "hidden size", call.hidden);
  require_chunks(in.expand_weight, "expand_weight", "intermediate size", call.intermediate_size);
  require_chunks(in.contract_weight, "contract_weight", "intermediate size",
                 call.intermediate_size);
}

class CudaKernels {
 public:
  // `weights`: a float tensor on the device.
  CudaKernels(const DeviceOf& device, const Tensor& weights)
      : stream_(device.stream()), weights_(weights) {}

  void expand(const ExpandArgs& args) const { check_launch(cuda::expand(args, stream_), "expand"); }
  void contract(const ContractArgs& args) const {
    check_launch(cuda::contract(args, stream_), "contract");
  }
  void combine(const CombineArgs& args) const {
    check_launch(cuda::combine(args, stream_), "combine");
  }
  void contract_backward(ContractBackwardArgs args) const {
    const Tensor workspace = empty(weights_, {cuda::contract_backward_workspace(args)});
    args.workspace = mutable_pointer<float>(workspace);
    check_launch(cuda::contract_backward(args, stream_), "contract_backward");
  }
  void weight_grad(const WeightGradArgs& args) const {
    check_launch(cuda::weight_grad(args, stream_), "weight_grad");
  }
  void bias_grad(const BiasGradArgs& args) const {
    check_launch(cuda::bias_grad(args, stream_), "bias_grad");
  }
  void grouped_rows(const GroupedRowsArgs& args) const {
    check_launch(cuda::grouped_rows(args, stream_), "grouped_rows");
  }

 private:
  void* stream_;
  const Tensor& weights_;
};

std::tuple<Tensor, Tensor> moe_experts(const MoeExpertsInputs& in) {
  const DeviceOf device(in.x, "x");
  const MoeCall call(in);
  require_readable(call, in);
  return run_moe_experts(in, call, call.slots, CudaKernels(device, in.weights));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(
    const MoeExpertsBackwardInputs& in) {
  const DeviceOf device(in.x, "x");
  const MoeBackwardCall call(in);
  require_readable(call, in);
  require_chunks(in.grad_y, "grad_y", "hidden size", call.hidden);
  require_chunks(in.preact, "preact", "intermediate size", call.intermediate_size);
  if (in.expand_total) require_chunks(*in.expand_total, "expand_total", "hidden size", call.hidden);
  if (in.contract_total)
    require_chunks(*in.contract_total, "contract_total", "intermediate size",
                   call.intermediate_size);
  return run_moe_experts_backward(call, call.slots, CudaKernels(device, in.weights));
}

FOMOE_CUDA_OPS(m) {
  implement<&moe_experts>(m);
  implement<&moe_experts_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
