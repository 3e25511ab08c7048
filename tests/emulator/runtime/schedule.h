// Which thread runs next, how many blocks are resident, when asynchronous copies land.
#pragma once

#include <cstdint>
#include <string>

namespace fomoe::emulator {

enum class Order { forward, reverse, random, priority, laggard };
enum class Arrival { early, late, random };  // of asynchronous copies

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 1;
  unsigned resident_blocks = 1;
  Arrival arrival = Arrival::late;

  // As environment variables that bring it back.
  std::string text() const;
};

// What the environment asks for (FOMOE_EMULATOR_ORDER, _SEED, _RESIDENT, _ASYNC); what it does not
// name comes from a rotation over launches. Throws std::invalid_argument naming a bad variable.
Schedule schedule_of_launch(uint64_t launch);

// Small, fast, the same everywhere (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }

 private:
  uint64_t state_;
};

}  // namespace fomoe::emulator
