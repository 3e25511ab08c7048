// Runs the emulated CUDA kernels without Python, so that sanitizers see nothing but them, and
// compares them with the CPU kernels: ids, tables and copied or combined rows bit for bit.
//
//   driver [--small] [kernel ...]     all kernels by default; --small: few and small cases, for TSan
//
// Every array is on the heap at its exact size, outputs hold garbage before. The schedule comes
// from the environment (README.md). Exit status 1 when a case differs or a launch fails.
#define FOMOE_ISA scalar
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/simd.h"
#include "driver.h"

namespace fomoe::driver {

std::vector<char> stored(DType dtype, const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * (dtype == DType::f32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::f32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else {
      const uint16_t half = dtype == DType::bf16 ? cpu::scalar::float_to_bfloat(values[i])
                                                 : cpu::scalar::float_to_half(values[i]);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

}  // namespace fomoe::driver

namespace {

using namespace fomoe;
using namespace fomoe::driver;

// ---- route ---------------------------------------------------------------------------------------

struct RouteCase {
  int tokens, experts, top_k;
  DType dtype = DType::f32;
  Scoring scoring = Scoring::sigmoid;
  bool biased = false, restricted = false, renormalize = false, counting = false, tied = false;
  int groups = 1, groups_kept = 1;
  int misaligned = 0;                // elements that the logits start behind an aligned address
  float spread = 2.0f, mean = 0.0f;  // of the logits
};

bool run_route(const RouteCase& c) {
  Random random(unsigned(c.tokens * 31 + c.experts));
  std::vector<float> values = normals(random, int64_t(c.tokens) * c.experts + c.misaligned);
  for (float& value : values)
    value = c.tied ? float(random.below(3)) - 1.0f : c.spread * value + c.mean;
  const std::vector<char> logits = stored(c.dtype, values);
  const std::vector<float> bias = normals(random, c.experts);
  std::vector<uint8_t> allowed(size_t(c.experts));
  for (uint8_t& flag : allowed) flag = random.chance(0.4);
  const std::vector<float> grad = normals(random, int64_t(c.tokens) * c.top_k);

  const int64_t slots = int64_t(c.tokens) * c.top_k;
  Pair<float> weights(slots);
  Pair<int32_t> ids(slots);
  Pair<int64_t> statistics(2 * c.experts + 1);
  RouteArgs args{};
  args.logits = logits.data() + c.misaligned * (c.dtype == DType::f32 ? 4 : 2);
  args.logits_dtype = c.dtype;
  args.selection_bias = c.biased ? bias.data() : nullptr;
  args.allowed = c.restricted ? allowed.data() : nullptr;
  args.tokens = c.tokens;
  args.experts = c.experts;
  args.top_k = c.top_k;
  args.scoring = c.scoring;
  args.groups = c.groups;
  args.groups_kept = c.groups_kept;
  args.renormalize = c.renormalize;
  args.scale = 1.25f;
  const auto set_outputs = [&](std::vector<float>& w, std::vector<int32_t>& i,
                               std::vector<int64_t>& s) {
    args.weights = w.data();
    args.expert_ids = i.data();
    std::fill(s.begin(), s.end(), 0);
    args.statistics = c.counting ? s.data() : nullptr;
  };
  set_outputs(weights.cpu, ids.cpu, statistics.cpu);
  bool good = cpu::route(args);
  set_outputs(weights.cuda, ids.cuda, statistics.cuda);
  good &= launched(cuda::route(args, nullptr), "route");
  good &= ids.same("experts") && weights.same("weights");
  // Entropy takes a logarithm that the two compute differently.
  const double entropies = std::abs(double(statistics.cpu.back() - statistics.cuda.back()));
  good &= entropies <= 1e-5 * 4294967296.0 * c.tokens;
  statistics.cpu.back() = statistics.cuda.back();
  good &= statistics.same("statistics");

  Pair<char> grads(int64_t(c.tokens) * c.experts * (c.dtype == DType::f32 ? 4 : 2));
  RouteBackwardArgs back{};
  back.grad_weights = grad.data();
  back.logits = args.logits;
  back.logits_dtype = c.dtype;
  back.expert_ids = ids.cpu.data();
  back.allowed = args.allowed;
  back.tokens = c.tokens;
  back.experts = c.experts;
  back.top_k = c.top_k;
  back.scoring = c.scoring;
  back.renormalize = c.renormalize;
  back.scale = 1.25f;
  back.grad_logits = grads.cpu.data();
  cpu::route_backward(back);
  back.grad_logits = grads.cuda.data();
  good &= launched(cuda::route_backward(back, nullptr), "route_backward");
  return good && grads.same("bytes of grad_logits");
}

std::vector<RouteCase> route_cases(bool small) {
  const Scoring sigmoid = Scoring::sigmoid, softmax = Scoring::softmax;
  if (small) {
    return {{.tokens = 40, .experts = 70, .top_k = 4, .scoring = softmax, .counting = true},
            {.tokens = 30,
             .experts = 64,
             .top_k = 6,
             .dtype = DType::bf16,
             .biased = true,
             .renormalize = true,
             .counting = true,
             .groups = 8,
             .groups_kept = 3},
            {.tokens = 26, .experts = 40, .top_k = 33, .scoring = sigmoid, .tied = true}};
  }
  std::vector<RouteCase> cases;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Scoring scoring : {sigmoid, softmax}) {
      for (const int experts : {2, 31, 64, 100, 256, 384, 1024}) {
        const int top_k = std::min(experts, 8);
        cases.push_back({.tokens = 11,
                         .experts = experts,
                         .top_k = top_k,
                         .dtype = dtype,
                         .scoring = scoring,
                         .counting = experts % 2 == 0});
        cases.push_back({.tokens = 5,
                         .experts = experts,
                         .top_k = top_k,
                         .dtype = dtype,
                         .scoring = scoring,
                         .biased = true,
                         .restricted = experts > 31,
                         .renormalize = true,
                         .counting = true});
      }
      cases.push_back({.tokens = 6,
                       .experts = 256,
                       .top_k = 8,
                       .dtype = dtype,
                       .scoring = scoring,
                       .biased = true,
                       .renormalize = true,
                       .groups = 8,
                       .groups_kept = 4});
      cases.push_back({.tokens = 5,
                       .experts = 90,
                       .top_k = 7,
                       .dtype = dtype,
                       .scoring = scoring,
                       .restricted = true,
                       .groups = 45,
                       .groups_kept = 9});
      cases.push_back({.tokens = 5,
                       .experts = 72,
                       .top_k = 5,
                       .dtype = dtype,
                       .scoring = scoring,
                       .groups = 6,
                       .groups_kept = 2,
                       .misaligned = 1});
      cases.push_back({.tokens = 4,
                       .experts = 128,
                       .top_k = 64,
                       .dtype = dtype,
                       .scoring = scoring,
                       .renormalize = true,
                       .tied = true});
      // Scores that are no normal numbers, or whose quotients are not. Entropies are then small
      // differences of great logarithms.
      for (const int experts : {32, 250}) {
        cases.push_back({.tokens = 5,
                         .experts = experts,
                         .top_k = 8,
                         .dtype = dtype,
                         .scoring = scoring,
                         .biased = true,
                         .counting = scoring == softmax,
                         .spread = scoring == sigmoid ? 0.5f : 30.0f,
                         .mean = scoring == sigmoid ? -87.5f : 0.0f});
      }
      // More values reach the bound than are listed as candidates.
      cases.push_back({.tokens = 4,
                       .experts = 100,
                       .top_k = 12,
                       .dtype = dtype,
                       .scoring = scoring,
                       .tied = true});
      cases.push_back({.tokens = 4,
                       .experts = 200,
                       .top_k = 12,
                       .dtype = dtype,
                       .scoring = scoring,
                       .tied = true,
                       .misaligned = 3});
    }
  }
  cases.push_back({.tokens = 400, .experts = 7, .top_k = 2, .counting = true});
  return cases;
}

std::string name_of(const RouteCase& c) {
  char name[200];
  std::snprintf(name, sizeof name, "route %dx%d top %d %s %s%s%s%s%s%s groups %d/%d", c.tokens,
                c.experts, c.top_k, dtype_name(c.dtype),
                c.scoring == Scoring::softmax ? "softmax" : "sigmoid", c.biased ? " biased" : "",
                c.restricted ? " restricted" : "", c.renormalize ? " renormalized" : "",
                c.counting ? " counting" : "", c.tied ? " tied" : "", c.groups_kept, c.groups);
  return name;
}

// ---- compact -------------------------------------------------------------------------------------

struct CompactCase {
  int tokens, top_k, experts, residents, tile_rows;
  double hot = 0.0;      // share of slots on the last resident expert
  double skipped = 0.2;  // share of slots without expert
};

bool run_compact(const CompactCase& c) {
  Random random(unsigned(c.tokens * 17 + c.experts));
  const int64_t slots = int64_t(c.tokens) * c.top_k;
  std::vector<int32_t> index(size_t(c.experts), -1), ids(static_cast<size_t>(slots));
  for (int r = 0; r < c.residents; ++r) index[size_t(c.experts - 1 - r)] = r;
  for (int32_t& id : ids) {
    id = random.chance(c.skipped) ? -1 : random.below(c.experts);
    if (random.chance(c.hot)) id = c.experts - 1;
  }
  const int64_t tiles = max_tiles(slots, c.residents, c.tile_rows);
  Pair<int32_t> token_of_row(slots), slot_of_row(slots), row_of_slot(slots),
      offsets(c.residents + 1), schedule(2 * tiles);
  CompactArgs args{};
  args.expert_ids = ids.data();
  args.resident_index = index.data();
  args.tokens = c.tokens;
  args.top_k = c.top_k;
  args.experts = c.experts;
  args.residents = c.residents;
  args.tile_rows = c.tile_rows;
  const auto set_outputs = [&](auto member) {
    args.token_of_row = (token_of_row.*member).data();
    args.slot_of_row = (slot_of_row.*member).data();
    args.row_of_slot = (row_of_slot.*member).data();
    args.offsets = (offsets.*member).data();
    args.tiles = c.tile_rows > 0 ? (schedule.*member).data() : nullptr;
  };
  set_outputs(&Pair<int32_t>::cpu);
  bool good = cpu::compact(args);
  set_outputs(&Pair<int32_t>::cuda);
  std::vector<int32_t> workspace(static_cast<size_t>(cuda::compact_workspace(args)), -7);
  args.workspace = workspace.data();
  good &= launched(cuda::compact(args, nullptr), "compact");
  return good && offsets.same("offsets") && row_of_slot.same("row_of_slot") &&
         slot_of_row.same("slot_of_row") && token_of_row.same("token_of_row") &&
         schedule.same("tiles");
}

std::vector<CompactCase> compact_cases(bool small) {
  if (small) return {{300, 8, 40, 20, 64, 0.1}, {5, 3, 6, 2, 0}};
  return {{0, 4, 8, 4, 16},          {1, 1, 1, 1, 128},          {7, 3, 5, 0, 16},
          {2048, 1, 64, 64, 64},     {2049, 1, 64, 33, 64, 0.5}, {683, 3, 128, 100, 16},
          {700, 6, 1024, 1024, 16},  {600, 8, 600, 520, 32},     {900, 7, 13, 1, 128, 0.9},
          {3000, 2, 17, 17, 8, 0.7}, {100, 5, 9, 9, 16, 0, 1.0}, {40000, 8, 256, 130, 128, 0.3}};
}

std::string name_of(const CompactCase& c) {
  char name[160];
  std::snprintf(name, sizeof name, "compact %dx%d experts %d residents %d tiles %d hot %.1f",
                c.tokens, c.top_k, c.experts, c.residents, c.tile_rows, c.hot);
  return name;
}

// ---- gather, combine and its backward ------------------------------------------------------------

struct RowsCase {
  int tokens, top_k, hidden;
  DType dtype = DType::f32;
  double skipped = 0.3;
  bool weighted = true;
  int misaligned = 0;  // elements that the rows start behind an aligned address
};

bool run_rows(const RowsCase& c) {
  Random random(unsigned(c.tokens * 13 + c.hidden));
  const int64_t slots = int64_t(c.tokens) * c.top_k, element = c.dtype == DType::f32 ? 4 : 2;
  std::vector<int32_t> row_of_slot(static_cast<size_t>(slots), -1);
  int32_t rows = 0;
  for (int32_t& row : row_of_slot)
    if (!random.chance(c.skipped)) row = rows++;
  std::shuffle(row_of_slot.begin(), row_of_slot.end(), random.engine);
  const int64_t shift = c.misaligned;
  const std::vector<char> in = stored(c.dtype, normals(random, slots * c.hidden + shift));
  const std::vector<char> tokens = stored(c.dtype, normals(random, c.tokens * c.hidden + shift));
  const std::vector<float> weights = normals(random, slots);
  const auto shifted = [&](const std::vector<char>& v) { return v.data() + shift * element; };
  bool good = true;

  Pair<char> y(c.tokens * c.hidden * element);
  CombineArgs combine{shifted(in),
                      c.weighted ? weights.data() : nullptr,
                      row_of_slot.data(),
                      c.dtype,
                      c.tokens,
                      c.hidden,
                      c.top_k,
                      y.cpu.data()};
  cpu::combine(combine);
  combine.y = y.cuda.data();
  good &= launched(cuda::combine(combine, nullptr), "combine") && y.same("bytes of y");

  Pair<char> copied(slots * c.hidden * element);
  GatherArgs gather{shifted(tokens), row_of_slot.data(), &rows,   c.dtype,
                    c.tokens,        c.hidden,           c.top_k, copied.cpu.data()};
  if (!c.weighted) gather.row_count = nullptr;
  cpu::gather(gather);
  gather.rows = copied.cuda.data();
  good &= launched(cuda::gather(gather, nullptr), "gather") && copied.same("bytes of rows");

  Pair<char> grad_rows(slots * c.hidden * element);
  Pair<float> grad_weights(slots);
  int32_t workspace = -7;
  CombineBackwardArgs back{shifted(tokens),
                           shifted(in),
                           weights.data(),
                           row_of_slot.data(),
                           c.dtype,
                           c.tokens,
                           c.hidden,
                           c.top_k,
                           grad_rows.cpu.data(),
                           c.weighted ? grad_weights.cpu.data() : nullptr,
                           &workspace};
  cpu::combine_backward(back);
  back.grad_rows = grad_rows.cuda.data();
  if (c.weighted) back.grad_weights = grad_weights.cuda.data();
  good &= launched(cuda::combine_backward(back, nullptr), "combine_backward");
  good &= grad_rows.same("bytes of grad_rows");
  for (size_t slot = 0; slot < grad_weights.cpu.size(); ++slot) {
    const float cpu = grad_weights.cpu[slot], cuda = grad_weights.cuda[slot];
    if (!c.weighted || std::abs(cpu - cuda) <= 1e-5f * std::sqrt(float(c.hidden))) continue;
    std::printf("  grad_weights[%zu]: cpu %g, cuda %g\n", slot, double(cpu), double(cuda));
    return false;
  }
  return good;
}

std::vector<RowsCase> rows_cases(bool small) {
  if (small) return {{60, 5, 24, DType::bf16}, {3, 4, 7, DType::f32}};
  std::vector<RowsCase> cases;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const RowsCase& c :
         std::initializer_list<RowsCase>{{1, 1, 1},
                                         {9, 2, 31},
                                         {33, 3, 66},
                                         {17, 4, 96},
                                         {20, 5, 264},
                                         {7, 8, 1032},
                                         {6, 16, 40},
                                         {12, 4, 64, DType::f32, 1.0},
                                         {12, 6, 64, DType::f32, 0.0, false},
                                         {10, 4, 64, DType::f32, 0.5, true, 1},
                                         {10, 4, 64, DType::f32, 0.5, true, 2}}) {
      cases.push_back(c);
      cases.back().dtype = dtype;
    }
  }
  return cases;
}

