// Asynchronous copies: cp.async, bulk copies, mbarriers. A copy lands at its issue, or as late as the
// wait for it allows, or somewhere between, as the schedule says; until then its target reads 0xff.
#include "async.h"

#include <algorithm>
#include <cstring>
#include <deque>

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
  uint64_t access;  // as ProxyLoad's
};

// A thread's copies between two commits or arrivals.
struct Batch {
  std::vector<Copy> copies;
  bool closed = false;   // an arrival waits for it
  uint64_t landing = 0;  // its number, once somebody could know of it
  bool waited = false;   // and somebody does
};
using Batches = std::vector<std::shared_ptr<Batch>>;

// An arrival that copies of a thread will make.
struct Arriving {
  unsigned thread;
  Batches batches;
};

struct Mbarrier {
  Block* block;
  unsigned count, pending;
  int64_t bytes = 0;  // still expected
  unsigned phase = 0;
  std::deque<Load> loads;              // that have not landed
  std::shared_ptr<Unit> copier;        // writes what they bring
  std::deque<Arriving> arriving = {};  // that have not arrived
  Batches arrived = {}, unseen = {};   // in this phase; before, and nobody waited yet
  Known brought = {}, known = {};      // in this phase; before
};

// A thread's copies in groups, as commit and wait see them.
struct Groups {
  Batches open;
  std::deque<Batches> committed;
  char issued = 0;  // an address for TSan
};

constexpr uint64_t kMbarrierWord = 0x6d62617272696572ull;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase may expect

}  // namespace

struct AsyncState {
  std::map<unsigned, Groups> copies, stores;  // by thread
  std::map<uint64_t*, Mbarrier> mbarriers;
  uint64_t landings = 0;
  ProxyView proxy;
  std::shared_ptr<Warpgroups> warpgroups;
};

AsyncState* make_async_state() { return new AsyncState; }
void free_async_state(AsyncState* state) { delete state; }

namespace {

AsyncState& state() { return *self()->block->async; }

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

Batch& open_batch(Groups& groups) {
  if (groups.open.empty() || groups.open.back()->closed)
    groups.open.push_back(std::make_shared<Batch>());
  return *groups.open.back();
}

void commit(Groups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

// All groups but the last `pending` land; their batches.
template <class Land>
Batches wait_for(Groups& groups, unsigned pending, const Land& land_one) {
  Batches landed;
  for (; groups.committed.size() > pending; groups.committed.pop_front()) {
    for (const auto& batch : groups.committed.front()) {
      for (Copy& copy : batch->copies) land_one(copy);
      landed.push_back(batch);
    }
  }
  return landed;
}

// Somebody could know now that these have landed in a block.
uint64_t number(Block& block, const Batches& batches) {
  const uint64_t now = ++block.async->landings;
  for (const auto& batch : batches) {
    if (batch->landing != 0) continue;
    batch->landing = now;
    for (const Copy& copy : batch->copies) number_landing(block, copy.to, now);
  }
  return now;
}

bool is_waited_for(const std::shared_ptr<Batch>& batch) { return batch->waited; }

bool has_landed(const std::shared_ptr<Batch>& batch) {
  return std::ranges::all_of(batch->copies, [](const Copy& copy) { return copy.landed; });
}

// Whether a thread that leaves its block has copies that nobody has waited for.
bool in_flight(const Groups& groups) {
  const auto waited = [](const Batches& group) {
    return !group.empty() && std::ranges::all_of(group, is_waited_for);
  };
  return !std::ranges::all_of(groups.open, is_waited_for) ||
         !std::ranges::all_of(groups.committed, waited);
}

Mbarrier& mbarrier_at(Block& block, uint64_t* barrier, const char* name, Here here) {
  auto& all = block.async->mbarriers;
  const auto found = all.find(barrier);
  if (found == all.end()) fail(here, "%s: no mbarrier at %p", name, (void*)barrier);
  if (*barrier != kMbarrierWord) fail(here, "%s: the mbarrier has been overwritten", name);
  return found->second;
}
Mbarrier& mbarrier_at(uint64_t* barrier, const char* name, Here here) {
  return mbarrier_at(*self()->block, barrier, name, here);
}

void finish_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.known.add(barrier.brought);
  if (!barrier.arrived.empty()) barrier.known.landed = number(*barrier.block, barrier.arrived);
  barrier.unseen.insert(barrier.unseen.end(), barrier.arrived.begin(), barrier.arrived.end());
  barrier.arrived.clear();
  barrier.pending = barrier.count;
  ++barrier.phase;
  progressed();
}

void land_load(Mbarrier& barrier) {
  const Load load = std::move(barrier.loads.front());
  barrier.loads.pop_front();
  load.fill(load.to);
  write_by_proxy(*barrier.block, load.to, load.bytes);
  barrier.brought.add({0, load.access});
  barrier.bytes -= int64_t(load.bytes);
  finish_phase(barrier);
}

// The copies of an arrival land, and it arrives.
void land_arriving(Mbarrier& barrier, size_t which) {
  const auto place = barrier.arriving.begin() + std::ptrdiff_t(which);
  const Arriving arriving = std::move(*place);
  barrier.arriving.erase(place);
  for (const auto& batch : arriving.batches) {
    for (Copy& copy : batch->copies) land(copy);
    barrier.arrived.push_back(batch);
  }
  --barrier.pending;
  finish_phase(barrier);
}

// What a waiter needs next lands; false when nothing is on its way.
bool land_next(Mbarrier& barrier) {
  const bool random = schedule().arrival == Arrival::random;
  const size_t arriving = barrier.arriving.size();
  if (!barrier.loads.empty() && (arriving == 0 || !random || random_source().below(2) == 0)) {
    land_load(barrier);
  } else if (arriving != 0) {
    land_arriving(barrier, random ? random_source().below(arriving) : 0);
  } else {
    return false;
  }
  return true;
}

// One more arrival than there can be would belong to a phase that nobody waits for yet.
void check_arrival(const char* name, const Mbarrier& barrier, Here here) {
  if (barrier.pending <= barrier.arriving.size())
    fail(here, "%s: more arrivals than its count %u", name, barrier.count);
}

}  // namespace

