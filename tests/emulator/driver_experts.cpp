// The driver's cases of the grouped GEMMs, with every tile. Inputs are small integers, so that sums
// are exact in any order and results must be the CPU kernels' bit for bit, but for those of
// activations with an exponential.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "driver.h"

namespace {

using namespace fomoe;
using namespace fomoe::driver;

struct ExpertsCase {
  const char* tile;
  DType dtype;
  std::vector<int> groups;  // rows of each resident
  int hidden, intermediate_size;
  Activation activation = Activation::relu2;
  bool biased = false;
};

// Rows of a case as compact lays them out.
struct Table {
  Table(const std::vector<int>& groups, Random& random) {
    constexpr int kSkipped = 5;
    for (size_t e = 0; e < groups.size(); ++e) ids.insert(ids.end(), size_t(groups[e]), int(e));
    ids.insert(ids.end(), kSkipped, -1);
    if (ids.size() % kTopK != 0) ids.push_back(-1);
    std::shuffle(ids.begin(), ids.end(), random.engine);
    const size_t slots = ids.size(), residents = groups.size();
    std::vector<int32_t> index(residents);
    for (size_t e = 0; e < residents; ++e) index[e] = int32_t(e);
    token_of_row.resize(slots), slot_of_row.resize(slots), row_of_slot.resize(slots);
    offsets.resize(residents + 1);
    tiles.resize(size_t(2 * max_tiles(int64_t(slots), int64_t(residents), kTileRows)));
    CompactArgs args{};
    args.expert_ids = ids.data();
    args.resident_index = index.data();
    args.tokens = tokens();
    args.top_k = kTopK;
    args.experts = args.residents = int32_t(residents);
    args.token_of_row = token_of_row.data();
    args.slot_of_row = slot_of_row.data();
    args.row_of_slot = row_of_slot.data();
    args.offsets = offsets.data();
    args.tile_rows = kTileRows;
    args.tiles = tiles.data();
    cpu::compact(args);
  }
  int64_t slots() const { return int64_t(ids.size()); }
  int64_t tokens() const { return slots() / kTopK; }

  static constexpr int kTopK = 2;
  std::vector<int32_t> ids, token_of_row, slot_of_row, row_of_slot, offsets, tiles;
};

float value_at(DType dtype, const char* bytes, int64_t i) {
  float value = 0;
  if (dtype == DType::f32) {
    std::memcpy(&value, bytes + 4 * i, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&value, &bits, 4);
  }
  return value;
}

class Experts {
 public:
  explicit Experts(const ExpertsCase& c)
      : c_(c),
        random_(unsigned(c.hidden * 7 + c.intermediate_size)),
        table_(c.groups, random_),
        residents_(int32_t(c.groups.size())),
        width_(c.intermediate_size * (is_gated(c.activation) ? 2 : 1)),
        exact_(c.activation == Activation::relu2) {
    setenv("FOMOE_EXPERTS_TILE", c.tile, 1);
  }

  bool run() {
    return expand() && contract() && contract_backward() && grouped_rows() && weight_grad() &&
           bias_grad() && activation_backward();
  }

 private:
  std::vector<char> integers(int64_t size) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = float(random_.below(5) - 2);
    return stored(c_.dtype, values);
  }
  std::vector<float> factors() {
    constexpr float kFactors[] = {0.5f, 1.0f, 2.0f, -1.0f};
    std::vector<float> values(size_t(table_.slots()));
    for (float& value : values) value = kFactors[random_.below(4)];
    return values;
  }
  Pair<char> output(int64_t size) { return Pair<char>(size * (c_.dtype == DType::f32 ? 4 : 2)); }
  // Bit for bit, or, behind an exponential, to a few roundings.
  bool agree(const Pair<char>& out, const char* name, bool exact) const {
    if (exact) return out.same(name);
    const int64_t size = int64_t(out.cpu.size()) / (c_.dtype == DType::f32 ? 4 : 2);
    const float room = c_.dtype == DType::f32 ? 1e-5f : 1.0f / 64;
    for (int64_t i = 0; i < size; ++i) {
      const float cpu = value_at(c_.dtype, out.cpu.data(), i);
      const float cuda = value_at(c_.dtype, out.cuda.data(), i);
      if (std::abs(cpu - cuda) <= room * (std::abs(cpu) + 0.1f)) continue;
      std::printf("  %s[%lld]: cpu %g, cuda %g\n", name, (long long)i, double(cpu), double(cuda));
      return false;
    }
    return true;
  }

  bool expand() {
    const auto x = integers(table_.tokens() * c_.hidden);
    const auto weight = integers(int64_t(residents_) * width_ * c_.hidden);
    const auto bias = integers(int64_t(residents_) * width_);
    Pair<char> act = output(table_.slots() * c_.intermediate_size);
    Pair<char> preact = output(table_.slots() * width_);
    ExpandArgs args{x.data(),
                    weight.data(),
                    c_.biased ? bias.data() : nullptr,
                    table_.token_of_row.data(),
                    table_.offsets.data(),
                    table_.tiles.data(),
                    c_.dtype,
                    residents_,
                    table_.tokens(),
                    table_.slots(),
                    c_.hidden,
                    c_.intermediate_size,
                    c_.activation,
                    act.cpu.data(),
                    preact.cpu.data()};
    cpu::expand(args);
    args.act = act.cuda.data();
    args.preact = preact.cuda.data();
    return launched(cuda::expand(args, nullptr), "expand") && preact.same("bytes of preact") &&
           agree(act, "act", exact_);
  }

