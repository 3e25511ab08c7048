// Memory for the temporaries of one call, kept for the next one.
//
// A temporary of 100 MB that is fresh from the system costs as much as a tenth of the product that
// fills it: the pages are faulted in and zeroed each time.
#pragma once

#include <cstdint>

namespace fomoe::cpu {

// At least `bytes` of memory, contents undefined, for the life of the object. The largest block
// given back is kept until the process ends or a larger one replaces it; calls at the same time
// each have their own. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `bytes`, aligned to a cache line. Throws std::logic_error where all that was taken,
  // each rounded up by `padded`, is more than was asked for.
  void* take(int64_t bytes);
  static int64_t padded(int64_t bytes) { return (bytes + 127) / 128 * 128; }

 private:
  char* data_;
  int64_t asked_, taken_ = 0;
  int64_t capacity_;
};

}  // namespace fomoe::cpu
