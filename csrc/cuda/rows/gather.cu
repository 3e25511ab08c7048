// gather: each row gets its token's vector; kernels.h, scatter.cuh.
#include "scatter.cuh"

namespace fomoe::cuda {

int gather(const GatherArgs& args, void* stream) {
  const int64_t slots = args.tokens * args.top_k;
  if (slots == 0 || args.hidden == 0) return cudaSuccess;
  const auto body = [&](auto access) {
    using A = decltype(access);
    const ScatterArgs scatter{.tokens_in = args.x,
                              .rows_in = nullptr,
                              .weights = nullptr,
                              .row_of_slot = args.row_of_slot,
                              .row_count = args.row_count,
                              .slots = slots,
                              .columns = args.hidden / A::kWidth,
                              .top_k = args.top_k,
                              .rows_out = args.rows,
                              .dots = nullptr};
    return scatter::launch<A, false, false>(scatter, static_cast<cudaStream_t>(stream));
  };
  return for_widest_access(args.dtype, body, args.hidden, args.x, args.rows);
}

}  // namespace fomoe::cuda