  bool contract() {
    const auto act = integers(table_.slots() * c_.intermediate_size);
    const auto weight = integers(int64_t(residents_) * c_.hidden * c_.intermediate_size);
    const auto bias = integers(int64_t(residents_) * c_.hidden);
    Pair<char> rows = output(table_.slots() * c_.hidden);
    ContractArgs args{act.data(),
                      weight.data(),
                      c_.biased ? bias.data() : nullptr,
                      table_.offsets.data(),
                      table_.tiles.data(),
                      c_.dtype,
                      residents_,
                      table_.slots(),
                      c_.hidden,
                      c_.intermediate_size,
                      rows.cpu.data()};
    cpu::contract(args);
    args.rows = rows.cuda.data();
    return launched(cuda::contract(args, nullptr), "contract") && rows.same("bytes of rows");
  }

  bool contract_backward() {
    const auto grad_y = integers(table_.tokens() * c_.hidden);
    const auto weight = integers(int64_t(residents_) * c_.hidden * c_.intermediate_size);
    const auto bias = integers(int64_t(residents_) * c_.hidden);
    const auto preact = integers(table_.slots() * width_);
    const auto weights = factors();
    Pair<char> grad_preact = output(table_.slots() * width_);
    Pair<char> scaled_act = output(table_.slots() * c_.intermediate_size);
    Pair<float> grad_weights(table_.slots());
    ContractBackwardArgs args{grad_y.data(),
                              weight.data(),
                              c_.biased ? bias.data() : nullptr,
                              preact.data(),
                              weights.data(),
                              table_.token_of_row.data(),
                              table_.slot_of_row.data(),
                              table_.offsets.data(),
                              table_.tiles.data(),
                              c_.dtype,
                              residents_,
                              table_.tokens(),
                              table_.slots(),
                              c_.hidden,
                              c_.intermediate_size,
                              c_.activation,
                              grad_preact.cpu.data(),
                              scaled_act.cpu.data(),
                              grad_weights.cpu.data(),
                              nullptr};
    cpu::contract_backward(args);
    args.grad_preact = grad_preact.cuda.data();
    args.scaled_act = scaled_act.cuda.data();
    args.grad_weights = grad_weights.cuda.data();
    std::vector<float> workspace(size_t(cuda::contract_backward_workspace(args)), NAN);
    args.workspace = workspace.data();
    if (!launched(cuda::contract_backward(args, nullptr), "contract_backward") ||
        !agree(grad_preact, "grad_preact", exact_) || !agree(scaled_act, "scaled_act", exact_))
      return false;
    for (size_t i = 0; i < grad_weights.cpu.size(); ++i) {
      const float cpu = grad_weights.cpu[i], cuda = grad_weights.cuda[i];
      if (std::abs(cpu - cuda) <= (exact_ ? 0.0f : 1e-4f * (std::abs(cpu) + 10.0f))) continue;
      std::printf("  grad_weights[%zu]: cpu %g, cuda %g\n", i, double(cpu), double(cuda));
      return false;
    }
    return true;
  }

  bool grouped_rows() {
    const auto in = integers(table_.slots() * width_);
    const auto weight = integers(int64_t(residents_) * width_ * c_.hidden);
    Pair<char> rows = output(table_.slots() * c_.hidden);
    GroupedRowsArgs args{in.data(), weight.data(),  table_.offsets.data(), table_.tiles.data(),
                         c_.dtype,  residents_,     table_.slots(),        width_,
                         c_.hidden, rows.cpu.data()};
    cpu::grouped_rows(args);
    args.rows_out = rows.cuda.data();
    return launched(cuda::grouped_rows(args, nullptr), "grouped_rows") &&
           rows.same("bytes of rows_out");
  }

  // Gathered on either side, and added to totals.
  bool weight_grad() {
    for (const int gathered : {0, 1, 2}) {
      const int32_t* index = table_.token_of_row.data();
      const int64_t left_lines = gathered == 0 ? table_.tokens() : table_.slots();
      const int64_t right_lines = gathered == 1 ? table_.tokens() : table_.slots();
      const auto left = integers(left_lines * c_.hidden);
      const auto right = integers(right_lines * c_.intermediate_size);
      const int64_t size = int64_t(residents_) * c_.hidden * c_.intermediate_size;
      const bool add = gathered == 2;
      Pair<char> grad(size * (add || c_.dtype == DType::f32 ? 4 : 2));
      if (add) std::fill(grad.cpu.begin(), grad.cpu.end(), 0);
      if (add) std::fill(grad.cuda.begin(), grad.cuda.end(), 0);
      WeightGradArgs args{left.data(),
                          right.data(),
                          gathered == 0 ? index : nullptr,
                          gathered == 1 ? index : nullptr,
                          table_.offsets.data(),
                          c_.dtype,
                          residents_,
                          left_lines,
                          right_lines,
                          c_.hidden,
                          c_.intermediate_size,
                          add,
                          grad.cpu.data()};
      cpu::weight_grad(args);
      args.grad_weight = grad.cuda.data();
      if (!launched(cuda::weight_grad(args, nullptr), "weight_grad") ||
          !grad.same("bytes of grad_weight"))
        return false;
    }
    return true;
  }

