// Asynchronous copies: cp.async, bulk copies, mbarriers. A copy lands at its issue, or as late as the
// wait for it allows, or somewhere between, as the schedule says; until then its target reads 0xff.
//
// Bulk copies belong to the async proxy. It has its own view of shared memory, which ordinary
// stores do not reach until fence.proxy.async: a shadow of each array.
#include "async.h"

#include <cstring>
#include <deque>
#include <map>

#include "../include/emulator_async.h"
#include "sanitizers.h"

namespace fomoe::emulator {

namespace {

// `from` null: zeros.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  bool landed;
};

struct Load {
  unsigned char* to;
  size_t bytes;
  std::function<void(unsigned char*)> fill;
};

struct Mbarrier {
  unsigned count, pending;
  int64_t bytes = 0;  // still expected
  unsigned phase = 0;
  std::deque<Load> loads;        // that have not landed
  std::shared_ptr<Unit> copier;  // writes what they bring
};

struct Group {
  std::vector<Copy> copies;
};

// A thread's copies in groups, as commit and wait see them.
struct Groups {
  Group open;
  std::deque<Group> committed;
  bool empty() const { return open.copies.empty() && committed.empty(); }
};

constexpr uint64_t kMbarrierWord = 0x6d62617272696572ull;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase may expect

}  // namespace

struct AsyncState {
  std::map<unsigned, Groups> copies, stores;  // by thread
  std::map<uint64_t*, Mbarrier> mbarriers;
  std::map<const unsigned char*, std::vector<unsigned char>> shadows;  // by start of an array
  std::map<unsigned, uint32_t> fenced;  // by warp: lanes that have fenced, but not yet all
  bool stale = false;                   // a fence has not reached the shadows yet
  std::shared_ptr<Warpgroups> warpgroups;
};

AsyncState* make_async_state() { return new AsyncState; }
void free_async_state(AsyncState* state) { delete state; }

namespace {

AsyncState& state() { return *self()->block->async; }

// The array of shared memory that holds [p, p + bytes), or null.
const SharedArray* array_of(const void* p, size_t bytes) {
  Block& block = *self()->block;
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

unsigned char* shadow_of(const unsigned char* p, size_t bytes) {
  const SharedArray* array = array_of(p, bytes);
  auto [place, is_new] = state().shadows.try_emplace(array->memory);
  if (is_new) place->second.assign(array->bytes, 0xff);
  return place->second.data() + (p - array->memory);
}

// The async proxy sees all that is in shared memory now.
void refresh_shadows() {
  const auto refresh = [](const unsigned char* memory, size_t bytes) {
    if (memory != nullptr) std::memcpy(shadow_of(memory, bytes), memory, bytes);
  };
  const Block& block = *self()->block;
  for (const SharedArray& array : block.arrays) refresh(array.memory, array.bytes);
  refresh(block.dynamic, block.dynamic_bytes);
  state().stale = false;
}

// To TSan the thread that issues a copy is who reads and writes.
void announce(const void* from, void* to, size_t bytes) {
  if (__tsan_read_range && from != nullptr) __tsan_read_range(const_cast<void*>(from), bytes);
  if (__tsan_write_range) __tsan_write_range(to, bytes);
}

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void land_store(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, proxy_sees(copy.from, copy.bytes), copy.bytes);
}

template <class Land>
void wait_for(Groups& groups, unsigned pending, const Land& land_one) {
  while (groups.committed.size() > pending) {
    for (Copy& copy : groups.committed.front().copies) land_one(copy);
    groups.committed.pop_front();
  }
}

void commit(Groups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open = {};
}

Mbarrier& mbarrier_at(uint64_t* barrier, const char* name, Here here) {
  const auto found = state().mbarriers.find(barrier);
  if (found == state().mbarriers.end()) fail(here, "%s: no mbarrier at %p", name, (void*)barrier);
  if (*barrier != kMbarrierWord) fail(here, "%s: the mbarrier has been overwritten", name);
  return found->second;
}

void finish_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  progressed();
}

