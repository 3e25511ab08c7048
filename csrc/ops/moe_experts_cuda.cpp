// expand, contract and combine in one torch op on CUDA, and its backward. Only the pre-activations
// are kept between them. The host does not wait for the device, so values are not checked.
#include <tuple>

#include "experts_cuda.h"
#include "moe_experts.h"

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

std::tuple<Tensor, Tensor> moe_experts(const MoeExpertsInputs& in) {
  const DeviceOf device(in.x, "x");
  const MoeCall call(in);
  require_readable(call, in);
  void* stream = device.stream();
  const Tensor preact = empty(in.x, {in.save_preact ? call.slots : 0, call.preact_width()});
  const Tensor act = empty(in.x, {call.slots, call.intermediate_size});
  const Tensor rows = empty(in.x, {call.slots, call.hidden});
  const Tensor y = empty(in.x, {call.tokens, call.hidden});
  check_launch(cuda::expand(call.expand(act.mutable_data_ptr(),
                                        in.save_preact ? preact.mutable_data_ptr() : nullptr),
                            stream),
               "expand");
  check_launch(cuda::contract(call.contract(act.const_data_ptr(), rows.mutable_data_ptr()), stream),
               "contract");
  check_launch(cuda::combine(call.combine(rows.const_data_ptr(), true, y), stream), "combine");
  return {y, preact};
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
  void* stream = device.stream();
  const Tensor grad_preact = empty(in.x, {call.slots, call.preact_width()});
  {
    const Tensor scaled_act = empty(in.x, {call.slots, call.intermediate_size});
    ContractBackwardArgs args =
        call.contract_backward(grad_preact.mutable_data_ptr(), scaled_act.mutable_data_ptr());
    const Tensor workspace = empty(in.weights, {cuda::contract_backward_workspace(args)});
    args.workspace = mutable_pointer<float>(workspace);
    check_launch(cuda::contract_backward(args, stream), "contract_backward");
    if (in.need_contract)
      check_launch(
          cuda::weight_grad(call.contract_weight_grad(scaled_act.const_data_ptr()), stream),
          "weight_grad");
  }
  if (call.at_contract_bias != nullptr)
    check_launch(cuda::bias_grad(call.contract_bias_grad(), stream), "bias_grad");
  if (in.need_expand)
    check_launch(cuda::weight_grad(call.expand_weight_grad(grad_preact.const_data_ptr()), stream),
                 "weight_grad");
  if (call.at_expand_bias != nullptr)
    check_launch(cuda::bias_grad(call.expand_bias_grad(grad_preact.const_data_ptr()), stream),
                 "bias_grad");
  if (in.need_x) {
    const Tensor rows = empty(in.x, {call.slots, call.hidden});
    check_launch(cuda::grouped_rows(
                     call.grad_rows(grad_preact.const_data_ptr(), rows.mutable_data_ptr()), stream),
                 "grouped_rows");
    check_launch(cuda::combine(call.combine(rows.const_data_ptr(), false, call.grad_x), stream),
                 "combine");
  }
  return {call.grad_x,           call.grad_weights,  call.grad_expand,
          call.grad_expand_bias, call.grad_contract, call.grad_contract_bias};
}

FOMOE_CUDA_OPS(m) {
  implement<&moe_experts>(m);
  implement<&moe_experts_backward>(m);
}

}  // namespace
}  // namespace fomoe::ops
