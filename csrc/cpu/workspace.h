// A reusable workspace for the temporaries of a call.
//
// Freshly allocated, a temporary of 100 MB costs a tenth of the time of the product that fills it: the
// system faults its pages in and zeroes them each time.
#pragma once

#include <cstdint>

namespace fomoe::cpu {

// At least `bytes` of memory, contents undefined, for the life of the object. The largest freed block
// is kept until the process ends or a larger one replaces it; concurrent calls have a block each.
// Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `bytes`, aligned to a cache line. Throws std::logic_error if the sum of what was taken,
  // each rounded up by `padded`, exceeds the workspace.
  void* take(int64_t bytes);
  static int64_t padded(int64_t bytes) { return (bytes + 127) / 128 * 128; }

 private:
  char* data_;
  int64_t asked_, taken_ = 0;
  int64_t capacity_;
};

}  // namespace fomoe::cpu
