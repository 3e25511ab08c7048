// The emulator as kernels and the CPU twins in csrc/cuda/arch see it: the running CUDA thread, the
// ways in which threads meet, shared memory, launches and errors. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr uint64_t size() const { return uint64_t(x) * y * z; }
};

// Where a call stands in the kernel's source, for messages. Last parameter of everything that
// can fail or wait.
struct Here {
  const char* file;
  int line;
  constexpr Here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

namespace fomoe::emulator {

struct Block;

struct Thread {
  uint3 index, block_index;
  dim3 block_size, grid_size;
  unsigned linear, lane, warp;
  Block* block;
};
extern Thread* current;  // one operating system thread at a time runs kernels

// Abandons the launch with a message that ends with place, thread and schedule.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Here here, const char* format, ...);

// ---- meeting points -------------------------------------------------------------------------------

// __syncthreads: all threads of the block that have not exited.
void sync_block(Here here);
// A named barrier for `threads` threads of the block; `wait` false = arrive only.
void named_barrier(unsigned id, unsigned threads, bool wait, Here here);

// All lanes of `mask` meet; the last to arrive runs `combine(payloads, lanes)`, where payloads[l] is
// what lane l brought and `lanes` are those that came. `orders_memory`: as __syncwarp does.
using Combine = void (*)(void** payloads, uint32_t lanes);
void meet_warp(uint32_t mask, const char* name, void* payload, Combine combine, bool orders_memory,
               Here here);

// Other threads may run now: where a race could show.
void maybe_yield();
// A failed poll: others run; reports a livelock when nobody gets anywhere.
void yield_polling(Here here);

// ---- memory ---------------------------------------------------------------------------------------

// The block's array that belongs to `key`, made at the first call: exact size, 0xff bytes.
void* shared_array(const void* key, size_t bytes);
unsigned char* dynamic_shared();

// ---- launches -------------------------------------------------------------------------------------

// Runs all threads, `cluster` blocks at a time together; a cudaError_t.
int run_grid(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes, const void* kernel,
             void (*body)(void*), void* context);

template <class... Parameters, class... Arguments>
int launch(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes, void (*kernel)(Parameters...),
           Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  return run_grid(
      grid, block, cluster, dynamic_bytes, reinterpret_cast<const void*>(kernel),
      [](void* context) {
        auto* c = static_cast<Call*>(context);
        std::apply(c->kernel, c->arguments);
      },
      &call);
}

// ---- values of up to 8 bytes as they travel between lanes -------------------------------------------

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A shuffle: the value of lane `source` (poison where it does not take part).
uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* name, Here here);
uint32_t ballot(uint32_t mask, bool vote, Here here);
uint32_t match_any(uint32_t mask, uint64_t value, Here here);
// Every lane gets fold(... fold(v0, v1) ..., vn) over the lanes of the mask.
uint32_t reduce(uint32_t mask, uint32_t value, uint32_t (*fold)(uint32_t, uint32_t),
                const char* name, Here here);
// What all lanes of the warp bring alike.
int warp_uniform(int value, Here here);

}  // namespace fomoe::emulator

#define FOMOE_EMULATED_SHARED(type, name, ...) \
  using name##_array = type __VA_ARGS__;       \
  static const char name##_key = 0;            \
  auto& name = *static_cast<name##_array*>(    \
      ::fomoe::emulator::shared_array(&name##_key, sizeof(name##_array)))
