// Runs the threads of a launch, one fiber each, in the order that the schedule says.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>

#include "sanitizers.h"

namespace fomoe::emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxCluster = 8;  // blocks that every device can have
constexpr size_t kDefaultShared = 48 << 10, kMostShared = 227 << 10;
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;

struct Machine {
  std::mutex mutex;  // one launch at a time
  uint64_t launches = 0;
  Schedule schedule;
  Random random;
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Fiber*> ready;  // a queue from `head` on, a heap under priority order
  size_t head = 0;
  std::deque<Fiber*> laggards;  // that could run
  uint64_t polls = 0;           // since anything else happened, by all threads
  uint64_t idle = 0;            // the same, since a laggard ran
  uint64_t turns = 0;           // of fibers that became ready
  std::vector<char*> free_stacks;
  std::string error;
  bool failed = false;
  std::map<const void*, int> allowed_shared;  // by kernel
  Context main;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void* main_tsan = nullptr;
  void* main_asan_stack = nullptr;
};

Machine& machine() {
  static Machine* m = new Machine;  // never destroyed: fibers may outlive main's statics
  return *m;
}

bool lower_priority(const Fiber* a, const Fiber* b) {
  return a->priority != b->priority ? a->priority < b->priority : a->turn > b->turn;
}

void push_ready(Fiber* fiber) {
  Machine& m = machine();
  if (fiber->lags) {
    m.laggards.push_back(fiber);
    return;
  }
  fiber->turn = ++m.turns;
  m.ready.push_back(fiber);
  if (m.schedule.order == Order::priority)
    std::push_heap(m.ready.begin(), m.ready.end(), lower_priority);
}

uint64_t live_threads() {
  uint64_t threads = 0;
  for (const auto& block : machine().resident) threads += block->live;
  return threads;
}

// The fiber to run next, null when none can.
Fiber* take_ready() {
  Machine& m = machine();
  const bool empty = m.head == m.ready.size();
  if (!m.laggards.empty() && (empty || m.idle > live_threads())) {
    m.idle = 0;
    Fiber* fiber = m.laggards.front();
    m.laggards.pop_front();
    return fiber;
  }
  if (empty) {
    m.ready.clear();
    m.head = 0;
    return nullptr;
  }
  Fiber* fiber = nullptr;
  switch (m.schedule.order) {
    case Order::random: {
      std::swap(m.ready[m.random.below(m.ready.size())], m.ready.back());
      fiber = m.ready.back();
      m.ready.pop_back();
      break;
    }
    case Order::priority: {
      std::pop_heap(m.ready.begin(), m.ready.end(), lower_priority);
      fiber = m.ready.back();
      m.ready.pop_back();
      break;
    }
    default: {
      fiber = m.ready[m.head++];
      if (m.head > 4096 && 2 * m.head > m.ready.size()) {
        m.ready.erase(m.ready.begin(), m.ready.begin() + std::ptrdiff_t(m.head));
        m.head = 0;
      }
    }
  }
  return fiber;
}

// ---- switching -----------------------------------------------------------------------------------

// From the running fiber (null: main) to another (null: main). `for_good`: the running one is done.
void switch_to(Fiber* to, bool for_good) {
  Machine& m = machine();
  Fiber* from = self();
  void** asan_save = from ? &from->asan_stack : &m.main_asan_stack;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : asan_save, to ? to->stack : m.main_stack,
                                   to ? kStackBytes : m.main_stack_bytes);
  }
  // Flag 1: switching itself orders nothing.
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to ? to->tsan_fiber : m.main_tsan, 1);
  current = to;
  switch_context(from ? from->context : m.main, to ? to->context : m.main);
  if (__sanitizer_finish_switch_fiber) {
    void* saved = from ? from->asan_stack : m.main_asan_stack;
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
  }
}

// Lets others run. Main decides what it means when nobody can.
void run_others(bool for_good) {
  Fiber* next;
  {
    Unseen unseen;
    next = take_ready();
  }
  if (next == self() && !for_good) return;
  switch_to(next, for_good);
}

void run_thread() {
  Machine& m = machine();
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (m.main_stack == nullptr) {  // the first fiber comes from main
      m.main_stack = bottom;
      m.main_stack_bytes = bytes;
    }
  }
  acquire(&m.launch->started);
  m.launch->body(m.launch->context);
  release(&m.launch->finished);
  Fiber* me = self();
  bool last;
  {
    Unseen unseen;
    progressed();
    me->done = true;
    last = --me->block->live == 0;
    leave_cluster(me);
    leave_meetings(me);
  }
  // Main replaces a block that is done.
  if (last) switch_to(nullptr, true);
  run_others(true);
  std::abort();
}

