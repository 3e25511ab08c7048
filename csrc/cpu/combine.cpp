// combine: tokens shared out over threads. A token's sum is one thread's work, in slot order.
#include "parallel.h"
#include "token_kernels.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kTokensPerTask = 16;

const CombineKernels& kernels() {
  static const CombineKernels& table = choose_table(
      &scalar::combine_table, FOMOE_AVX2_TABLE(combine_table), FOMOE_AVX512_TABLE(combine_table));
  return table;
}

}  // namespace

void combine(const CombineArgs& args) {
  const CombineKernels& table = kernels();
  parallel_for(0, args.tokens, kTokensPerTask,
               [&](int64_t begin, int64_t end) { table.combine(args, begin, end); });
}

void combine_backward(const CombineBackwardArgs& args) {
  const CombineKernels& table = kernels();
  parallel_for(0, args.tokens, kTokensPerTask,
               [&](int64_t begin, int64_t end) { table.backward(args, begin, end); });
}

}  // namespace fomoe::cpu
