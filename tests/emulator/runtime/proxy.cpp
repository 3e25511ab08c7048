// The async proxy's own view of shared memory, which ordinary stores and cp.async do not reach until
// fence.proxy.async: a shadow of each array.
//
// Landings by cp.async are numbered, in the order in which somebody could know of them: who waited for
// them, or met who did. A fence shows the async proxy those that its thread knows of, until then it
// sees 0xff there.
#include <algorithm>
#include <cstring>

#include "../include/emulator_async.h"
#include "async.h"
#include "sanitizers.h"

namespace fomoe::emulator {
namespace {

constexpr size_t kChunk = 16;  // bytes of a cp.async
constexpr uint64_t kOnItsWay = ~uint64_t(0);

}  // namespace

const SharedArray* array_of(Block& block, const void* p, size_t bytes) {
  static SharedArray dynamic;
  const auto* at = static_cast<const unsigned char*>(p);
  const auto holds = [&](const unsigned char* memory, size_t size) {
    return memory != nullptr && at >= memory && at + bytes <= memory + size;
  };
  for (const SharedArray& array : block.arrays)
    if (holds(array.memory, array.bytes)) return &array;
  if (!holds(block.dynamic, block.dynamic_bytes)) return nullptr;
  dynamic = {nullptr, block.dynamic, block.dynamic_bytes};
  return &dynamic;
}

namespace {

unsigned char* shadow_of(Block& block, const unsigned char* p, size_t bytes) {
  const SharedArray* array = array_of(block, p, bytes);
  auto [place, is_new] = proxy_view(block).shadows.try_emplace(array->memory);
  if (is_new) place->second.assign(array->bytes, 0xff);
  return place->second.data() + (p - array->memory);
}

// The async proxy sees what is in shared memory now, but for landings that no fence has shown it.
void refresh_shadows() {
  Block& block = *self()->block;
  ProxyView& view = proxy_view(block);
  const auto refresh = [&](const unsigned char* memory, size_t bytes) {
    if (memory == nullptr) return;
    unsigned char* shadow = shadow_of(block, memory, bytes);
    std::memcpy(shadow, memory, bytes);
    const auto found = view.landings.find(memory);
    if (found == view.landings.end()) return;
    for (size_t chunk = 0; chunk < bytes / kChunk; ++chunk)
      if (found->second[chunk] > view.fenced) std::memset(shadow + chunk * kChunk, 0xff, kChunk);
  };
  for (const SharedArray& array : block.arrays) refresh(array.memory, array.bytes);
  refresh(block.dynamic, block.dynamic_bytes);
  view.stale = false;
}

}  // namespace

void hide_from_proxy(const unsigned char* chunk) {
  Block& block = *self()->block;
  const SharedArray* array = array_of(block, chunk, kChunk);
  ProxyView& view = proxy_view(block);
  std::vector<uint64_t>& landings = view.landings[array->memory];
  if (landings.empty()) landings.resize(array->bytes / kChunk);
  landings[size_t(chunk - array->memory) / kChunk] = kOnItsWay;
  if (view.shadows.contains(array->memory))
    std::memset(shadow_of(block, chunk, kChunk), 0xff, kChunk);
}

void number_landing(Block& block, const unsigned char* chunk, uint64_t number) {
  const unsigned char* start = array_of(block, chunk, kChunk)->memory;
  proxy_view(block).landings.at(start)[size_t(chunk - start) / kChunk] = number;
}

void write_by_proxy(Block& block, const unsigned char* shared, size_t bytes) {
  std::memcpy(shadow_of(block, shared, bytes), shared, bytes);
}

const unsigned char* proxy_sees(const void* p, size_t bytes) {
  if (!is_shared(p, bytes)) return nullptr;
  Block& block = *self()->block;
  if (proxy_view(block).stale) refresh_shadows();
  return shadow_of(block, static_cast<const unsigned char*>(p), bytes);
}

bool is_shared(const void* p, size_t bytes) {
  return array_of(*self()->block, p, bytes) != nullptr;
}

void check_shared(const char* name, const void* p, size_t bytes, size_t alignment, Here here) {
  if (uintptr_t(p) % alignment != 0)
    fail(here, "%s: shared address %p is not aligned to %zu", name, p, alignment);
  if (!is_shared(p, bytes))
    fail(here, "%s: %zu bytes at %p are not within one array of shared memory", name, bytes, p);
}

void check_global(const char* name, const void* p, size_t bytes, size_t alignment, Here here) {
  if (uintptr_t(p) % alignment != 0)
    fail(here, "%s: global address %p is not aligned to %zu", name, p, alignment);
  if (!__asan_region_is_poisoned) return;
  if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(p), bytes))
    fail(here, "%s: byte %td of %zu in global memory may not be touched", name,
         static_cast<const char*>(bad) - static_cast<const char*>(p), bytes);
}

// To copy all of shared memory for every thread would take most of a launch's time. The fences of a
// warp act together, when its last lane has come; or when the async proxy looks, if that is earlier.
void fence_proxy_async() {
  Unseen unseen;
  const Fiber& me = *self();
  ProxyView& view = proxy_view(*me.block);
  uint32_t& lanes = view.lanes[me.warp];
  const uint32_t mine = 1u << me.lane, live = me.block->warps[me.warp].live;
  view.fenced = std::max(view.fenced, me.knows.landed);
  view.stale = true;
  if ((lanes & mine) == 0 && ((lanes | mine) & live) != live) {
    lanes |= mine;
    return;
  }
  lanes = 0;
  refresh_shadows();
}

// A hint that is only taken for global memory that exists.
void prefetch(const void* global, Here here) {
  constexpr const char* kName = "prefetch.global.L2";
  Unseen unseen;
  if (is_shared(global, 1)) fail(here, "%s: %p is in shared memory", kName, global);
  check_global(kName, global, 1, 1, here);
}

}  // namespace fomoe::emulator