// ---- blocks --------------------------------------------------------------------------------------

char* take_stack() {
  Machine& m = machine();
  if (!m.free_stacks.empty()) {
    char* stack = m.free_stacks.back();
    m.free_stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

void give_stack(char* stack) {
  // TSan remembers who touched a stack: never use one twice there.
  if (__tsan_create_fiber) {
    munmap(stack - kGuardBytes, kGuardBytes + kStackBytes);
    return;
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
  machine().free_stacks.push_back(stack);
}

void start_block(uint64_t number, std::shared_ptr<Cluster> cluster) {
  Machine& m = machine();
  const Launch& launch = *m.launch;
  auto block = std::make_unique<Block>();
  const dim3 size = launch.block;
  const unsigned threads = unsigned(size.size());
  const uint64_t laggard =
      m.schedule.order == Order::laggard ? m.random.below(threads) : uint64_t(threads);
  block->index = {unsigned(number % launch.grid.x),
                  unsigned(number / launch.grid.x % launch.grid.y),
                  unsigned(number / launch.grid.x / launch.grid.y)};
  block->rank = unsigned(cluster->blocks.size());
  cluster->blocks.push_back(block.get());
  block->cluster = std::move(cluster);
  block->live = threads;
  block->fibers.resize(threads);
  block->warps.resize((threads + kLanes - 1) / kLanes);
  block->async = make_async_state();
  block->dynamic_bytes = launch.dynamic_bytes;
  if (launch.dynamic_bytes > 0) block->dynamic = new_shared(launch.dynamic_bytes);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fiber.block_index = block->index;
    fiber.block_size = size;
    fiber.grid_size = launch.grid;
    fiber.linear = i;
    fiber.lane = i % kLanes;
    fiber.warp = i / kLanes;
    fiber.block = block.get();
    fiber.lags = i == laggard;
    fiber.priority = fiber.lane == 0 ? m.random.next() : block->fibers[i - 1].priority;
    fiber.stack = take_stack();
    // Stacks that start at different cache lines do not evict each other.
    prepare(fiber.context, fiber.stack, kStackBytes - i % 8 * 128, run_thread);
    if (__tsan_create_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);
    block->warps[fiber.warp].live |= 1u << fiber.lane;
  }
  m.resident.push_back(std::move(block));
}

// Before a thread of one runs, all blocks are there.
void start_cluster(uint64_t number) {
  const uint64_t size = machine().launch->cluster.size();
  auto cluster = std::make_shared<Cluster>();
  for (uint64_t rank = 0; rank < size; ++rank) start_block(number * size + rank, cluster);
  std::vector<Block*> blocks = cluster->blocks;
  if (machine().schedule.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  for (Block* block : blocks) {
    std::vector<Fiber*> all;
    for (Fiber& fiber : block->fibers) all.push_back(&fiber);
    make_ready(all);
  }
}

// What is wrong with how a block has ended; empty when nothing is.
std::string wrong_end(const Block& block) {
  if (const std::string what = unfinished(block); !what.empty()) return what;
  if (block.reached <= block.knows_of) return {};
  return "another block of its cluster that reaches its shared memory (" + std::string(block.how) +
         "), perhaps later: nothing orders the two";
}

void end_block(Block& block) {
  for (const SharedArray& array : block.arrays) std::free(array.memory);
  std::free(block.dynamic);
  free_async_state(block.async);
  for (Fiber& fiber : block.fibers) {
    if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
    forget(fiber.context);
    give_stack(fiber.stack);
  }
}

// ---- errors --------------------------------------------------------------------------------------

void set_error(const std::string& text) {
  Machine& m = machine();
  m.error = text + "\n  schedule: " + m.schedule.text();
  m.failed = true;
  std::fprintf(stderr, "emulator: %s\n", m.error.c_str());
}

// Who waits for what, for a launch in which nobody can go on.
std::string waiting_threads() {
  std::string text;
  for (const auto& block : machine().resident) {
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Fiber& fiber : block->fibers) {
      if (fiber.done || fiber.waits_for == nullptr) continue;
      groups[std::string(fiber.waits_for) + " at " + fiber.where.file + ":" +
             std::to_string(fiber.where.line)]
          .push_back(fiber.linear);
    }
    for (const auto& [what, threads] : groups) {
      text += "\n  " + name_of(*block) + ": " + std::to_string(threads.size()) + " threads from " +
              std::to_string(threads.front()) + " on wait for " + what;
    }
  }
  return text;
}

// ---- a launch ------------------------------------------------------------------------------------

// Numbers of clusters in the order in which they start.
std::vector<uint64_t> start_order(uint64_t clusters) {
  Machine& m = machine();
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i)
    order[i] = m.schedule.order == Order::reverse ? clusters - 1 - i : i;
  if (m.schedule.order == Order::random || m.schedule.order == Order::priority) {
    for (uint64_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[m.random.below(i)]);
  }
  return order;
}

void run_blocks() {
  Machine& m = machine();
  const uint64_t together = m.launch->cluster.size();
  const uint64_t most = std::max<uint64_t>(m.schedule.resident_blocks, together);
  const std::vector<uint64_t> order = start_order(m.launch->grid.size() / together);
  for (size_t next = 0; !m.failed;) {
    while (m.resident.size() + together <= most && next < order.size())
      start_cluster(order[next++]);
    if (m.resident.empty()) break;
    Fiber* fiber = take_ready();
    if (fiber == nullptr) {
      set_error("deadlock: no thread can go on" + waiting_threads());
      break;
    }
    switch_to(fiber, false);
    bool ended = false;
    for (size_t i = 0; i < m.resident.size() && !m.failed; ++i) {
      Block& block = *m.resident[i];
      if (block.live > 0 || block.over) continue;
      if (const std::string what = wrong_end(block); !what.empty())
        set_error(name_of(block) + " ends with " + what);
      block.over = ended = true;
    }
    if (!ended) continue;
    for (const auto& block : m.resident) block->cluster->gone = block->cluster->over();
    std::erase_if(m.resident, [](const std::unique_ptr<Block>& block) {
      if (block->cluster->gone) end_block(*block);
      return block->cluster->gone;
    });
  }
  for (const auto& block : m.resident) end_block(*block);
  m.resident.clear();
  m.ready.clear();
  m.head = 0;
  m.laggards.clear();
}

// Bytes of shared memory that blocks of this kernel may have.
size_t most_shared(const void* kernel) {
  const auto allowed = machine().allowed_shared.find(kernel);
  return allowed == machine().allowed_shared.end()
             ? kDefaultShared
             : std::max(kDefaultShared, size_t(allowed->second));
}

int check_launch(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const auto refuse = [](const std::string& what) {
    set_error("launch: " + what);
    return kInvalidConfiguration;
  };
  if (block.size() == 0 || block.size() > kMaxThreads || block.z > 64)
    return refuse("blocks of " + std::to_string(block.size()) + " threads");
  if (grid.size() == 0 || grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff)
    return refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                  std::to_string(grid.z) + " blocks");
  if (cluster.x == 0 || cluster.x > kMaxCluster || cluster.y != 1 || cluster.z != 1)
    return refuse("clusters of " + std::to_string(cluster.x) + " x " + std::to_string(cluster.y) +
                  " x " + std::to_string(cluster.z) + " blocks, known are 1 .. 8 in a row");
  if (grid.x % cluster.x != 0)
    return refuse("rows of " + std::to_string(grid.x) + " blocks are not whole clusters of " +
                  std::to_string(cluster.x));
  const size_t allowed = most_shared(launch.kernel);
  if (launch.dynamic_bytes > allowed)
    return refuse(std::to_string(launch.dynamic_bytes) +
                  " bytes of dynamic shared memory, allowed are " + std::to_string(allowed));
  return 0;
}

}  // namespace

