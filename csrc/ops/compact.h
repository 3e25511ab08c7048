// Of compact on CPU and CUDA: its inputs, their checks, and the arguments of the kernels.
#pragma once

#include "inputs.h"

namespace fomoe::ops {

struct CompactInputs : Inputs<schemas::compact> {
  using Inputs::Inputs;
  const Tensor& experts = take<"experts">();
  const Tensor& resident_index = take<"resident_index">();
  const int64_t num_resident = take<"num_resident">();
  const int64_t tile_rows = take<"tile_rows">();
};

// A call of compact: outputs allocated, arguments checked except for values in device memory.
struct CompactCall {
  explicit CompactCall(const CompactInputs& in) {
    const Tensor &expert_ids = in.experts, &resident_index = in.resident_index;
    const int64_t num_resident = in.num_resident, tile_rows = in.tile_rows;
    check(expert_ids, "experts").dtype(ScalarType::Int).shape({kAny, kAny}).contiguous();
    check(resident_index, "resident_index").same_device(expert_ids, "experts");
    check(resident_index, "resident_index").dtype(ScalarType::Int).shape({kAny}).contiguous();
    const int64_t tokens = expert_ids.size(0), top_k = expert_ids.size(1);
    const int64_t slots = tokens * top_k, experts = resident_index.size(0);
    as_int32(slots, "experts (number of slots)", 0);
    as_int32(experts, "resident_index.shape[0] (experts)", 0);
    require(num_resident >= 0 && num_resident <= experts, "num_resident must be in 0 .. ", experts,
            " (the length of resident_index), got ", num_resident);
    as_int32(tile_rows, "tile_rows", 0);
    token_of_row = empty(expert_ids, {slots});
    slot_of_row = empty(expert_ids, {slots});
    row_of_slot = empty(expert_ids, {tokens, top_k});
    offsets = empty(expert_ids, {num_resident + 1});
    tiles = empty(expert_ids, {max_tiles(slots, num_resident, tile_rows), 2});
    args = {.expert_ids = pointer<int32_t>(expert_ids),
            .resident_index = pointer<int32_t>(resident_index),
            .tokens = tokens,
            .top_k = int32_t(top_k),
            .experts = int32_t(experts),
            .residents = int32_t(num_resident),
            .token_of_row = mutable_pointer<int32_t>(token_of_row),
            .slot_of_row = mutable_pointer<int32_t>(slot_of_row),
            .row_of_slot = mutable_pointer<int32_t>(row_of_slot),
            .offsets = mutable_pointer<int32_t>(offsets),
            .tile_rows = int32_t(tile_rows),
            .tiles = tile_rows > 0 ? mutable_pointer<int32_t>(tiles) : nullptr,
            .workspace = nullptr};
  }

  CompactArgs args;
  Tensor token_of_row, slot_of_row, row_of_slot, offsets, tiles;
};

}  // namespace fomoe::ops