bool lands_now() {
  switch (schedule().arrival) {
    case Arrival::early: return true;
    case Arrival::late: return false;
    default: return random_source().below(2) == 0;
  }
}

ProxyView& proxy_view(Block& block) { return block.async->proxy; }

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
  Groups* mine;
  {
    Unseen unseen;
    mine = &state().copies[self()->linear];
  }
  release(&mine->issued);
  Unseen unseen;
  Copy copy{static_cast<unsigned char*>(shared),
            valid ? static_cast<const unsigned char*>(global) : nullptr, kBytes, false};
  hide_from_proxy(copy.to);
  if (lands_now()) {
    land(copy);
  } else {
    std::memset(shared, 0xff, kBytes);
  }
  open_batch(*mine).copies.push_back(copy);
}

void async_copy_commit() {
  Unseen unseen;
  commit(state().copies[self()->linear]);
}

void async_copy_wait(unsigned pending) {
  Unseen unseen;
  const unsigned me = self()->linear;
  const Batches landed = wait_for(state().copies[me], pending, land);
  if (landed.empty()) return;
  self()->knows.add({number(*self()->block, landed), 0});
  for (const auto& batch : landed) batch->waited = true;
  // What waited only for these arrives.
  for (auto& [address, barrier] : state().mbarriers)
    for (size_t i = barrier.arriving.size(); i-- > 0;)
      if (barrier.arriving[i].thread == me &&
          std::ranges::all_of(barrier.arriving[i].batches, has_landed))
        land_arriving(barrier, i);
}

// It orders the copies, not the thread's ordinary stores: to TSan the copier arrives, who knows of them.
void async_copy_arrive(uint64_t* barrier, Here here) {
  constexpr const char* kName = "cp.async.mbarrier.arrive.noinc";
  maybe_yield();
  Mbarrier* b;
  Groups* mine;
  {
    Unseen unseen;
    b = &mbarrier_at(barrier, kName, here);
    check_arrival(kName, *b, here);
    mine = &state().copies[self()->linear];
  }
  b->copier->act([&] {
    acquire(&mine->issued);
    release(barrier);
  });
  Unseen unseen;
  std::erase_if(mine->open, is_waited_for);
  if (!mine->open.empty()) mine->open.back()->closed = true;
  Arriving arriving{self()->linear, mine->open};
  for (const Batches& group : mine->committed)
    arriving.batches.insert(arriving.batches.end(), group.begin(), group.end());
  b->arriving.push_back(std::move(arriving));
  if (lands_now()) land_arriving(*b, b->arriving.size() - 1);
}

