// The state of a launch: fibers, warps, blocks, and the machine that runs them. Internal to the
// runtime and to the CPU twins of asynchronous instructions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "schedule.h"
#include "switch.h"

namespace fomoe::emulator {

constexpr unsigned kLanes = 32;
constexpr unsigned kNamedBarriers = 16;

// What a thread knows to have happened. Numbers: who knows of one counts as knowing of all before it.
struct Known {
  uint64_t landed = 0;   // landings by cp.async in its block (async.cpp)
  uint64_t reached = 0;  // accesses to other blocks of its cluster (cluster.cpp)

  void add(const Known& other) {
    landed = landed > other.landed ? landed : other.landed;
    reached = reached > other.reached ? reached : other.reached;
  }
};

// Memory order between those who meet: for TSan, which takes its address, and what they know. Two take
// turns: who is late in leaving a meeting must not see what others brought to the next.
struct OrderPoint {
  Known turns[2];
  unsigned turn = 0;
  Known* now() { return &turns[turn & 1]; }
};
void bring(Known* order);  // before the meeting, by the running fiber
void take(Known* order);   // after it

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  void* tsan_fiber = nullptr;
  void* asan_stack = nullptr;
  uint64_t priority = 0;
  uint64_t turn = 0;  // of becoming ready: among equal priorities, first come first served
  bool lags = false;  // runs when the others wait or only poll
  bool done = false;
  Known knows;
  Known* at_cluster_barrier = nullptr;  // it has arrived and not waited; what it will take there
  uint64_t cluster_phase = 0;           // in which it arrived
  const char* waits_for = nullptr;      // null = runs or could run
  Here where;
};

struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  Combine combine = nullptr;
  bool orders_memory = false;
  void* payloads[kLanes] = {};
};

struct Warp {
  uint32_t live = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
  OrderPoint order;
};

struct Barrier {
  unsigned needed = 0, arrived = 0;  // needed 0: all live threads of the block
  Here where;
  std::vector<Fiber*> waiting;
  OrderPoint order;
};

struct SharedArray {
  const void* key;
  unsigned char* memory;
  size_t bytes;
};

// What asynchronous instructions keep for a block (async.cpp).
struct AsyncState;
AsyncState* make_async_state();
void free_async_state(AsyncState*);
// What is wrong with leaving the block now; empty when nothing is.
std::string unfinished(const Block& block);

// Blocks that run together and reach each other's shared memory (cluster.cpp). Without an attribute of
// the launch every block is a cluster.
struct Cluster {
  std::vector<Block*> blocks;  // by rank; they last until all have ended
  uint64_t accesses = 0;       // of blocks to others
  unsigned arrived = 0;        // at barrier.cluster
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
  OrderPoint order;
  bool gone = false;

  bool over() const;  // all blocks are
};

struct Block {
  uint3 index{};
  std::shared_ptr<Cluster> cluster;
  unsigned rank = 0;  // in it
  unsigned live = 0;
  bool over = false;
  uint64_t reached = 0;   // the last access by another block of the cluster, as Known's
  const char* how = "";   // and its name
  uint64_t knows_of = 0;  // accesses, when its threads left
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  std::vector<SharedArray> arrays;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  AsyncState* async = nullptr;
};

struct Launch {
  dim3 grid, block, cluster;
  size_t dynamic_bytes;
  const void* kernel;
  void (*body)(void*);
  void* context;
  char started = 0, finished = 0;  // addresses for TSan
};

const Schedule& schedule();
Random& random_source();
Fiber* self();  // the running fiber

// Something happened that polling threads may have waited for.
void progressed();
// Stops the running fiber until make_ready is called for it, or for good.
void wait_here(const char* what, Here here);
void make_ready(Fiber* fiber);
void make_ready(std::vector<Fiber*>& fibers);  // in the order of the schedule; empties the list

// The block's array that belongs to `key`, made if it is not there.
SharedArray& array_for(Block& block, const void* key, size_t bytes);

// "block (1, 0, 0)"
std::string name_of(const Block& block);
// Called when a thread leaves its kernel, before leave_meetings.
void leave_cluster(Fiber* fiber);

// Memory of a block: exact size, 0xff bytes, aligned to 1024 bytes.
unsigned char* new_shared(size_t bytes);

// Called when a thread leaves its kernel: meetings and barriers do not wait for it any more.
void leave_meetings(Fiber* fiber);

}  // namespace fomoe::emulator