  bool bias_grad() {
    const auto in = integers(table_.tokens() * c_.hidden);
    const auto weights = factors();
    Pair<char> grad = output(int64_t(residents_) * c_.hidden);
    BiasGradArgs args{in.data(),
                      table_.token_of_row.data(),
                      weights.data(),
                      table_.slot_of_row.data(),
                      table_.offsets.data(),
                      c_.dtype,
                      residents_,
                      c_.hidden,
                      grad.cpu.data()};
    cpu::bias_grad(args);
    args.grad_bias = grad.cuda.data();
    return launched(cuda::bias_grad(args, nullptr), "bias_grad") && grad.same("bytes of grad_bias");
  }

  bool activation_backward() {
    const auto grad_act = integers(table_.slots() * c_.intermediate_size);
    const auto preact = integers(table_.slots() * width_);
    Pair<char> grad = output(table_.slots() * width_);
    ActivationBackwardArgs args{
        grad_act.data(), preact.data(),        table_.offsets.data(), c_.dtype,       residents_,
        table_.slots(),  c_.intermediate_size, c_.activation,         grad.cpu.data()};
    cpu::activation_backward(args);
    args.grad_preact = grad.cuda.data();
    return launched(cuda::activation_backward(args, nullptr), "activation_backward") &&
           agree(grad, "grad_preact", exact_);
  }

  const ExpertsCase& c_;
  Random random_;
  Table table_;
  int32_t residents_;
  int64_t width_;
  bool exact_;
};

bool run_experts(const ExpertsCase& c) { return Experts(c).run(); }

std::vector<ExpertsCase> expert_cases(bool small) {
  const auto bf16 = DType::bf16, f32 = DType::f32;
  const auto swiglu = Activation::swiglu, clamped = Activation::clamped_swiglu;
  if (small)
    return {{"multistage_64", f32, {3}, 8, 8},
            {"multistage_128", bf16, {70, 3}, 72, 24, swiglu, true},
            {"ping_pong_128", bf16, {70, 0, 3}, 136, 136, swiglu, true},
            {"cooperative_256", bf16, {66, 2}, 264, 72},
            {"paired_128", bf16, {130, 3}, 136, 136, swiglu, true}};
  // Rows, columns and depths around whole tiles; several rounds of every ring of stages; more tiles
  // than blocks, so that consumers take turns.
  const std::vector<int> uneven = {130, 0, 64, 1, 65}, few = {2, 0, 0, 1}, none = {0, 0};
  return {{"multistage_64", bf16, uneven, 200, 72},
          {"multistage_64", f32, uneven, 100, 68, clamped, true},
          {"multistage_64", bf16, none, 16, 8, swiglu},
          {"multistage_128", bf16, uneven, 136, 200, swiglu, true},
          {"multistage_128", f32, {129, 3}, 68, 132, Activation::relu2, true},
          {"multistage_128", bf16, {}, 64, 64},
          {"ping_pong_128", bf16, uneven, 520, 264, Activation::relu2, true},
          {"ping_pong_128", bf16, uneven, 136, 200, swiglu, true},
          {"ping_pong_128", bf16, few, 64, 64, clamped},
          {"ping_pong_128", bf16, none, 72, 24},
          {"cooperative_256", bf16, uneven, 520, 264, Activation::relu2, true},
          {"cooperative_256", bf16, uneven, 136, 200, swiglu, true},
          {"cooperative_256", bf16, few, 64, 64},
          // Pairs with one B, with two, and a block that keeps the other one company; an even list.
          {"paired_128", bf16, uneven, 520, 264, Activation::relu2, true},
          {"paired_128", bf16, {257, 130, 64}, 136, 200, swiglu, true},
          {"paired_128", bf16, few, 64, 64, clamped},
          {"paired_128", bf16, {1}, 64, 64},
          {"paired_128", bf16, none, 72, 24}};
}

std::string name_of(const ExpertsCase& c) {
  std::string groups;
  for (const int rows : c.groups) groups += (groups.empty() ? "" : "+") + std::to_string(rows);
  char name[200];
  std::snprintf(name, sizeof name, "experts %s %s rows %s sizes %d, %d activation %d%s", c.tile,
                dtype_name(c.dtype), groups.c_str(), c.hidden, c.intermediate_size,
                int(c.activation), c.biased ? " biased" : "");
  return name;
}

}  // namespace

int fomoe::driver::run_expert_cases(bool small) {
  return failures(expert_cases(small), run_experts);
}
