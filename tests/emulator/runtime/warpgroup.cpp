// Instructions of warpgroups. A product reads its operands when the first thread issues it, or only at
// the wait for it, as the schedule says. Until the wait its accumulators read NaN.
//
// Threads come to an instruction when they like, and only the wait holds them; it has happened when the
// last of them has come. So each thread's n-th instruction must be the same as everybody's n-th.
#include "../include/emulator_warpgroup.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <map>

#include "async.h"
#include "sanitizers.h"

namespace fomoe::emulator {
namespace {

constexpr unsigned kThreads = 128;
constexpr int kRows = 64, kDepth = 16;
// Where dynamic shared memory begins, so that address 0 is never right.
constexpr uint32_t kFirstAddress = 1024;

// ---- operands ------------------------------------------------------------------------------------

// A matrix in shared memory; `lines` are rows of A or columns of B.
struct Operand {
  uint32_t start, leading, stride;
  bool transposed;
  int lines;

  Operand(uint64_t descriptor, bool transposed_, int lines_)
      : start(field(descriptor, 0)),
        leading(field(descriptor, 16)),
        stride(field(descriptor, 32)),
        transposed(transposed_),
        lines(lines_) {}

  static uint32_t field(uint64_t descriptor, int bit) {
    return uint32_t(descriptor >> bit & 0x3fff) << 4;
  }
  // Chunks of 8 values: along K, or along the lines when transposed.
  int chunks() const { return lines * kDepth / 8; }
  // The address of a chunk, and of which values it is: (line, k) and its successors.
  uint32_t chunk(int number, int* line, int* k) const {
    uint32_t address;
    if (transposed) {
      *line = number % (lines / 8) * 8;
      *k = number / (lines / 8);
      address = start + uint32_t(*line / 64) * leading + uint32_t(*k / 8) * stride +
                uint32_t(*k % 8) * 128 + uint32_t(*line % 64) * 2;
    } else {
      *line = number / (kDepth / 8);
      *k = number % (kDepth / 8) * 8;
      address = start + uint32_t(*line / 8) * stride + uint32_t(*line % 8) * 128 + uint32_t(*k) * 2;
    }
    // 128-byte swizzle.
    return address ^ (address >> 7 & 7) << 4;
  }
};

void check_operand(const char* which, uint64_t descriptor, const Operand& operand, Here here) {
  constexpr const char* kName = "wgmma.mma_async";
  constexpr uint64_t kUnused = ~uint64_t(0x3fff | 0x3fffull << 16 | 0x3fffull << 32);
  if ((descriptor & kUnused) != uint64_t(1) << 62)
    fail(here, "%s: the descriptor of %s, %016lx, is not of a matrix with 128-byte swizzle", kName,
         which, static_cast<unsigned long>(descriptor));
  if (operand.start >> 7 & 7)
    fail(here, "%s: the tile of %s is not aligned to 1024 bytes", kName, which);
  const size_t end = kFirstAddress + self()->block->dynamic_bytes;
  for (int number = 0; number < operand.chunks(); ++number) {
    int line, k;
    const uint32_t address = operand.chunk(number, &line, &k);
    if (address < kFirstAddress || address + 16 > end)
      fail(here, "%s: line %d, k %d of %s is outside of dynamic shared memory", kName, line, k,
           which);
  }
}

float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float f16_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const bool special = (bits & 0x7c00) == 0x7c00;
  const uint32_t wide = uint32_t(bits & 0x7fff) << 13 | (special ? 0x7f800000u : 0u);
  float value;
  std::memcpy(&value, &wide, sizeof value);
  if (!special) value *= 0x1p112f;  // the exponents' biases differ by 127 - 15
  return sign ? -value : value;
}

// values[line * line_step + k * k_step]
template <class Value>
void read_operand(const Operand& operand, const unsigned char* shared, int line_step, int k_step,
                  float* values, const Value& value_of) {
  for (int number = 0; number < operand.chunks(); ++number) {
    int line, k;
    uint16_t bits[8];
    std::memcpy(bits, shared + (operand.chunk(number, &line, &k) - kFirstAddress), sizeof bits);
    float* to = values + line * line_step + k * k_step;
    const int step = operand.transposed ? line_step : k_step;
    for (int i = 0; i < 8; ++i) to[i * step] = value_of(bits[i]);
  }
}

// ---- products ------------------------------------------------------------------------------------

// The registers of all threads that hold one D. `values` in rows of `columns` while in flight.
struct Accumulators {
  int columns;
  unsigned in_flight = 0;  // products
  float* of[kThreads] = {};
  std::vector<float> values;

