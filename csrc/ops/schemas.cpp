// The schema of every op, once. Kernels for a device are registered beside the op's own code.
#include "common.h"

namespace fomoe::ops {
namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(FOMOE_NAMESPACE, m) {
  m.def(
      "route(Tensor logits, int top_k, int scoring, Tensor? selection_bias, Tensor? allowed, "
      "int num_groups, int groups_kept, bool renormalize, float scale, bool statistics) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "route_backward(Tensor grad_weights, Tensor logits, Tensor experts, Tensor? allowed, "
      "int scoring, bool renormalize, float scale) -> Tensor");
  m.def(
      "compact(Tensor experts, Tensor resident_index, int num_resident, int tile_rows) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gather(Tensor x, Tensor row_of_slot, Tensor offsets) -> Tensor");
  m.def("combine(Tensor rows, Tensor? weights, Tensor row_of_slot) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_y, Tensor? rows, Tensor weights, Tensor row_of_slot) -> "
      "(Tensor, Tensor)");
  m.def(
      "expand(Tensor x, Tensor expand_weight, Tensor? expand_bias, Tensor token_of_row, "
      "Tensor row_of_slot, Tensor offsets, Tensor tiles, int activation, bool save_preact) "
      "-> (Tensor, Tensor)");
  m.def(
      "contract(Tensor act, Tensor contract_weight, Tensor? contract_bias, Tensor offsets, "
      "Tensor tiles) -> Tensor");
  m.def(
      "contract_backward(Tensor grad_y, Tensor contract_weight, Tensor? contract_bias, "
      "Tensor preact, Tensor weights, Tensor token_of_row, Tensor slot_of_row, Tensor offsets, "
      "Tensor tiles, int activation) -> (Tensor, Tensor, Tensor)");
  m.def("grouped_rows(Tensor rows, Tensor weight, Tensor offsets, Tensor tiles) -> Tensor");
  m.def(
      "weight_grad(Tensor left, Tensor right, Tensor? left_index, Tensor? right_index, "
      "Tensor offsets) -> Tensor");
  m.def(
      "weight_grad_add(Tensor(a!) total, Tensor left, Tensor right, Tensor? left_index, "
      "Tensor? right_index, Tensor offsets) -> ()");
  m.def(
      "bias_grad(Tensor rows, Tensor? index, Tensor? weights, Tensor? slot_of_row, "
      "Tensor offsets) -> Tensor");
  m.def(
      "activation_backward(Tensor grad_act, Tensor preact, Tensor offsets, int activation) "
      "-> Tensor");
  m.def("expand_rows_computed() -> int");
  m.def(
      "moe_experts(Tensor x, Tensor weights, Tensor token_of_row, Tensor slot_of_row, "
      "Tensor row_of_slot, Tensor offsets, Tensor tiles, Tensor expand_weight, "
      "Tensor? expand_bias, Tensor contract_weight, Tensor? contract_bias, int activation, "
      "bool save_preact) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor token_of_row, "
      "Tensor slot_of_row, Tensor row_of_slot, Tensor offsets, Tensor tiles, "
      "Tensor expand_weight, Tensor? expand_bias, Tensor contract_weight, Tensor? contract_bias, "
      "Tensor preact, int activation, bool need_x, bool need_expand, bool need_contract, "
      "Tensor(a!)? expand_total, Tensor(b!)? contract_total) -> (Tensor grad_x, "
      "Tensor grad_weights, Tensor grad_expand, Tensor grad_expand_bias, Tensor grad_contract, "
      "Tensor grad_contract_bias)");
  m.def(
      "delta_encode(Tensor? anchor, Tensor[] local, int[] begins, float[] weights, "
      "Tensor(a!)? error, int numel, int format, int block, bool stochastic, int seed, int first, "
      "Tensor(b!) payload) -> ()");
  m.def(
      "delta_reduce(Tensor payloads, Tensor? own, int own_rank, Tensor(a!)? error, int numel, "
      "int format, int block, bool stochastic, int seed, int first, Tensor(b!)? payload, "
      "Tensor(c!)? sum) -> ()");
  m.def("hash_bits(Tensor[] tensors) -> Tensor");
}

}  // namespace
}  // namespace fomoe::ops