// ---- mbarriers -----------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, unsigned count, Here here) {
  constexpr unsigned kMost = (1u << 20) - 1;
  Unseen unseen;
  if (uintptr_t(barrier) % 8 != 0 || !is_shared(barrier, 8))
    fail(here, "mbarrier.init: %p is not 8 aligned bytes of shared memory", (void*)barrier);
  if (count == 0 || count > kMost)
    fail(here, "mbarrier.init: the count must be in 1 .. %u, got %u", kMost, count);
  *barrier = kMbarrierWord;
  state().mbarriers[barrier] =
      Mbarrier{self()->block, count, count, 0, 0, {}, std::make_shared<Unit>()};
}

void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes, Here here) {
  maybe_yield();
  release(barrier);
  Unseen unseen;
  Mbarrier& b = mbarrier_at(barrier, "mbarrier.arrive", here);
  check_arrival("mbarrier.arrive", b, here);
  b.brought.add(self()->knows);
  if (b.bytes + int64_t(expected_bytes) > kMostBytes)
    fail(here, "mbarrier.arrive.expect_tx: %lld bytes in one phase, at most %lld can be counted",
         (long long)(b.bytes + expected_bytes), (long long)kMostBytes);
  b.bytes += expected_bytes;
  --b.pending;
  finish_phase(b);
}

void remote_arrive(void* remote, Here here) {
  constexpr const char* kName = "mbarrier.arrive.shared::cluster";
  maybe_yield();
  release(remote);
  Unseen unseen;
  Block& block = owner_of(kName, remote, sizeof(uint64_t), here);
  reach(kName, block, here);
  Mbarrier& b = mbarrier_at(block, static_cast<uint64_t*>(remote), kName, here);
  check_arrival(kName, b, here);
  Known brought = self()->knows;
  if (&block != self()->block) brought.landed = 0;  // in another block
  b.brought.add(brought);
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
      if ((b.phase & 1) != (parity & 1)) {
        self()->knows.add(b.known);
        for (const auto& batch : b.unseen) batch->waited = true;
        b.unseen.clear();
        break;
      }
      if (b.phase != before)
        fail(here,
             "%s: this thread has missed the end of its phase: the next one has ended too, and "
             "looks like the one before (parity %u)",
             kName, parity & 1);
      landed = land_next(b);
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
    fail(here, "%s: the bytes must be a positive multiple of 16, got %u", name, bytes);
  check_shared(name, shared, bytes, 16, here);
  check_global(name, global, bytes, 16, here);
}

}  // namespace

void load_by_proxy(const char* name, ProxyLoad load, uint64_t* barrier, Here here) {
  Mbarrier* b;
  char issued = 0;
  {
    Unseen unseen;
    b = &mbarrier_at(load.block, barrier, name, here);
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
  write_by_proxy(load.block, to, load.bytes);
  b->loads.push_back({to, load.bytes, std::move(load.fill), load.access});
  if (lands_now())
    while (!b->loads.empty()) land_load(*b);
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Here here) {
  constexpr const char* kName = "cp.async.bulk";
  {
    Unseen unseen;
    check_bulk(kName, shared, global, bytes, here);
  }
  load_by_proxy(
      kName,
      {*self()->block, shared, bytes, [=](unsigned char* to) { std::memcpy(to, global, bytes); },
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
  open_batch(state().stores[self()->linear]).copies.push_back(copy);
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

std::string unfinished(const Block& block) {
  for (const auto& [thread, groups] : block.async->copies)
    if (in_flight(groups)) return "cp.async of thread " + std::to_string(thread) + " in flight";
  for (const auto& [thread, groups] : block.async->stores)
    if (in_flight(groups))
      return "bulk stores of thread " + std::to_string(thread) +
             " that may not have read their shared memory";
  for (const auto& [address, barrier] : block.async->mbarriers) {
    if (!barrier.loads.empty())
      return std::to_string(barrier.loads.size()) + " bulk loads in flight";
    if (!barrier.arriving.empty())
      return std::to_string(barrier.arriving.size()) + " arrivals of cp.async to come";
    if (barrier.bytes != 0)
      return "an mbarrier that expects " + std::to_string(barrier.bytes) + " more bytes";
  }
  if (block.async->warpgroups != nullptr) return unfinished(*block.async->warpgroups);
  return {};
}

}  // namespace fomoe::emulator
