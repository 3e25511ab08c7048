#include "parallel.h"

#include <exception>
#include <mutex>

namespace fomoe::cpu {
namespace {

std::atomic<ParallelFor> g_parallel_for{nullptr};
std::atomic<int (*)()> g_num_threads{nullptr};

// Keeps the first exception of a body: it must not pass through the pool, which may be a C interface.
struct Guarded {
  ParallelBody body;
  void* context;
  std::mutex mutex;
  std::exception_ptr error;
};

void call_guarded(int64_t begin, int64_t end, void* context) {
  auto* guarded = static_cast<Guarded*>(context);
  try {
    guarded->body(begin, end, guarded->context);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(guarded->mutex);
    if (!guarded->error) guarded->error = std::current_exception();
  }
}

}  // namespace

void set_parallel_for(ParallelFor parallel_for, int (*num_threads)()) {
  g_num_threads = num_threads;
  g_parallel_for = parallel_for;
}

int num_workers() {
  int (*num_threads)() = g_num_threads;
  return g_parallel_for.load() && num_threads ? std::max(1, num_threads()) : 1;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  const ParallelFor parallel_for = g_parallel_for;
  if (parallel_for == nullptr || end - begin <= grain) return body(begin, end, context);
  Guarded guarded{body, context, {}, {}};
  parallel_for(begin, end, grain, call_guarded, &guarded);
  if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace fomoe::cpu
