// The choice of kernel and tile of a grouped GEMM: one table, by shape, without autotuning at run time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../../kernels.h"

namespace fomoe::cuda {

enum class Verb : int32_t { expand, contract, contract_backward, grouped_rows, weight_grad };
constexpr const char* kVerbNames[] = {"expand", "contract", "contract_backward", "grouped_rows",
                                      "weight_grad"};

// multistage: cp.async and mma.sync, every architecture and dtype. ping_pong and cooperative: TMA
// and wgmma on Hopper, 16-bit dtypes; two consumer warpgroups alternate tiles, or share each tile.
// paired: ping-pong by two blocks that read B once for both (not for weight_grad, which gathers B).
enum class Kernel : int32_t { multistage, ping_pong, cooperative, paired };

// A tile has kTileRows rows and `columns` columns of sums (gate and up columns both count).
struct Tile {
  const char* name;
  Kernel kernel;
  int32_t columns;
};
constexpr Tile kTiles[] = {{"multistage_64", Kernel::multistage, 64},
                           {"multistage_128", Kernel::multistage, 128},
                           {"ping_pong_128", Kernel::ping_pong, 128},
                           {"cooperative_256", Kernel::cooperative, 256},
                           {"paired_128", Kernel::paired, 128}};
constexpr Tile kMultistage64 = kTiles[0], kMultistage128 = kTiles[1], kPingPong128 = kTiles[2],
               kCooperative256 = kTiles[3], kPaired128 = kTiles[4];

// The first rule that fits is taken. On an H200 (docs/performance.md) tiles of 256 columns, which read
// the least from L2 and shared memory per product, were faster for expand and for gradients of weights.
// Ping-pong hides an epilogue behind the other warpgroup's products. It was faster for
// contract_backward, whose epilogue moves several times as many bytes as the others, and for contract
// and grouped_rows with sums of up to 2048 terms, the longest that were measured; from twice as many on
// the epilogue is short compared with its main loop. A rule holds from `columns` columns of sums and
// `terms` terms of a sum on: a tile wider than the columns would multiply zeros. No rule takes
// paired_128, which has not been measured on a GPU yet.
struct Rule {
  bool hopper;
  Verb verb;
  int32_t columns, terms;
  Tile tile;
};
constexpr Rule kRules[] = {
    {true, Verb::expand, 256, 256, kCooperative256},
    {true, Verb::expand, 0, 0, kPingPong128},
    {true, Verb::contract, 256, 4096, kCooperative256},
    {true, Verb::contract, 0, 0, kPingPong128},
    {true, Verb::contract_backward, 0, 0, kPingPong128},
    {true, Verb::grouped_rows, 256, 4096, kCooperative256},
    {true, Verb::grouped_rows, 0, 0, kPingPong128},
    {true, Verb::weight_grad, 256, 0, kCooperative256},
    {true, Verb::weight_grad, 0, 0, kPingPong128},
    {false, Verb::expand, 128, 0, kMultistage128},
    {false, Verb::expand, 0, 0, kMultistage64},
    {false, Verb::contract, 128, 0, kMultistage128},
    {false, Verb::contract, 0, 0, kMultistage64},
    {false, Verb::contract_backward, 128, 0, kMultistage128},
    {false, Verb::contract_backward, 0, 0, kMultistage64},
    {false, Verb::grouped_rows, 128, 0, kMultistage128},
    {false, Verb::grouped_rows, 0, 0, kMultistage64},
    {false, Verb::weight_grad, 128, 0, kMultistage128},
    {false, Verb::weight_grad, 0, 0, kMultistage64},
};

// The tile that FOMOE_EXPERTS_TILE names, for tuning and tests; null when it is not set.
// std::invalid_argument for an unknown name.
inline const Tile* forced_tile() {
  const char* wanted = std::getenv("FOMOE_EXPERTS_TILE");
  if (wanted == nullptr || *wanted == '\0') return nullptr;
  std::string names;
  for (const Tile& tile : kTiles) {
    if (std::string(wanted) == tile.name) return &tile;
    names += (names.empty() ? "" : ", ") + std::string(tile.name);
  }
  throw std::invalid_argument("FOMOE_EXPERTS_TILE must be one of " + names + ", got '" +
                              std::string(wanted) + "'");
}

// `terms` is 0 where only the device knows the number, which counts as many. `hopper`: the device runs
// sm_90a code. A forced tile that verb, dtype or device cannot run is ignored.
inline Tile choose_tile(Verb verb, DType dtype, int64_t columns, int64_t terms, bool hopper) {
  hopper = hopper && dtype != DType::f32;
  if (const Tile* forced = forced_tile();
      forced != nullptr && (forced->kernel == Kernel::multistage || hopper) &&
      !(forced->kernel == Kernel::paired && verb == Verb::weight_grad))
    return *forced;
  for (const Rule& rule : kRules)
    if (rule.hopper == hopper && rule.verb == verb && columns >= rule.columns &&
        (terms >= rule.terms || terms == 0))
      return rule.tile;
  return kMultistage64;
}

}  // namespace fomoe::cuda
