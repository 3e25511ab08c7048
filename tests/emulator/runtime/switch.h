// Leaving one stack for another.
#pragma once

namespace fomoe::emulator {

// A stack that is not running.
struct Context {
  void* state = nullptr;  // the saved stack pointer, or a ucontext_t
};

// Makes `to` start `entry` on the stack [bottom, bottom + bytes) when it is first switched to.
// `entry` must not return.
void prepare(Context& to, void* bottom, unsigned long bytes, void (*entry)());
void switch_context(Context& from, Context& to);
void forget(Context& context);  // frees what prepare took

}  // namespace fomoe::emulator
