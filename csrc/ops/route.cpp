// route and its gradient as torch ops on the CPU.
#include <cmath>
#include <tuple>

#include "common.h"

namespace fomoe::ops {
namespace {

// Checks logits [T, E] and the flags [E] of the experts that may be chosen.
void check_inputs(const Tensor& logits, const std::optional<Tensor>& allowed) {
  check(logits, "logits").cpu().dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  as_int32(logits.size(1), "logits: experts (dimension 1)", 1);
  if (!allowed) return;
  check(*allowed, "allowed").cpu().dtype({ScalarType::Bool, ScalarType::Byte});
  check(*allowed, "allowed").shape({logits.size(1)}).contiguous();
}

void check_bias(const std::optional<Tensor>& bias, int64_t experts) {
  if (!bias) return;
  check(*bias, "selection_bias").cpu().dtype(ScalarType::Float).shape({experts}).contiguous();
  const float* values = pointer<float>(*bias);
  for (int64_t e = 0; e < experts; ++e)
    require(std::isfinite(values[e]), "selection_bias: is ", values[e], " at expert ", e,
            ", wanted a finite number");
}

// One byte per expert whichever of the two dtypes it has.
const uint8_t* flags(const std::optional<Tensor>& allowed) {
  return allowed ? static_cast<const uint8_t*>(allowed->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, int64_t scoring,
                                 const std::optional<Tensor>& selection_bias,
                                 const std::optional<Tensor>& allowed, int64_t num_groups,
                                 int64_t groups_kept, bool renormalize, double scale) {
  check_inputs(logits, allowed);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_bias(selection_bias, experts);
  require(top_k >= 1 && top_k <= experts, "top_k: got ", top_k, ", wanted 1 .. ", experts,
          " (the number of experts)");
  require(num_groups >= 1 && num_groups <= experts && experts % num_groups == 0, "num_groups: got ",
          num_groups, ", wanted a divisor of the ", experts, " experts");
  require(groups_kept >= 1 && groups_kept <= num_groups, "groups_kept: got ", groups_kept,
          ", wanted 1 .. ", num_groups, " (num_groups)");
  require(top_k <= groups_kept * (experts / num_groups), "top_k: got ", top_k, ", wanted at most ",
          groups_kept * (experts / num_groups), ", the experts of ", groups_kept, " groups");
  require(std::isfinite(scale), "scale: got ", scale, ", wanted a finite number");
  Tensor weights = empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor expert_ids = empty(logits, {tokens, top_k}, ScalarType::Int);
  const bool valid = cpu::route({.logits = logits.const_data_ptr(),
                                 .logits_dtype = dtype_of(logits, "logits"),
                                 .selection_bias = pointer<float>(selection_bias),
                                 .allowed = flags(allowed),
                                 .tokens = tokens,
                                 .experts = int32_t(experts),
                                 .top_k = int32_t(top_k),
                                 .scoring = as_scoring(scoring),
                                 .groups = int32_t(num_groups),
                                 .groups_kept = int32_t(groups_kept),
                                 .renormalize = renormalize,
                                 .scale = float(scale),
                                 .weights = mutable_pointer<float>(weights),
                                 .expert_ids = mutable_pointer<int32_t>(expert_ids)});
  require(valid, "logits: contain NaN or, under softmax, a row whose largest value is infinite; ",
          "wanted finite numbers");
  return {weights, expert_ids};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                      const std::optional<Tensor>& allowed, int64_t scoring, bool renormalize,
                      double scale) {
  check_inputs(logits, allowed);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check(expert_ids, "experts").cpu().dtype(ScalarType::Int).shape({tokens, kAny}).contiguous();
  const int64_t top_k = expert_ids.size(1);
  check(grad_weights, "grad_weights").cpu().dtype(ScalarType::Float).shape({tokens, top_k});
  check(grad_weights, "grad_weights").contiguous();
  const int32_t* ids = pointer<int32_t>(expert_ids);
  for (int64_t slot = 0; slot < tokens * top_k; ++slot)
    require(ids[slot] >= -1 && ids[slot] < experts, "experts: has ", ids[slot], " at slot ", slot,
            ", wanted -1 .. ", experts - 1);
  Tensor grad_logits = empty(logits, {tokens, experts});
  cpu::route_backward({.grad_weights = pointer<float>(grad_weights),
                       .logits = logits.const_data_ptr(),
                       .logits_dtype = dtype_of(logits, "logits"),
                       .expert_ids = ids,
                       .allowed = flags(allowed),
                       .tokens = tokens,
                       .experts = int32_t(experts),
                       .top_k = as_int32(top_k, "top_k"),
                       .scoring = as_scoring(scoring),
                       .renormalize = renormalize,
                       .scale = float(scale),
                       .grad_logits = grad_logits.mutable_data_ptr()});
  return grad_logits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fomoe, m) {
  m.def(
      "route(Tensor logits, int top_k, int scoring, Tensor? selection_bias, Tensor? allowed, "
      "int num_groups, int groups_kept, bool renormalize, float scale) -> (Tensor, Tensor)");
  m.def(
      "route_backward(Tensor grad_weights, Tensor logits, Tensor experts, Tensor? allowed, "
      "int scoring, bool renormalize, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fomoe, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace
}  // namespace fomoe::ops
