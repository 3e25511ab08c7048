// Where threads meet: barriers of a block, collectives of a warp.
#include <algorithm>
#include <cstring>

#include "sanitizers.h"
#include "scheduler.h"

namespace fomoe::emulator {

void bring(Known* order) {
  release(order);
  order->add(self()->knows);
}
void take(Known* order) {
  acquire(order);
  self()->knows.add(*order);
}

namespace {

// Lets everybody go when all have come.
void open_if_complete(Block& block, Barrier& barrier) {
  const unsigned needed = barrier.needed == 0 ? block.live : barrier.needed;
  if (barrier.arrived == 0 || barrier.arrived < needed) return;
  barrier.arrived = barrier.needed = 0;
  ++barrier.order.turn;
  make_ready(barrier.waiting);
}

void arrive(unsigned id, unsigned threads, bool wait, const char* name, Here here) {
  Fiber* me = self();
  Block& block = *me->block;
  Known* order = nullptr;
  {
    Unseen unseen;
    if (id >= kNamedBarriers) fail(here, "%s: barrier %u, there are %u", name, id, kNamedBarriers);
    if (threads % kLanes != 0)
      fail(here, "%s: the threads must be a multiple of %u, got %u", name, kLanes, threads);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived > 0 && barrier.needed != threads)
      fail(here, "%s: barrier %u for %u threads, others came for %u", name, id, threads,
           barrier.needed);
    if (barrier.arrived > 0 && threads == 0 &&
        (barrier.where.line != here.line || std::strcmp(barrier.where.file, here.file) != 0))
      fail(here, "%s in divergent code: others wait at %s:%d", name, barrier.where.file,
           barrier.where.line);
    barrier.needed = threads;
    barrier.where = here;
    ++barrier.arrived;
    order = barrier.order.now();
  }
  bring(order);
  Barrier& barrier = block.barriers[id];
  {
    Unseen unseen;
    if (wait) barrier.waiting.push_back(me);
    open_if_complete(block, barrier);
  }
  if (!wait) return;
  wait_here(name, here);
  take(order);
}

void finish_if_complete(Block& block, unsigned warp_number) {
  Warp& warp = block.warps[warp_number];
  for (size_t i = 0; i < warp.meetings.size();) {
    Meeting& meeting = *warp.meetings[i];
    // Lanes that have exited are not waited for.
    const uint32_t expected = meeting.mask & (warp.live | meeting.arrived);
    if (meeting.arrived == 0 || meeting.arrived != expected) {
      ++i;
      continue;
    }
    if (meeting.combine != nullptr) meeting.combine(meeting.payloads, meeting.arrived);
    if (meeting.orders_memory) ++warp.order.turn;
    std::vector<Fiber*> lanes;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (meeting.arrived >> lane & 1) lanes.push_back(&block.fibers[warp_number * kLanes + lane]);
    warp.meetings.erase(warp.meetings.begin() + std::ptrdiff_t(i));
    make_ready(lanes);
  }
}

// The meeting of these lanes that waits for more of them, or a new one.
Meeting& meeting_of(Warp& warp, uint32_t mask, const char* name, Here here) {
  for (const auto& meeting : warp.meetings) {
    if ((meeting->mask & mask) == 0) continue;
    if (meeting->mask != mask)
      fail(here, "%s: mask %08x overlaps with %08x of a %s that still waits", name, mask,
           meeting->mask, meeting->name);
    if (std::strcmp(meeting->name, name) != 0)
      fail(here, "%s in divergent code: other lanes are at a %s", name, meeting->name);
    return *meeting;
  }
  warp.meetings.push_back(std::make_unique<Meeting>());
  Meeting& meeting = *warp.meetings.back();
  meeting.mask = mask;
  meeting.name = name;
  return meeting;
}

}  // namespace

void sync_block(Here here) { arrive(0, 0, true, "__syncthreads", here); }

void named_barrier(unsigned id, unsigned threads, bool wait, Here here) {
  if (threads == 0) fail(here, "named barrier %u for 0 threads", id);
  arrive(id, threads, wait, wait ? "named barrier" : "arrival at a named barrier", here);
}

void meet_warp(uint32_t mask, const char* name, void* payload, Combine combine, bool orders_memory,
               Here here) {
  Fiber* me = self();
  Warp& warp = me->block->warps[me->warp];
  Known* order = orders_memory ? warp.order.now() : nullptr;
  if (order != nullptr) bring(order);
  {
    Unseen unseen;
    if ((mask >> me->lane & 1) == 0)
      fail(here, "%s: the calling lane %u is not in its mask %08x", name, me->lane, mask);
    Meeting& meeting = meeting_of(warp, mask, name, here);
    meeting.combine = combine;
    meeting.orders_memory = orders_memory;
    meeting.arrived |= 1u << me->lane;
    meeting.payloads[me->lane] = payload;
    me->waits_for = name;
    finish_if_complete(*me->block, me->warp);
  }
  wait_here(name, here);
  if (order != nullptr) take(order);
}