  float& at(unsigned thread, int i) {
    const unsigned row = 16 * (thread / 32) + 8 * unsigned(i / 2 % 2) + thread % 32 / 4;
    const unsigned column = 8 * unsigned(i / 4) + 2 * (thread % 4) + unsigned(i % 2);
    return values[row * unsigned(columns) + column];
  }
  void take(unsigned thread, float* registers) {
    of[thread] = registers;
    for (int i = 0; i < columns / 2; ++i) {
      at(thread, i) = registers[i];
      registers[i] = NAN;
    }
  }
  void give_back() {
    for (unsigned thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < columns / 2; ++i) of[thread][i] = at(thread, i);
  }
};

struct Multiply {
  Product product;
  std::shared_ptr<Accumulators> accumulators;
  bool starts;                     // nothing was in flight to these accumulators
  std::vector<float> rows, depth;  // A by rows, B by steps of K; empty until they are read
  char issued = 0;                 // an address for TSan

  Operand a() const { return Operand(product.a, product.transpose_a, kRows); }
  Operand b() const { return Operand(product.b, product.transpose_b, product.columns); }
};

void read_operands(Multiply& multiply) {
  const Block& block = *self()->block;
  const unsigned char* shared = proxy_sees(block.dynamic, block.dynamic_bytes);
  const int columns = multiply.product.columns;
  multiply.rows.resize(size_t(kRows * kDepth));
  multiply.depth.resize(size_t(kDepth * columns));
  const auto read = [&](const auto& value_of) {
    read_operand(multiply.a(), shared, kDepth, 1, multiply.rows.data(), value_of);
    read_operand(multiply.b(), shared, 1, columns, multiply.depth.data(), value_of);
  };
  if (multiply.product.element == Element::bf16) {
    read(bf16_value);
  } else {
    read(f16_value);
  }
}

template <int kColumns>
[[gnu::optimize("O3")]] void multiply_add(const float* a, const float* b, float* d) {
  for (int row = 0; row < kRows; ++row, a += kDepth, d += kColumns) {
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[k];
      for (int column = 0; column < kColumns; ++column)
        d[column] += factor * b[k * kColumns + column];
    }
  }
}

void compute(Multiply& multiply) {
  if (multiply.rows.empty()) read_operands(multiply);
  std::vector<float>& d = multiply.accumulators->values;
  if (!multiply.product.accumulate) std::fill(d.begin(), d.end(), 0.0f);
  const float *a = multiply.rows.data(), *b = multiply.depth.data();
  switch (multiply.product.columns) {
    case 64: return multiply_add<64>(a, b, d.data());
    case 128: return multiply_add<128>(a, b, d.data());
    default: return multiply_add<256>(a, b, d.data());
  }
}

// ---- instructions --------------------------------------------------------------------------------

using Multiplies = std::vector<std::shared_ptr<Multiply>>;

struct Instruction {
  const char* name;
  Here here;
  unsigned number;  // pending groups or registers
  std::shared_ptr<Multiply> multiply;
  unsigned came = 0;
};

struct Group {
  Multiplies multiplies;
  std::unique_ptr<char> finished = std::make_unique<char>();  // an address for TSan
};

struct Warpgroup {
  std::deque<Instruction> instructions;  // to which not all threads have come
  uint64_t first = 0;                    // the number of the first of them
  uint64_t next[kThreads] = {};          // the number of each thread's next one
  std::vector<Fiber*> waiting;
  std::vector<std::shared_ptr<Accumulators>> in_flight;
  Multiplies open;
  std::deque<Group> groups;
  bool arrived = false;          // since accumulators could last be touched
  std::shared_ptr<char> waited;  // what TSan knows of groups that are done
  Unit tensor_core;              // reads operands
};

}  // namespace

