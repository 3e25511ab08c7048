// What the CPU and the CUDA op of route check alike, and the arguments they hand on.
#pragma once

#include <cmath>

#include "common.h"

namespace fomoe::ops {

// Checks logits [T, E] and the flags [E] of the experts that may be chosen.
inline void check_logits(const Tensor& logits, const std::optional<Tensor>& allowed) {
  check(logits, "logits").dtype(kFloatTypes).shape({kAny, kAny}).contiguous();
  as_int32(logits.size(1), "logits: experts (dimension 1)", 1);
  if (!allowed) return;
  check(*allowed, "allowed").same_device(logits, "logits");
  check(*allowed, "allowed").dtype({ScalarType::Bool, ScalarType::Byte});
  check(*allowed, "allowed").shape({logits.size(1)}).contiguous();
}

// A call of route: outputs allocated, arguments checked but for values in device memory.
struct RouteCall {
  RouteCall(const Tensor& logits, int64_t top_k, int64_t scoring,
            const std::optional<Tensor>& selection_bias, const std::optional<Tensor>& allowed,
            int64_t num_groups, int64_t groups_kept, bool renormalize, double scale,
            bool with_statistics) {
    check_logits(logits, allowed);
    const int64_t tokens = logits.size(0), experts = logits.size(1);
    if (selection_bias) {
      check(*selection_bias, "selection_bias").same_device(logits, "logits");
      check(*selection_bias, "selection_bias").dtype(ScalarType::Float);
      check(*selection_bias, "selection_bias").shape({experts}).contiguous();
    }
    require(top_k >= 1 && top_k <= experts, "top_k: got ", top_k, ", wanted 1 .. ", experts,
            " (the number of experts)");
    require(num_groups >= 1 && num_groups <= experts && experts % num_groups == 0,
            "num_groups: got ", num_groups, ", wanted a divisor of the ", experts, " experts");
    require(groups_kept >= 1 && groups_kept <= num_groups, "groups_kept: got ", groups_kept,
            ", wanted 1 .. ", num_groups, " (num_groups)");
    require(top_k <= groups_kept * (experts / num_groups), "top_k: got ", top_k,
            ", wanted at most ", groups_kept * (experts / num_groups), ", the experts of ",
            groups_kept, " groups");
    require(std::isfinite(scale), "scale: got ", scale, ", wanted a finite number");
    weights = empty(logits, {tokens, top_k}, ScalarType::Float);
    expert_ids = empty(logits, {tokens, top_k}, ScalarType::Int);
    statistics = empty(logits, {with_statistics ? 2 * experts + 1 : 0}, ScalarType::Long);
    torch::stable::zero_(statistics);
    args = {.logits = logits.const_data_ptr(),
            .logits_dtype = dtype_of(logits, "logits"),
            .selection_bias = pointer<float>(selection_bias),
            .allowed = allowed ? static_cast<const uint8_t*>(allowed->const_data_ptr()) : nullptr,
            .tokens = tokens,
            .experts = int32_t(experts),
            .top_k = int32_t(top_k),
            .scoring = as_scoring(scoring),
            .groups = int32_t(num_groups),
            .groups_kept = int32_t(groups_kept),
            .renormalize = renormalize,
            .scale = float(scale),
            .weights = mutable_pointer<float>(weights),
            .expert_ids = mutable_pointer<int32_t>(expert_ids),
            .statistics = with_statistics ? mutable_pointer<int64_t>(statistics) : nullptr};
  }

  RouteArgs args;
  Tensor weights, expert_ids, statistics;
};

struct RouteBackwardCall {
  RouteBackwardCall(const Tensor& grad_weights, const Tensor& logits, const Tensor& expert_ids,
                    const std::optional<Tensor>& allowed, int64_t scoring, bool renormalize,
                    double scale) {
    check_logits(logits, allowed);
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
            .allowed = allowed ? static_cast<const uint8_t*>(allowed->const_data_ptr()) : nullptr,
            .tokens = tokens,
            .experts = int32_t(experts),
            .top_k = as_int32(top_k, "top_k"),
            .scoring = as_scoring(scoring),
            .renormalize = renormalize,
            .scale = float(scale),
            .grad_logits = grad_logits.mutable_data_ptr()};
  }

  RouteBackwardArgs args;
  Tensor grad_logits;
};

}  // namespace fomoe::ops
