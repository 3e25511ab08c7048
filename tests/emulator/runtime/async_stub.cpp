#include "scheduler.h"
namespace fomoe::emulator {
struct AsyncState {};
AsyncState* make_async_state() { return new AsyncState; }
void free_async_state(AsyncState* s) { delete s; }
std::string unfinished(const Block&) { return {}; }
}  // namespace fomoe::emulator
