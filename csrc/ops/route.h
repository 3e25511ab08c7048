// Of route on CPU and CUDA: its inputs, their checks, and the arguments of the kernels.
#pragma once

#include <cmath>

#include "inputs.h"

namespace fomoe::ops {

// Checks logits [T, E] and the flags [E] of the experts that may be chosen.
inline void check_logits(const Tensor& logits, const std::optional<Tensor>& allowed) {
  check(logits, "logits").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  as_int32(logits.size(1), "logits.shape[1] (experts)", 1);
  if (!allowed) return;
  check(*allowed, "allowed").same_device(logits, "logits");
  check(*allowed, "allowed").dtype({ScalarType::Bool, ScalarType::Byte});
  check(*allowed, "allowed").shape({logits.size(1)}).contiguous();
}

inline const uint8_t* flags(const std::optional<Tensor>& allowed) {
  return allowed ? static_cast<const uint8_t*>(allowed->const_data_ptr()) : nullptr;
}

struct RouteInputs : Inputs<schemas::route> {
  using Inputs::Inputs;
  const Tensor& logits = take<"logits">();
  const int64_t top_k = take<"top_k">();
  const int64_t scoring = take<"scoring">();
  const std::optional<Tensor>& selection_bias = take<"selection_bias">();
  const std::optional<Tensor>& allowed = take<"allowed">();
  const int64_t num_groups = take<"num_groups">();
  const int64_t groups_kept = take<"groups_kept">();
  const bool renormalize = take<"renormalize">();
  const double scale = take<"scale">();
  const bool statistics = take<"statistics">();
};

// A call of route: outputs allocated, arguments checked except for values in device memory.
struct RouteCall {
  explicit RouteCall(const RouteInputs& in) {
    check_logits(in.logits, in.allowed);
    const Tensor& logits = in.logits;
    const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = in.top_k;
    if (in.selection_bias) {
      const check bias(*in.selection_bias, "selection_bias");
      bias.same_device(logits, "logits").dtype(ScalarType::Float).shape({experts}).contiguous();
    }
    require(top_k >= 1 && top_k <= experts, "top_k must be in 1 .. ", experts,
            " (the number of experts), got ", top_k);
    const int64_t num_groups = in.num_groups, groups_kept = in.groups_kept;
    require(num_groups >= 1 && num_groups <= experts && experts % num_groups == 0,
            "num_groups must be a divisor of the ", experts, " experts, got ", num_groups);
    require(groups_kept >= 1 && groups_kept <= num_groups, "groups_kept must be in 1 .. ",
            num_groups, " (num_groups), got ", groups_kept);
    require(top_k <= groups_kept * (experts / num_groups), "top_k must be at most ",
            groups_kept * (experts / num_groups), ", the experts of ", groups_kept, " groups, got ",
            top_k);
    require(std::isfinite(in.scale), "scale must be finite, got ", in.scale);
    weights = empty(logits, {tokens, top_k}, ScalarType::Float);
    expert_ids = empty(logits, {tokens, top_k}, ScalarType::Int);
    statistics = empty(logits, {in.statistics ? 2 * experts + 1 : 0}, ScalarType::Long);
    if (in.statistics) fill_zeros(statistics);
    args = {.logits = logits.const_data_ptr(),
            .logits_dtype = dtype_of(logits, "logits"),
            .selection_bias = pointer<float>(in.selection_bias),
            .allowed = flags(in.allowed),
            .tokens = tokens,
            .experts = int32_t(experts),
            .top_k = int32_t(top_k),
            .scoring = as_scoring(in.scoring),
            .groups = int32_t(num_groups),
            .groups_kept = int32_t(groups_kept),
            .renormalize = in.renormalize,
            .scale = float(in.scale),
            .weights = mutable_pointer<float>(weights),
            .expert_ids = mutable_pointer<int32_t>(expert_ids),
            .statistics = in.statistics ? mutable_pointer<int64_t>(statistics) : nullptr};
  }

  RouteArgs args;
  Tensor weights, expert_ids, statistics;
};

struct RouteBackwardInputs : Inputs<schemas::route_backward> {
  using Inputs::Inputs;
  const Tensor& grad_weights = take<"grad_weights">();
  const Tensor& logits = take<"logits">();
  const Tensor& experts = take<"experts">();
  const std::optional<Tensor>& allowed = take<"allowed">();
  const int64_t scoring = take<"scoring">();
  const bool renormalize = take<"renormalize">();
  const double scale = take<"scale">();
};

struct RouteBackwardCall {
  explicit RouteBackwardCall(const RouteBackwardInputs& in) {
    check_logits(in.logits, in.allowed);
    const Tensor &logits = in.logits, &expert_ids = in.experts, &grad_weights = in.grad_weights;
    const int64_t tokens = logits.size(0), experts = logits.size(1);
    check(expert_ids, "experts").same_device(logits, "logits").dtype(ScalarType::Int);
    check(expert_ids, "experts").shape({tokens, kAny}).contiguous();
    const int64_t top_k = expert_ids.size(1);
    check(grad_weights, "grad_weights").same_device(logits, "logits").dtype(ScalarType::Float);
    check(grad_weights, "grad_weights").shape({tokens, top_k}).contiguous();
    grad_logits = empty(logits, {tokens, experts});
    args = {.grad_weights = pointer<float>(grad_weights),
            .logits = logits.const_data_ptr(),
            .logits_dtype = dtype_of(logits, "logits"),
            .expert_ids = pointer<int32_t>(expert_ids),
            .allowed = flags(in.allowed),
            .tokens = tokens,
            .experts = int32_t(experts),
            .top_k = as_int32(top_k, "top_k"),
            .scoring = as_scoring(in.scoring),
            .renormalize = in.renormalize,
            .scale = float(in.scale),
            .grad_logits = grad_logits.mutable_data_ptr()};
  }

  RouteBackwardArgs args;
  Tensor grad_logits;
};

}  // namespace fomoe::ops