void land_load(Mbarrier& barrier) {
  const Load load = std::move(barrier.loads.front());
  barrier.loads.pop_front();
  load.fill(load.to);
  std::memcpy(shadow_of(load.to, load.bytes), load.to, load.bytes);
  barrier.bytes -= int64_t(load.bytes);
  finish_phase(barrier);
}

}  // namespace

bool lands_now() {
  switch (schedule().arrival) {
    case Arrival::early: return true;
    case Arrival::late: return false;
    default: return random_source().below(2) == 0;
  }
}

const unsigned char* proxy_sees(const void* p, size_t bytes) {
  if (array_of(p, bytes) == nullptr) return nullptr;
  if (state().stale) refresh_shadows();
  return shadow_of(static_cast<const unsigned char*>(p), bytes);
}

void check_shared(const char* name, const void* p, size_t bytes, size_t alignment, Here here) {
  if (uintptr_t(p) % alignment != 0)
    fail(here, "%s: shared address %p is not aligned to %zu", name, p, alignment);
  if (array_of(p, bytes) == nullptr)
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

std::shared_ptr<Warpgroups>& warpgroups_of(const Block& block) { return block.async->warpgroups; }

// ---- cp.async ------------------------------------------------------------------------------------

void async_copy_16(void* shared, const void* global, bool valid, Here here) {
  constexpr size_t kBytes = 16;
  {
    Unseen unseen;
    check_shared("cp.async", shared, kBytes, kBytes, here);
    if (valid) check_global("cp.async", global, kBytes, kBytes, here);
  }
  announce(valid ? global : nullptr, shared, kBytes);
  Unseen unseen;
  Copy copy{static_cast<unsigned char*>(shared),
            valid ? static_cast<const unsigned char*>(global) : nullptr, kBytes, false};
  if (lands_now()) {
    land(copy);
  } else {
    std::memset(shared, 0xff, kBytes);
  }
  state().copies[self()->linear].open.copies.push_back(copy);
}

void async_copy_commit() {
  Unseen unseen;
  commit(state().copies[self()->linear]);
}

void async_copy_wait(unsigned pending) {
  Unseen unseen;
  wait_for(state().copies[self()->linear], pending, land);
}

// ---- mbarriers -----------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, unsigned count, Here here) {
  constexpr unsigned kMost = (1u << 20) - 1;
  Unseen unseen;
  if (uintptr_t(barrier) % 8 != 0 || array_of(barrier, 8) == nullptr)
    fail(here, "mbarrier.init: %p is not 8 aligned bytes of shared memory", (void*)barrier);
  if (count == 0 || count > kMost)
    fail(here, "mbarrier.init: count %u, wanted 1 .. %u", count, kMost);
  *barrier = kMbarrierWord;
  state().mbarriers[barrier] = Mbarrier{count, count, 0, 0, {}, std::make_shared<Unit>()};
}

void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes, Here here) {
  maybe_yield();
  release(barrier);
  Unseen unseen;
  Mbarrier& b = mbarrier_at(barrier, "mbarrier.arrive", here);
  if (b.pending == 0) fail(here, "mbarrier.arrive: more arrivals than its count %u", b.count);
  if (b.bytes + int64_t(expected_bytes) > kMostBytes)
    fail(here, "mbarrier.arrive.expect_tx: %lld bytes in one phase, at most %lld can be counted",
         (long long)(b.bytes + expected_bytes), (long long)kMostBytes);
  b.bytes += expected_bytes;
  --b.pending;
  finish_phase(b);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, Here here) {
  constexpr const char* kName = "mbarrier.try_wait";
  unsigned before;  // the phase when this thread came, or last looked
  {
    Unseen unseen;
    before = mbarrier_at(barrier, kName, here).phase;
  }
  for (;;) {
    maybe_yield();
    bool landed = false;
    {
      Unseen unseen;
      Mbarrier& b = mbarrier_at(barrier, kName, here);
      if ((b.phase & 1) != (parity & 1)) break;
      if (b.phase != before)
        fail(here,
             "%s: this thread has missed the end of its phase: the next one has ended too, and "
             "looks like the one before (parity %u)",
             kName, parity & 1);
      if (!b.loads.empty()) {
        land_load(b);
        landed = true;
      }
      before = b.phase;
    }
    if (!landed) yield_polling(here);
  }
  acquire(barrier);
}

