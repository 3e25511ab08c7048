// combine and gather, distributed over threads by tokens. One thread adds up a token, in slot order.
#include <algorithm>
#include <cstring>

#include "../parallel.h"
#include "../token_kernels.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kTokensPerTask = 16;

const CombineKernels& kernels() {
  static const CombineKernels& table = choose_table(
      &scalar::combine_table, FOMOE_AVX2_TABLE(combine_table), FOMOE_AVX512_TABLE(combine_table));
  return table;
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Zeroes rows from `first` on.
void clear_rows(void* rows, int64_t first, int64_t slots, int64_t row_bytes) {
  std::memset(static_cast<char*>(rows) + first * row_bytes, 0, size_t((slots - first) * row_bytes));
}

}  // namespace

void gather(const GatherArgs& args) {
  const int64_t row_bytes = args.hidden * element_size(args.dtype);
  if (row_bytes == 0) return;
  const int64_t slots = args.tokens * args.top_k;
  parallel_for(0, args.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * args.top_k; slot < end * args.top_k; ++slot) {
      const int64_t row = args.row_of_slot[slot];
      if (row < 0) continue;
      std::memcpy(static_cast<char*>(args.rows) + row * row_bytes,
                  static_cast<const char*>(args.x) + slot / args.top_k * row_bytes,
                  size_t(row_bytes));
    }
  });
  if (args.row_count != nullptr) clear_rows(args.rows, *args.row_count, slots, row_bytes);
}

void combine(const CombineArgs& args) {
  const CombineKernels& table = kernels();
  parallel_for(0, args.tokens, kTokensPerTask,
               [&](int64_t begin, int64_t end) { table.combine(args, begin, end); });
}

void combine_backward(const CombineBackwardArgs& args) {
  const CombineKernels& table = kernels();
  parallel_for(0, args.tokens, kTokensPerTask,
               [&](int64_t begin, int64_t end) { table.backward(args, begin, end); });
  const int64_t slots = args.tokens * args.top_k;
  const int64_t rows = std::count_if(args.row_of_slot, args.row_of_slot + slots,
                                     [](int32_t row) { return row >= 0; });
  clear_rows(args.grad_rows, rows, slots, args.hidden * element_size(args.dtype));
}

}  // namespace fomoe::cpu