struct Warpgroups {
  std::map<unsigned, Warpgroup> by_number;
};

namespace {

unsigned thread_of_group() { return self()->linear % kThreads; }

Warpgroup& warpgroup(const char* name, Here here) {
  const Fiber& me = *self();
  if (me.block->fibers.size() % kThreads != 0)
    fail(here, "%s: the block must be whole warpgroups of %u threads, got %zu", name, kThreads,
         me.block->fibers.size());
  auto& warpgroups = warpgroups_of(*me.block);
  if (warpgroups == nullptr) warpgroups = std::make_shared<Warpgroups>();
  return warpgroups->by_number[me.linear / kThreads];
}

// The thread comes to its next instruction.
Instruction& come_to(Warpgroup& group, const char* name, unsigned number, Here here) {
  const uint64_t position = group.next[thread_of_group()]++ - group.first;
  if (position == group.instructions.size())
    group.instructions.push_back({name, here, number, nullptr});
  Instruction& instruction = group.instructions[position];
  if (std::strcmp(instruction.name, name) != 0 || instruction.here.line != here.line ||
      std::strcmp(instruction.here.file, here.file) != 0 || instruction.number != number)
    fail(here, "%s in divergent code: other threads of the warpgroup come to %s at %s:%d", name,
         instruction.name, instruction.here.file, instruction.here.line);
  ++instruction.came;
  return instruction;
}

// True for the last thread: the instruction happens.
bool is_complete(Warpgroup& group, Instruction& instruction) {
  if (instruction.came != kThreads) return false;
  // Whoever came to this one has come to those before it.
  group.instructions.pop_front();
  ++group.first;
  return true;
}

std::shared_ptr<Accumulators> in_flight_at(Warpgroup& group, const float* registers) {
  for (const auto& accumulators : group.in_flight)
    if (accumulators->of[thread_of_group()] == registers) return accumulators;
  return nullptr;
}

std::shared_ptr<Multiply> new_multiply(Warpgroup& group, const Product& product,
                                       std::shared_ptr<Accumulators> accumulators, Here here) {
  auto multiply = std::make_shared<Multiply>();
  multiply->product = product;
  check_operand("A", product.a, multiply->a(), here);
  check_operand("B", product.b, multiply->b(), here);
  multiply->starts = accumulators == nullptr;
  if (multiply->starts) {
    accumulators = std::make_shared<Accumulators>();
    accumulators->columns = product.columns;
    accumulators->values.resize(size_t(kRows * product.columns));
    group.in_flight.push_back(accumulators);
  }
  ++accumulators->in_flight;
  multiply->accumulators = std::move(accumulators);
  return multiply;
}

void check_same(const Product& mine, const Product& others, Here here) {
  if (mine.a != others.a || mine.b != others.b)
    fail(here, "wgmma.mma_async: descriptors differ inside the warpgroup");
  if (mine.accumulate != others.accumulate)
    fail(here, "wgmma.mma_async: `accumulate` differs inside the warpgroup");
}

// Announces what a product reads, as read by the tensor core when the first thread has issued it: what
// threads do next is in no order with that until they wait.
void announce_reads(Warpgroup& group, Multiply& multiply) {
  unsigned char* shared = self()->block->dynamic;
  group.tensor_core.act([&] {
    acquire(&multiply.issued);
    for (const Operand& operand : {multiply.a(), multiply.b()}) {
      for (int number = 0; number < operand.chunks(); ++number) {
        int line, k;
        __tsan_read_range(shared + (operand.chunk(number, &line, &k) - kFirstAddress), 16);
      }
    }
  });
}

void retire(Warpgroup& group, unsigned pending) {
  while (group.groups.size() > pending) {
    Group& oldest = group.groups.front();
    for (const auto& multiply : oldest.multiplies) {
      compute(*multiply);
      Accumulators& accumulators = *multiply->accumulators;
      if (--accumulators.in_flight > 0) continue;
      accumulators.give_back();
      std::erase(group.in_flight, multiply->accumulators);
      group.arrived = false;
    }
    group.waited = std::move(oldest.finished);
    group.groups.pop_front();
  }
}

}  // namespace

