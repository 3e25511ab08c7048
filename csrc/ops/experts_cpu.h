// Checks that only the CPU ops of the grouped GEMMs make: the values of the row tables.
#pragma once

#include <cstring>

#include "experts.h"

namespace fomoe::ops {

// Checks the values of offsets [R + 1] and returns the number of rows, offsets[R].
inline int64_t rows_of(const int32_t* at, int64_t residents, int64_t slots) {
  require(at[0] == 0, "offsets must start at 0, got ", at[0]);
  for (int64_t e = 0; e < residents; ++e)
    require(at[e] <= at[e + 1], "offsets must not decrease, got ", at[e], " before ", at[e + 1],
            " at resident ", e);
  require(at[residents] <= slots, "offsets must end at ", slots,
          " (the rows of the row tensors) at most, got ", at[residents]);
  return at[residents];
}

// Checks that the index of each row is that of one of `limit` lines; null is no index.
inline void check_index(const int32_t* at, const char* name, int64_t rows, int64_t limit) {
  if (at == nullptr) return;
  for (int64_t row = 0; row < rows; ++row)
    require(at[row] >= 0 && at[row] < limit, name, " must be in 0 .. ", limit - 1, ", got ",
            at[row], " at row ", row);
}

// Checks row_of_slot: -1 or a row in every entry.
inline void check_rows(const int32_t* at, int64_t slots, int64_t rows) {
  for (int64_t slot = 0; slot < slots; ++slot)
    require(at[slot] >= -1 && at[slot] < rows, "row_of_slot must be in -1 .. ", rows - 1, ", got ",
            at[slot], " at slot ", slot);
}

// Zeroes the rows past the last one that was computed: public results have no undefined rows.
inline void zero_tail(const Tensor& rows_by_width, int64_t rows) {
  const int64_t row_bytes = rows_by_width.size(1) * int64_t(rows_by_width.element_size());
  std::memset(static_cast<char*>(rows_by_width.mutable_data_ptr()) + rows * row_bytes, 0,
              size_t((rows_by_width.size(0) - rows) * row_bytes));
}

}  // namespace fomoe::ops
