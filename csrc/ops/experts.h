// Checks that the expert ops share.
#pragma once

#include "common.h"

namespace fomoe::ops {

// Checks `offsets` [R + 1] and returns the number of rows, offsets[R].
inline int64_t check_offsets(const Tensor& offsets, int64_t residents, int64_t slots) {
  check(offsets, "offsets").cpu().dtype(ScalarType::Int).shape({residents + 1}).contiguous();
  const int32_t* at = pointer<int32_t>(offsets);
  require(at[0] == 0, "offsets: starts at ", at[0], ", wanted 0");
  for (int64_t e = 0; e < residents; ++e)
    require(at[e] <= at[e + 1], "offsets: falls from ", at[e], " to ", at[e + 1], " at resident ",
            e, ", wanted a non-decreasing list");
  require(at[residents] <= slots, "offsets: ends at ", at[residents], ", wanted at most the ",
          slots, " rows of the row tensors");
  return at[residents];
}

// Checks an index [S] into `limit` lines for the rows that are used.
inline void check_index(const Tensor& index, const char* name, int64_t slots, int64_t rows,
                        int64_t limit) {
  check(index, name).cpu().dtype(ScalarType::Int).shape({slots}).contiguous();
  const int32_t* at = pointer<int32_t>(index);
  for (int64_t row = 0; row < rows; ++row)
    require(at[row] >= 0 && at[row] < limit, name, ": has ", at[row], " at row ", row,
            ", wanted 0 .. ", limit - 1);
}

// Checks row_of_slot [T, K], T * K = slots.
inline void check_rows(const Tensor& row_of_slot, int64_t tokens, int64_t slots, int64_t rows) {
  check(row_of_slot, "row_of_slot").cpu().dtype(ScalarType::Int).shape({tokens, kAny});
  check(row_of_slot, "row_of_slot").contiguous();
  require(tokens * row_of_slot.size(1) == slots, "row_of_slot: has shape ",
          shape_name(row_of_slot.sizes()), ", wanted one entry for each of ", slots, " slots");
  const int32_t* at = pointer<int32_t>(row_of_slot);
  for (int64_t slot = 0; slot < slots; ++slot)
    require(at[slot] >= -1 && at[slot] < rows, "row_of_slot: has ", at[slot], " at slot ", slot,
            ", wanted -1 .. ", rows - 1);
}

inline int64_t gates(Activation activation) { return is_gated(activation) ? 2 : 1; }

// Expert size from the expand weight [R, G*N, D]; checks both against x [*, D].
inline int64_t check_expand_weight(const Tensor& weight, const Tensor& x, Activation activation) {
  check(weight, "expand_weight").cpu().same_dtype(x, "x").shape({kAny, kAny, x.size(1)});
  check(weight, "expand_weight").contiguous();
  require(weight.size(1) % gates(activation) == 0, "expand_weight: has shape ",
          shape_name(weight.sizes()),
          ", wanted an even size of dimension 1 for a gated activation");
  return weight.size(1) / gates(activation);
}

}  // namespace fomoe::ops