// ---- bulk copies ---------------------------------------------------------------------------------

namespace {

void check_bulk(const char* name, const void* shared, const void* global, unsigned bytes,
                Here here) {
  if (bytes == 0 || bytes % 16 != 0)
    fail(here, "%s: %u bytes, wanted a positive multiple of 16", name, bytes);
  check_shared(name, shared, bytes, 16, here);
  check_global(name, global, bytes, 16, here);
}

}  // namespace

void load_by_proxy(const char* name, ProxyLoad load, uint64_t* barrier, Here here) {
  Mbarrier* b;
  char issued = 0;
  {
    Unseen unseen;
    b = &mbarrier_at(barrier, name, here);
  }
  release(&issued);
  b->copier->act([&] {
    acquire(&issued);
    load.announce_reads();
    __tsan_write_range(load.shared, load.bytes);
    release(barrier);
  });
  Unseen unseen;
  auto* to = static_cast<unsigned char*>(load.shared);
  std::memset(to, 0xff, load.bytes);
  std::memset(shadow_of(to, load.bytes), 0xff, load.bytes);
  b->loads.push_back({to, load.bytes, std::move(load.fill)});
  if (lands_now())
    while (!b->loads.empty()) land_load(*b);
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Here here) {
  constexpr const char* kName = "cp.async.bulk";
  {
    Unseen unseen;
    check_bulk(kName, shared, global, bytes, here);
  }
  load_by_proxy(kName,
                {shared, bytes, [=](unsigned char* to) { std::memcpy(to, global, bytes); },
                 [=] { __tsan_read_range(const_cast<void*>(global), bytes); }},
                barrier, here);
}

void bulk_store(void* global, const void* shared, unsigned bytes, Here here) {
  {
    Unseen unseen;
    check_bulk("cp.async.bulk", shared, global, bytes, here);
  }
  announce(shared, global, bytes);
  Unseen unseen;
  Copy copy{static_cast<unsigned char*>(global), static_cast<const unsigned char*>(shared), bytes,
            false};
  if (lands_now()) land_store(copy);
  state().stores[self()->linear].open.copies.push_back(copy);
}

void bulk_commit() {
  Unseen unseen;
  commit(state().stores[self()->linear]);
}

void bulk_wait_read(unsigned pending) {
  Unseen unseen;
  wait_for(state().stores[self()->linear], pending, land_store);
}

void bulk_wait(unsigned pending) { bulk_wait_read(pending); }

// To copy all of shared memory for every thread would take most of a launch's time. The fences of a
// warp act together, when its last lane has come; or when the async proxy looks, if that is earlier.
void fence_proxy_async() {
  Unseen unseen;
  const Fiber& me = *self();
  AsyncState& s = state();
  uint32_t& lanes = s.fenced[me.warp];
  const uint32_t mine = 1u << me.lane, live = me.block->warps[me.warp].live;
  s.stale = true;
  if ((lanes & mine) == 0 && ((lanes | mine) & live) != live) {
    lanes |= mine;
    return;
  }
  lanes = 0;
  refresh_shadows();
}

std::string unfinished(const Block& block) {
  for (const auto& [thread, groups] : block.async->copies)
    if (!groups.empty()) return "cp.async of thread " + std::to_string(thread) + " in flight";
  for (const auto& [thread, groups] : block.async->stores)
    if (!groups.empty())
      return "bulk stores of thread " + std::to_string(thread) +
             " that may not have read their shared memory";
  for (const auto& [address, barrier] : block.async->mbarriers) {
    if (!barrier.loads.empty())
      return std::to_string(barrier.loads.size()) + " bulk loads in flight";
    if (barrier.bytes != 0)
      return "an mbarrier that expects " + std::to_string(barrier.bytes) + " more bytes";
  }
  if (block.async->warpgroups != nullptr) return unfinished(*block.async->warpgroups);
  return {};
}

}  // namespace fomoe::emulator
