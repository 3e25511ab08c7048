#include "schedule.h"

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace fomoe::emulator {
namespace {

const char* const kOrders[] = {"forward", "reverse", "random", "priority", "laggard"};
const char* const kArrivals[] = {"early", "late", "random"};

// The position of an environment variable's word among `words`, `otherwise` when it is not set.
template <class Word, size_t N>
Word word_of(const char* variable, const char* const (&words)[N], Word otherwise) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return otherwise;
  std::string wanted;
  for (size_t i = 0; i < N; ++i) {
    if (std::strcmp(value, words[i]) == 0) return static_cast<Word>(i);
    wanted += (i > 0 ? ", " : "") + std::string(words[i]);
  }
  throw std::invalid_argument(std::string(variable) + " must be one of " + wanted + ", got '" +
                              value + "'");
}

uint64_t number_of(const char* variable, uint64_t least, uint64_t otherwise) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return otherwise;
  uint64_t number = 0;
  const char* end = value + std::strlen(value);
  const auto [rest, error] = std::from_chars(value, end, number);
  if (error != std::errc() || rest != end || number < least)
    throw std::invalid_argument(std::string(variable) + " must be a number of at least " +
                                std::to_string(least) + ", got '" + value + "'");
  return number;
}

}  // namespace

std::string Schedule::text() const {
  return std::string("FOMOE_EMULATOR_ORDER=") + kOrders[int(order)] +
         " FOMOE_EMULATOR_SEED=" + std::to_string(seed) +
         " FOMOE_EMULATOR_RESIDENT=" + std::to_string(resident_blocks) +
         " FOMOE_EMULATOR_ASYNC=" + kArrivals[int(arrival)];
}

Schedule schedule_of_launch(uint64_t launch) {
  constexpr Order kOrderCycle[] = {Order::random, Order::priority, Order::reverse, Order::forward,
                                   Order::laggard};
  constexpr Arrival kArrivalCycle[] = {Arrival::late, Arrival::random, Arrival::early};
  Schedule schedule;
  schedule.order = word_of("FOMOE_EMULATOR_ORDER", kOrders, kOrderCycle[launch % 5]);
  schedule.arrival = word_of("FOMOE_EMULATOR_ASYNC", kArrivals, kArrivalCycle[launch % 3]);
  schedule.seed = number_of("FOMOE_EMULATOR_SEED", 0, launch);
  schedule.resident_blocks =
      unsigned(number_of("FOMOE_EMULATOR_RESIDENT", 1, launch / 5 % 2 == 0 ? 4 : 1));
  return schedule;
}

}  // namespace fomoe::emulator
