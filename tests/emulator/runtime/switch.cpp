#include "switch.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(FOMOE_EMULATOR_UCONTEXT)

// Pushes what a called function must preserve, changes stacks, pops the same.
extern "C" void fomoe_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl fomoe_emulator_switch
.hidden fomoe_emulator_switch
.type fomoe_emulator_switch,@function
fomoe_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fomoe_emulator_switch, .-fomoe_emulator_switch
)");

namespace fomoe::emulator {

void prepare(Context& to, void* bottom, unsigned long bytes, void (*entry)()) {
  // As after a call: the stack pointer is 8 off a multiple of 16 when entry begins.
  auto* top = reinterpret_cast<void**>((uintptr_t(bottom) + bytes) & ~uintptr_t(15));
  *--top = nullptr;  // entry's return address: none
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  to.state = top;
}

void switch_context(Context& from, Context& to) { fomoe_emulator_switch(&from.state, to.state); }

void forget(Context& context) { context.state = nullptr; }

}  // namespace fomoe::emulator

#else  // any machine, with two system calls per switch

#include <ucontext.h>

namespace fomoe::emulator {
namespace {

ucontext_t* state_of(Context& context) {
  if (context.state == nullptr) context.state = new ucontext_t;
  return static_cast<ucontext_t*>(context.state);
}

}  // namespace

void prepare(Context& to, void* bottom, unsigned long bytes, void (*entry)()) {
  ucontext_t* state = state_of(to);
  getcontext(state);
  state->uc_stack.ss_sp = bottom;
  state->uc_stack.ss_size = bytes;
  state->uc_link = nullptr;
  makecontext(state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(state_of(from), state_of(to)); }

void forget(Context& context) {
  delete static_cast<ucontext_t*>(context.state);
  context.state = nullptr;
}

}  // namespace fomoe::emulator

#endif