std::string name_of(const RowsCase& c) {
  char name[160];
  std::snprintf(name, sizeof name, "rows %dx%d hidden %d %s skipped %.1f%s shift %d", c.tokens,
                c.top_k, c.hidden, dtype_name(c.dtype), c.skipped, c.weighted ? " weighted" : "",
                c.misaligned);
  return name;
}

}  // namespace

int main(int count, char** arguments) {
  bool small = false;
  std::vector<std::string> kernels;
  for (int i = 1; i < count; ++i) {
    if (std::string(arguments[i]) == "--small") {
      small = true;
    } else {
      kernels.push_back(arguments[i]);
    }
  }
  if (kernels.empty()) kernels = {"route", "compact", "rows", "experts", "delta"};
  int failed = 0;
  for (const std::string& kernel : kernels) {
    if (kernel == "route") {
      failed += failures(route_cases(small), run_route);
    } else if (kernel == "compact") {
      failed += failures(compact_cases(small), run_compact);
    } else if (kernel == "rows") {
      failed += failures(rows_cases(small), run_rows);
    } else if (kernel == "experts") {
      failed += run_expert_cases(small);
    } else if (kernel == "delta") {
      failed += run_delta_cases(small);
    } else {
      std::fprintf(stderr, "kernel must be route, compact, rows, experts or delta, got '%s'\n",
                   kernel.c_str());
      return 2;
    }
  }
  std::printf("%s\n", failed == 0 ? "all cases agree" : "some cases differ");
  return failed == 0 ? 0 : 1;
}
