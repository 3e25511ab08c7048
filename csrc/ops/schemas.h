// The schema of every op: the only place where the order of its arguments is written. C++ takes them
// by name (inputs.h), and so does Python (fomoe_ext/ops/schemas.py).
#pragma once

#include "schema.h"

namespace fomoe::ops::schemas {

inline constexpr Schema route =
    "route(Tensor logits, int top_k, int scoring, Tensor? selection_bias, Tensor? allowed, "
    "int num_groups, int groups_kept, bool renormalize, float scale, bool statistics) "
    "-> (Tensor, Tensor, Tensor)";
inline constexpr Schema route_backward =
    "route_backward(Tensor grad_weights, Tensor logits, Tensor experts, Tensor? allowed, "
    "int scoring, bool renormalize, float scale) -> Tensor";
inline constexpr Schema compact =
    "compact(Tensor experts, Tensor resident_index, int num_resident, int tile_rows) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)";
inline constexpr Schema gather = "gather(Tensor x, Tensor row_of_slot, Tensor offsets) -> Tensor";
inline constexpr Schema combine =
    "combine(Tensor rows, Tensor? weights, Tensor row_of_slot) -> Tensor";
inline constexpr Schema combine_backward =
    "combine_backward(Tensor grad_y, Tensor? rows, Tensor weights, Tensor row_of_slot) -> "
    "(Tensor, Tensor)";
inline constexpr Schema expand =
    "expand(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor token_of_row, "
    "Tensor row_of_slot, Tensor offsets, Tensor tiles, int activation, bool save_preact) "
    "-> (Tensor, Tensor)";
inline constexpr Schema contract =
    "contract(Tensor act, Tensor contract_weight, Tensor? contract_bias, Tensor offsets, "
    "Tensor tiles) -> Tensor";
inline constexpr Schema contract_backward =
    "contract_backward(Tensor grad_y, Tensor contract_weight, Tensor? contract_bias, "
    "Tensor preact, Tensor weights, Tensor token_of_row, Tensor slot_of_row, Tensor offsets, "
    "Tensor tiles, int activation) -> (Tensor, Tensor, Tensor)";
inline constexpr Schema grouped_rows =
    "grouped_rows(Tensor rows, Tensor weight, Tensor offsets, Tensor tiles) -> Tensor";
inline constexpr Schema weight_grad =
    "weight_grad(Tensor left, Tensor right, Tensor? left_index, Tensor? right_index, "
    "Tensor offsets) -> Tensor";
inline constexpr Schema weight_grad_add =
    "weight_grad_add(Tensor(a!) total, Tensor left, Tensor right, Tensor? left_index, "
    "Tensor? right_index, Tensor offsets) -> ()";
inline constexpr Schema bias_grad =
    "bias_grad(Tensor rows, Tensor? index, Tensor? weights, Tensor? slot_of_row, "
    "Tensor offsets) -> Tensor";
inline constexpr Schema activation_backward =
    "activation_backward(Tensor grad_act, Tensor preact, Tensor offsets, int activation) "
    "-> Tensor";
inline constexpr Schema expand_rows_computed = "expand_rows_computed() -> int";
inline constexpr Schema moe_experts =
    "moe_experts(Tensor x, Tensor weights, Tensor token_of_row, Tensor slot_of_row, "
    "Tensor row_of_slot, Tensor offsets, Tensor tiles, Tensor expand_weight, "
    "Tensor? expand_bias, Tensor contract_weight, Tensor? contract_bias, int activation, "
    "bool save_preact) -> (Tensor, Tensor)";
inline constexpr Schema moe_experts_backward =
    "moe_experts_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor token_of_row, "
    "Tensor slot_of_row, Tensor row_of_slot, Tensor offsets, Tensor tiles, "
    "Tensor expand_weight, Tensor? expand_bias, Tensor contract_weight, Tensor? contract_bias, "
    "Tensor preact, int activation, bool need_x, bool need_expand, bool need_contract, "
    "Tensor(a!)? expand_total, Tensor(b!)? contract_total, Tensor(c!)? preact_to_free) -> "
    "(Tensor grad_x, Tensor grad_weights, Tensor grad_expand, Tensor grad_expand_bias, "
    "Tensor grad_contract, Tensor grad_contract_bias)";
inline constexpr Schema delta_encode =
    "delta_encode(Tensor? anchor, Tensor[] local, int[] begins, float[] weights, "
    "Tensor(a!)? error, int numel, int format, int block, bool stochastic, int seed, int first, "
    "Tensor(b!) payload) -> ()";
inline constexpr Schema delta_reduce =
    "delta_reduce(Tensor payloads, Tensor? own, int own_rank, Tensor(a!)? error, int numel, "
    "int format, int block, bool stochastic, int seed, int first, Tensor(b!)? payload, "
    "Tensor(c!)? sum) -> ()";
inline constexpr Schema hash_bits = "hash_bits(Tensor[] tensors) -> Tensor";

inline constexpr const Schema* kAll[] = {
    &route,
    &route_backward,
    &compact,
    &gather,
    &combine,
    &combine_backward,
    &expand,
    &contract,
    &contract_backward,
    &grouped_rows,
    &weight_grad,
    &weight_grad_add,
    &bias_grad,
    &activation_backward,
    &expand_rows_computed,
    &moe_experts,
    &moe_experts_backward,
    &delta_encode,
    &delta_reduce,
    &hash_bits,
};

}  // namespace fomoe::ops::schemas
