// moe_experts and its backward as sequences of kernels, the same on CPU and CUDA, ordered so that little
// memory is alive at once: every tensor is allocated by the step that fills it and freed by the last
// step that reads it.
//
// With S slots, T tokens, D hidden and N intermediate size and G*N columns of pre-activations:
// * rows [S, D] of contract are alive together with either act [S, N] or y, not with both;
// * grad_preact [S, G*N] overwrites the pre-activations where the caller gives them up. The gradient
//   of an element depends on that element alone, and the kernels read it before they write it;
// * the gradient of x, with temporary rows [S, D], comes before the gradients of the weights that need
//   no more temporaries;
// * that of the contract weight comes first, which frees scaled_act [S, N] early, or last, when
//   grad_preact is free: whichever has the lower peak. The order of kernels changes no bits.
//
// Nothing here is split by experts: on CUDA the host does not know where the rows of an expert begin
// without waiting for the device, so a split would bound no buffer. Splitting scaled_act by columns
// would be possible, but where the weights' gradients are made they are what the peak consists of.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "moe_experts.h"

namespace fomoe::ops {

// `row_count`: how many rows the temporaries must hold. `Kernels` runs those of kernels.h for a device.
// Rows of the second result past the last one computed are undefined.
template <class Kernels>
std::tuple<Tensor, Tensor> run_moe_experts(const MoeExpertsInputs& in, const MoeCall& call,
                                           int64_t row_count, const Kernels& kernels) {
  const Tensor preact = empty(in.x, {in.save_preact ? call.slots : 0, call.preact_width()});
  std::optional<Tensor> act = empty(in.x, {row_count, call.intermediate_size});
  kernels.expand(
      call.expand(act->mutable_data_ptr(), in.save_preact ? preact.mutable_data_ptr() : nullptr));
  const Tensor rows = empty(in.x, {row_count, call.hidden});
  kernels.contract(call.contract(act->const_data_ptr(), rows.mutable_data_ptr()));
  act.reset();
  const Tensor y = empty(in.x, {call.tokens, call.hidden});
  kernels.combine(call.combine(rows.const_data_ptr(), true, y));
  return {y, preact};
}

// Elements alive at the peak of the backward, beside what the caller holds, when the gradient of the
// contract weight comes before that of the expand weight, and after it.
struct BackwardPeaks {
  BackwardPeaks(const MoeBackwardCall& call, int64_t row_count) {
    const int64_t preact = row_count * call.preact_width();
    const int64_t act = row_count * call.intermediate_size;
    const int64_t rows = call.in.need_x ? row_count * call.hidden : 0;
    const int64_t x = call.in.need_x ? call.tokens * call.hidden : 0;
    const int64_t contract =
        call.makes_contract() ? call.residents * call.hidden * call.intermediate_size : 0;
    const int64_t expand =
        call.makes_expand() ? call.residents * call.preact_width() * call.hidden : 0;
    contract_first = preact + contract + std::max({act, rows + x, x + expand});
    contract_last = act + x + std::max({preact + rows, preact + expand, expand + contract});
  }
  int64_t contract_first, contract_last;
};

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_moe_experts_backward(
    const MoeBackwardCall& call, int64_t row_count, const Kernels& kernels) {
  const MoeExpertsBackwardInputs& in = call.in;
  const Tensor grad_weights = call.new_grad_weights();
  std::optional<Tensor> grad_preact = in.preact_to_free;
  if (!grad_preact) grad_preact = empty(in.x, {row_count, call.preact_width()});
  std::optional<Tensor> scaled_act = empty(in.x, {row_count, call.intermediate_size});
  kernels.contract_backward(call.contract_backward(grad_preact->mutable_data_ptr(),
                                                   scaled_act->mutable_data_ptr(), grad_weights));
  const Tensor grad_contract_bias = call.new_grad_contract_bias();
  if (call.at_contract_bias) kernels.bias_grad(call.contract_bias_grad(grad_contract_bias));

  const auto contract_weight = [&] {
    const Tensor grad = call.new_grad_contract();
    if (in.need_contract)
      kernels.weight_grad(call.contract_weight_grad(scaled_act->const_data_ptr(), grad));
    scaled_act.reset();
    return grad;
  };
  const BackwardPeaks peaks(call, row_count);
  std::optional<Tensor> grad_contract;
  if (peaks.contract_first <= peaks.contract_last) grad_contract = contract_weight();

  std::optional<Tensor> grad_x;
  if (in.need_x) {
    const Tensor rows = empty(in.x, {row_count, call.hidden});
    kernels.grouped_rows(call.grad_rows(grad_preact->const_data_ptr(), rows.mutable_data_ptr()));
    grad_x = call.new_grad_x();
    kernels.combine(call.combine(rows.const_data_ptr(), false, *grad_x));
  } else {
    grad_x = call.new_grad_x();
  }
  const Tensor grad_expand = call.new_grad_expand();
  if (in.need_expand)
    kernels.weight_grad(call.expand_weight_grad(grad_preact->const_data_ptr(), grad_expand));
  const Tensor grad_expand_bias = call.new_grad_expand_bias();
  if (call.at_expand_bias)
    kernels.bias_grad(call.expand_bias_grad(grad_preact->const_data_ptr(), grad_expand_bias));
  if (in.preact_to_free) give_back(*in.preact_to_free);
  grad_preact.reset();

  if (!grad_contract) grad_contract = contract_weight();
  return {*grad_x, grad_weights, grad_expand, grad_expand_bias, *grad_contract, grad_contract_bias};
}

}  // namespace fomoe::ops