const Schedule& schedule() { return machine().schedule; }
Random& random_source() { return machine().random; }
Fiber* self() { return static_cast<Fiber*>(current); }

void make_ready(Fiber* fiber) {
  fiber->waits_for = nullptr;
  push_ready(fiber);
}

void make_ready(std::vector<Fiber*>& fibers) {
  if (machine().schedule.order == Order::reverse) std::reverse(fibers.begin(), fibers.end());
  for (Fiber* fiber : fibers) make_ready(fiber);
  fibers.clear();
}

void wait_here(const char* what, Here here) {
  Fiber* me = self();
  me->waits_for = what;
  me->where = here;
  progressed();
  run_others(false);
  me->waits_for = nullptr;
}

void maybe_yield() {
  Machine& m = machine();
  Fiber* me = self();
  if (m.schedule.order != Order::random && m.schedule.order != Order::priority && !me->lags) return;
  {
    Unseen unseen;
    if (!me->lags) {
      if (m.random.below(8) != 0) return;
      me->priority = m.random.next();
    }
    push_ready(me);
  }
  run_others(false);
}

void progressed() { machine().polls = machine().idle = 0; }

void yield_polling(Here here) {
  Machine& m = machine();
  Fiber* me = self();
  {
    Unseen unseen;
    me->waits_for = "what they poll";
    me->where = here;
    ++m.idle;
    if (++m.polls > 200000 + 200 * live_threads())
      fail(here, "livelock: all threads only poll%s", waiting_threads().c_str());
    me->priority = 0;  // with equal priorities who became ready first goes first
    push_ready(me);
  }
  run_others(false);
  me->waits_for = nullptr;
}

