// Loops over a pool of threads. set_parallel_for (kernels.h) installs the pool; until
// then every loop runs on the calling thread. Results must not depend on how work is split.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../kernels.h"

namespace fomoe::cpu {

// Threads a loop may use, at least 1.
int num_workers();

// Runs body on disjoint ranges that cover [begin, end), each of at least `grain` items except
// possibly the last. The first exception thrown by a body is rethrown here.
void run_parallel(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// Everything below is `static`: a translation unit compiled for AVX-512 must keep its own copy.

// body(int64_t begin, int64_t end) on even contiguous ranges.
template <class Body>
static inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  const auto call = [](int64_t b, int64_t e, void* context) {
    (*static_cast<const Body*>(context))(b, e);
  };
  run_parallel(begin, end, grain, call, const_cast<Body*>(&body));
}

// body(int64_t item, int worker) for every item of [0, items), each exactly once. Workers pull the
// next item when they are done with one, so that uneven items balance. `worker` is in
// [0, num_workers()) and no two bodies run with the same worker at once: use it to index scratch.
template <class Body>
static inline void parallel_items(int64_t items, const Body& body) {
  if (items <= 0) return;
  const int64_t workers = std::min<int64_t>(num_workers(), items);
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
        body(item, static_cast<int>(worker));
      }
    }
  });
}

}  // namespace fomoe::cpu
