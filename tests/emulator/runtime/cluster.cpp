// Clusters: blocks that run together, their barrier, and each other's shared memory.
//
// A block must not end while another one could still reach its shared memory. Accesses are numbered,
// and what a thread knows of them travels as what it knows of landings does: by barriers, mbarriers and
// barrier.cluster. A block whose threads do not know of the last access to it when they leave has ended
// too early, also where the access happened to come first. So has one that is reached afterwards.
#include <algorithm>
#include <cstring>

#include "../include/emulator_async.h"
#include "async.h"
#include "sanitizers.h"

namespace fomoe::emulator {
namespace {

// Lets everybody go when all have come who have not left.
void open_if_complete(Cluster& cluster) {
  unsigned live = 0;
  for (const Block* block : cluster.blocks) live += block->live;
  if (cluster.arrived == 0 || cluster.arrived < live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++cluster.order.turn;
  progressed();
  make_ready(cluster.waiting);
}

// All lanes of the warp execute the same instruction.
void meet_lanes(const char* name, Here here) {
  struct Payload {
    Here here;
    bool same = true;
  } mine{here};
  meet_warp(
      ~0u, name, &mine,
      [](void** payloads, uint32_t lanes) {
        const Here first = static_cast<Payload*>(payloads[__builtin_ctz(lanes)])->here;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
          if ((lanes >> lane & 1) == 0) continue;
          auto* p = static_cast<Payload*>(payloads[lane]);
          p->same = p->here.line == first.line && std::strcmp(p->here.file, first.file) == 0;
        }
      },
      false, here);
  if (!mine.same) fail(here, "%s in divergent code: another lane is at another one", name);
}

}  // namespace

bool Cluster::over() const {
  return std::ranges::all_of(blocks, [](const Block* block) { return block->over; });
}

std::string name_of(const Block& block) {
  const uint3 at = block.index;
  return "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
         std::to_string(at.z) + ")";
}

unsigned cluster_rank() { return self()->block->rank; }

// ---- the barrier ---------------------------------------------------------------------------------

void cluster_arrive(Here here) {
  constexpr const char* kName = "barrier.cluster.arrive";
  meet_lanes(kName, here);
  Fiber* me = self();
  Cluster& cluster = *me->block->cluster;
  if (me->at_cluster_barrier != nullptr)
    fail(here, "%s: this thread has arrived before and not waited", kName);
  Known* order = cluster.order.now();
  bring(order);
  Unseen unseen;
  me->at_cluster_barrier = order;
  me->cluster_phase = cluster.phase;
  me->where = here;
  ++cluster.arrived;
  open_if_complete(cluster);
}

void cluster_wait(Here here) {
  constexpr const char* kName = "barrier.cluster.wait";
  meet_lanes(kName, here);
  Fiber* me = self();
  Cluster& cluster = *me->block->cluster;
  Known* order = me->at_cluster_barrier;
  if (order == nullptr) fail(here, "%s: this thread has not arrived", kName);
  if (cluster.phase == me->cluster_phase) {
    {
      Unseen unseen;
      cluster.waiting.push_back(me);
    }
    wait_here(kName, here);
  }
  me->at_cluster_barrier = nullptr;
  // Landings are of another block.
  const Known before = me->knows;
  take(order);
  me->knows.landed = before.landed;
}

void leave_cluster(Fiber* fiber) {
  Block& block = *fiber->block;
  if (fiber->at_cluster_barrier != nullptr)
    fail(fiber->where, "barrier.cluster: a thread leaves its kernel between arrival and wait");
  block.knows_of = std::max(block.knows_of, fiber->knows.reached);
  open_if_complete(*block.cluster);
}

// ---- shared memory of other blocks -----------------------------------------------------------------

void* remote_shared(const void* shared, unsigned rank, const char* name, Here here) {
  Unseen unseen;
  Block& block = *self()->block;
  const std::vector<Block*>& blocks = block.cluster->blocks;
  if (rank >= blocks.size())
    fail(here, "%s: block %u of the cluster, which has %zu", name, rank, blocks.size());
  const SharedArray* array = array_of(block, shared, 1);
  if (array == nullptr) fail(here, "%s: %p is not in the block's shared memory", name, shared);
  const auto offset = static_cast<const unsigned char*>(shared) - array->memory;
  Block& other = *blocks[rank];
  unsigned char* memory =
      array->key == nullptr ? other.dynamic : array_for(other, array->key, array->bytes).memory;
  return memory + offset;
}

Block& owner_of(const char* name, const void* p, size_t bytes, Here here) {
  for (Block* block : self()->block->cluster->blocks)
    if (array_of(*block, p, bytes) != nullptr) return *block;
  fail(here, "%s: %p is not in shared memory of the cluster", name, p);
}

uint64_t reach(const char* name, Block& block, Here here) {
  Fiber* me = self();
  if (&block == me->block) return 0;
  if (block.live == 0)
    fail(here, "%s: %s of the cluster has ended before", name, name_of(block).c_str());
  block.reached = ++block.cluster->accesses;
  block.how = name;
  me->knows.reached = block.reached;
  return block.reached;
}

uint32_t* remote_word(void* word, const char* name, Here here) {
  maybe_yield();
  Unseen unseen;
  if (uintptr_t(word) % sizeof(uint32_t) != 0)
    fail(here, "%s: %p is not aligned to %zu", name, word, sizeof(uint32_t));
  reach(name, owner_of(name, word, sizeof(uint32_t), here), here);
  return static_cast<uint32_t*>(word);
}

}  // namespace fomoe::emulator
