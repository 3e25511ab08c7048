// Lends torch's thread pool to the CPU kernels, once, when the library is loaded.
#include "common.h"

namespace fomoe::ops {
namespace {

void torch_pool(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context) {
  require_success(torch_parallel_for(begin, end, grain, body, context), "torch_parallel_for");
}

int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

const bool installed = [] {
  cpu::set_parallel_for(torch_pool, torch_threads);
  return true;
}();

}  // namespace
}  // namespace fomoe::ops