void fail(Here here, const char* format, ...) {
  {
    Unseen unseen;
    char message[2048];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    std::string text = std::string(here.file) + ":" + std::to_string(here.line) + ": " + message;
    if (const Fiber* me = self()) {
      char place[160];
      std::snprintf(place, sizeof place, "\n  block (%u, %u, %u), thread (%u, %u, %u)",
                    me->block_index.x, me->block_index.y, me->block_index.z, me->index.x,
                    me->index.y, me->index.z);
      text += place;
    }
    set_error(text);
  }
  if (self() == nullptr) throw std::runtime_error(machine().error);
  switch_to(nullptr, true);  // main drops all fibers
  std::abort();
}

unsigned char* new_shared(size_t bytes) {
  void* memory = nullptr;
  // Exactly so long: ASan's red zone begins right behind.
  if (posix_memalign(&memory, 1024, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return static_cast<unsigned char*>(memory);
}

SharedArray& array_for(Block& block, const void* key, size_t bytes) {
  for (SharedArray& array : block.arrays)
    if (array.key == key) return array;
  size_t used = block.dynamic_bytes;
  for (const SharedArray& array : block.arrays) used += array.bytes;
  const size_t arrays = used - block.dynamic_bytes + bytes;
  // A kernel that may have more dynamic shared memory may have all there is in total.
  const bool raised = most_shared(machine().launch->kernel) > kDefaultShared;
  if (arrays > kDefaultShared || used + bytes > (raised ? kMostShared : kDefaultShared))
    fail({},
         "%zu bytes of shared memory in arrays and %zu dynamic ones, more than a block may have",
         arrays, block.dynamic_bytes);
  block.arrays.push_back({key, new_shared(bytes), bytes});
  return block.arrays.back();
}

void* shared_array(const void* key, size_t bytes) {
  Unseen unseen;
  return array_for(*self()->block, key, bytes).memory;
}

unsigned char* dynamic_shared() { return self()->block->dynamic; }

int allow_dynamic_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return kInvalidValue;
  machine().allowed_shared[kernel] = bytes;
  return 0;
}

int run_grid(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_bytes, const void* kernel,
             void (*body)(void*), void* context) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (self() != nullptr) return kInvalidConfiguration;  // a kernel that launches
  m.failed = false;
  m.error.clear();
  progressed();
  try {
    m.schedule = schedule_of_launch(m.launches++);
  } catch (const std::invalid_argument& error) {
    set_error(error.what());
    return kInvalidConfiguration;
  }
  m.random = Random(m.schedule.seed);
  Launch launch{grid, block, cluster, dynamic_bytes, kernel, body, context};
  if (const int refused = check_launch(launch)) return refused;
  m.launch = &launch;
  if (__tsan_get_current_fiber) m.main_tsan = __tsan_get_current_fiber();
  m.main_stack = nullptr;  // the thread that launches may be another one than last time
  release(&launch.started);
  {
    Unseen unseen;
    run_blocks();
  }
  acquire(&launch.finished);
  m.launch = nullptr;
  return m.failed ? kLaunchFailure : 0;
}

extern "C" __attribute__((visibility("default"))) const char* fomoe_emulator_last_error() {
  return machine().error.c_str();
}

// For tests that count them.
extern "C" __attribute__((visibility("default"))) uint64_t fomoe_emulator_launches() {
  return machine().launches;
}

}  // namespace fomoe::emulator
