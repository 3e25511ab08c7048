// The sanitizers' own functions, there only in programs built with them. The runtime itself is never
// instrumented; it tells them about fibers and about which CUDA operations order memory.
#pragma once

#include <cstddef>

extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t*);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void*, size_t);
[[gnu::weak]] void* __asan_region_is_poisoned(void*, size_t);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned);
[[gnu::weak]] void __tsan_destroy_fiber(void*);
[[gnu::weak]] void __tsan_switch_to_fiber(void*, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void*);
[[gnu::weak]] void __tsan_release(void*);
[[gnu::weak]] void __tsan_read_range(void*, unsigned long);
[[gnu::weak]] void __tsan_write_range(void*, unsigned long);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char*, int);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char*, int);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char*, int);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char*, int);
}

namespace fomoe::emulator {

inline void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}
inline void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// While one lives, TSan does not see the runtime's own traffic (malloc and memcpy are intercepted
// although this code is not instrumented). The state belongs to a fiber, so one must not live
// across a switch of fibers.
class Unseen {
 public:
  Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!AnnotateIgnoreReadsEnd) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// A part of the machine that works beside the threads of a block: to TSan one more thread.
class Unit {
 public:
  Unit() = default;
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
  ~Unit() {
    if (fiber_ != nullptr) __tsan_destroy_fiber(fiber_);
  }
  // The unit runs `body`, which must not change fibers.
  template <class Body>
  void act(const Body& body) {
    if (!__tsan_create_fiber) return;
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    void* caller = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, 1);
    body();
    __tsan_switch_to_fiber(caller, 1);
  }

 private:
  void* fiber_ = nullptr;
};

}  // namespace fomoe::emulator
