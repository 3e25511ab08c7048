// route, distributed over threads by tokens.
#include <atomic>

#include "../parallel.h"
#include "../token_kernels.h"

namespace fomoe::cpu {

namespace {

constexpr int64_t kTokensPerTask = 64;

const RouteKernels& kernels() {
  static const RouteKernels& table = choose_table(
      &scalar::route_table, FOMOE_AVX2_TABLE(route_table), FOMOE_AVX512_TABLE(route_table));
  return table;
}

}  // namespace

bool route(const RouteArgs& args) {
  const RouteKernels& table = kernels();
  std::atomic<bool> valid{true};
  parallel_for(0, args.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    if (!table.route(args, begin, end)) valid.store(false, std::memory_order_relaxed);
  });
  return valid.load();
}

void route_backward(const RouteBackwardArgs& args) {
  const RouteKernels& table = kernels();
  parallel_for(0, args.tokens, kTokensPerTask,
               [&](int64_t begin, int64_t end) { table.backward(args, begin, end); });
}

}  // namespace fomoe::cpu