uint32_t matrix_address(const void* tile, Here here) {
  const Block& block = *self()->block;
  const auto* at = static_cast<const unsigned char*>(tile);
  if (block.dynamic == nullptr || at < block.dynamic || at >= block.dynamic + block.dynamic_bytes)
    fail(here, "matrix descriptor: %p is not in dynamic shared memory", tile);
  if (uintptr_t(tile) % 16 != 0)
    fail(here, "matrix descriptor: %p is not aligned to 16 bytes", tile);
  return uint32_t(at - block.dynamic) + kFirstAddress;
}

void warpgroup_arrive(Here here) {
  maybe_yield();
  Unseen unseen;
  constexpr const char* kName = "wgmma.fence";
  Warpgroup& group = warpgroup(kName, here);
  if (is_complete(group, come_to(group, kName, 0, here))) group.arrived = true;
}

void warpgroup_multiply(float* registers, const Product& product, Here here) {
  constexpr const char* kName = "wgmma.mma_async";
  maybe_yield();
  Multiply* first = nullptr;  // the product, for the thread that comes first
  const unsigned thread = thread_of_group();
  {
    Unseen unseen;
    Warpgroup& group = warpgroup(kName, here);
    Instruction& instruction = come_to(group, kName, 0, here);
    const auto mine = in_flight_at(group, registers);
    if (instruction.came == 1) {
      instruction.multiply = new_multiply(group, product, mine, here);
      first = instruction.multiply.get();
    }
    Multiply& multiply = *instruction.multiply;
    check_same(product, multiply.product, here);
    Accumulators& accumulators = *multiply.accumulators;
    if (multiply.starts && mine == nullptr) accumulators.take(thread, registers);
    if (accumulators.of[thread] != registers || accumulators.columns != product.columns)
      fail(here, "%s: others in the warpgroup have other accumulators", kName);
  }
  if (first != nullptr) {
    release(&first->issued);
    announce_reads(warpgroup(kName, here), *first);
  }
  Unseen unseen;
  if (first != nullptr && lands_now()) read_operands(*first);
  Warpgroup& group = warpgroup(kName, here);
  Instruction& instruction = group.instructions[group.next[thread] - 1 - group.first];
  const auto multiply = instruction.multiply;
  if (!is_complete(group, instruction)) return;
  if (multiply->starts && !group.arrived)
    fail(here, "%s: no wgmma.fence since the accumulators could last be touched", kName);
  group.open.push_back(multiply);
}

void warpgroup_commit(Here here) {
  constexpr const char* kName = "wgmma.commit_group";
  maybe_yield();
  Unseen unseen;
  Warpgroup& group = warpgroup(kName, here);
  if (!is_complete(group, come_to(group, kName, 0, here))) return;
  Group& closed = group.groups.emplace_back();
  closed.multiplies = std::move(group.open);
  group.open.clear();
  group.tensor_core.act([&] { release(closed.finished.get()); });
}

void warpgroup_wait(unsigned pending, Here here) {
  constexpr const char* kName = "wgmma.wait_group";
  {
    Unseen unseen;
    Warpgroup& group = warpgroup(kName, here);
    Instruction& instruction = come_to(group, kName, pending, here);
    group.waiting.push_back(self());
    if (is_complete(group, instruction)) {
      retire(group, pending);
      make_ready(group.waiting);
    }
  }
  wait_here(kName, here);
  if (const auto& waited = warpgroup(kName, here).waited) acquire(waited.get());
}

void registers_change(const char* name, unsigned registers, Here here) {
  Unseen unseen;
  Warpgroup& group = warpgroup(name, here);
  is_complete(group, come_to(group, name, registers, here));
}

std::string unfinished(const Warpgroups& warpgroups) {
  for (const auto& [number, group] : warpgroups.by_number) {
    const std::string who = " of warpgroup " + std::to_string(number);
    if (!group.instructions.empty()) {
      const Instruction& instruction = group.instructions.front();
      return std::string(instruction.name) + who + " at " + instruction.here.file + ":" +
             std::to_string(instruction.here.line) + ", to which " +
             std::to_string(instruction.came) + " threads came";
    }
    if (!group.in_flight.empty()) return "wgmma" + who + " in flight";
  }
  return {};
}

}  // namespace fomoe::emulator