void leave_meetings(Fiber* fiber) {
  Block& block = *fiber->block;
  block.warps[fiber->warp].live &= ~(1u << fiber->lane);
  finish_if_complete(block, fiber->warp);
  if (block.barriers[0].arrived > 0 && block.barriers[0].needed == 0)
    open_if_complete(block, block.barriers[0]);
}

// ---- collectives ---------------------------------------------------------------------------------

uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* name, Here here) {
  struct Payload {
    uint64_t in, out;
    int source;
  } mine{value, 0, source};
  meet_warp(
      mask, name, &mine,
      [](void** payloads, uint32_t lanes) {
        for (unsigned lane = 0; lane < kLanes; ++lane) {
          if ((lanes >> lane & 1) == 0) continue;
          auto* p = static_cast<Payload*>(payloads[lane]);
          const bool there = p->source >= 0 && p->source < int(kLanes) && (lanes >> p->source & 1);
          p->out = there ? static_cast<Payload*>(payloads[p->source])->in : 0xdeaddeaddeaddeadull;
        }
      },
      false, here);
  return mine.out;
}

namespace {

struct Word {
  uint64_t in;
  uint32_t out;
};

// Calls body(lane, its word) for every lane that came.
template <class Body>
void for_lanes(void** payloads, uint32_t lanes, const Body& body) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1) body(lane, *static_cast<Word*>(payloads[lane]));
}

}  // namespace

uint32_t ballot(uint32_t mask, bool vote, Here here) {
  Word mine{vote, 0};
  meet_warp(
      mask, "vote", &mine,
      [](void** payloads, uint32_t lanes) {
        uint32_t votes = 0;
        for_lanes(payloads, lanes, [&](unsigned lane, Word& word) {
          if (word.in != 0) votes |= 1u << lane;
        });
        for_lanes(payloads, lanes, [&](unsigned, Word& word) { word.out = votes; });
      },
      false, here);
  return mine.out;
}

uint32_t match_any(uint32_t mask, uint64_t value, Here here) {
  Word mine{value, 0};
  meet_warp(
      mask, "__match_any_sync", &mine,
      [](void** payloads, uint32_t lanes) {
        for_lanes(payloads, lanes, [&](unsigned, Word& word) {
          for_lanes(payloads, lanes, [&](unsigned other, const Word& theirs) {
            if (theirs.in == word.in) word.out |= 1u << other;
          });
        });
      },
      false, here);
  return mine.out;
}

uint32_t reduce(uint32_t mask, uint32_t value, uint32_t (*fold)(uint32_t, uint32_t),
                const char* name, Here here) {
  struct Payload {
    uint32_t value;
    uint32_t (*fold)(uint32_t, uint32_t);
  } mine{value, fold};
  meet_warp(
      mask, name, &mine,
      [](void** payloads, uint32_t lanes) {
        Payload* total = nullptr;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
          if ((lanes >> lane & 1) == 0) continue;
          auto* p = static_cast<Payload*>(payloads[lane]);
          if (total == nullptr) {
            total = p;
          } else {
            total->value = p->fold(total->value, p->value);
          }
        }
        for (unsigned lane = 0; lane < kLanes; ++lane)
          if (lanes >> lane & 1) static_cast<Payload*>(payloads[lane])->value = total->value;
      },
      false, here);
  return mine.value;
}

int warp_uniform(int value, Here here) {
  struct Payload {
    int value, first;
    bool same = true;
  } mine{value, value};
  meet_warp(
      ~0u, "warp_uniform", &mine,
      [](void** payloads, uint32_t lanes) {
        const auto of = [&](unsigned lane) { return static_cast<Payload*>(payloads[lane]); };
        const int first = of(unsigned(__builtin_ctz(lanes)))->value;
        bool same = true;
        for (unsigned lane = 0; lane < kLanes; ++lane)
          if (lanes >> lane & 1) same = same && of(lane)->value == first;
        for (unsigned lane = 0; lane < kLanes; ++lane)
          if (lanes >> lane & 1) *of(lane) = {of(lane)->value, first, same};
      },
      false, here);
  if (!mine.same)
    fail(here, "warp_uniform: lanes differ: %d here, %d in the first", mine.value, mine.first);
  return mine.first;
}

}  // namespace fomoe::emulator
