// The grouped GEMMs of every instruction set against plain loops in double precision.
//
// AVX-512 and its bf16 dot run as twins: the same source, 64-byte vectors, on whatever the
// compiler has (tests/native/gemm_twin*.cpp). So this machine runs the code of the wider ones,
// all but the instructions themselves. Usage: test_gemm [seed]; exits 1 at the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/gemm/gemm.h"

namespace fomoe::cpu {

namespace twin512 {
extern const GemmKernels gemm_table;
}
namespace twin512_bf16 {
extern const GemmKernels gemm_table;
}

static const GemmKernels* current = nullptr;
const GemmKernels& gemm_kernels() { return *current; }

}  // namespace fomoe::cpu

namespace {

using namespace fomoe;

std::mt19937 generator;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Values of a dtype, kept both as stored and as the doubles they stand for.
struct Matrix {
  DType dtype;
  int64_t rows, columns;
  std::vector<uint8_t> bytes;

  Matrix(DType type, int64_t r, int64_t c) : dtype(type), rows(r), columns(c) {
    bytes.assign(size_t(r * c) * element(), 0xff);  // NaN in every dtype
  }
  size_t element() const { return dtype == DType::f32 ? 4 : 2; }
  double operator()(int64_t i, int64_t j) const {
    const size_t at = size_t(i * columns + j) * element();
    if (dtype == DType::f32) {
      float value;
      std::memcpy(&value, &bytes[at], 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[at], 2);
    if (dtype == DType::bf16) {
      const uint32_t bits = uint32_t(half) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double sign = half & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, -24);
    return sign * std::ldexp(1024 + mantissa, exponent - 25);
  }
  // Small multiples of 1/64, exact in every dtype.
  void fill() {
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = float(pick(-100, 100)) / 64.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      uint16_t half = uint16_t(bits >> 16);
      if (dtype == DType::f16)
        half = value == 0
                   ? 0
                   : uint16_t(((bits >> 16) & 0x8000) | ((bits - 0x38000000) >> 13 & 0x7fff));
      if (dtype == DType::f32)
        std::memcpy(&bytes[size_t(i) * 4], &value, 4);
      else
        std::memcpy(&bytes[size_t(i) * 2], &half, 2);
    }
  }
};

// Relative error of one rounding to the dtype.
double rounding(DType dtype) {
  return dtype == DType::f32 ? 6e-8 : dtype == DType::bf16 ? 3.91e-3 : 4.89e-4;
}

std::string where;

void expect(double got, double wanted, double scale, DType dtype, const char* what, int64_t i,
            int64_t j) {
  // Half precision has subnormals from 6e-5 down: half their spacing is the floor.
  const double floor = dtype == DType::f16 ? 3e-8 : 0;
  if (std::abs(got - wanted) <= rounding(dtype) * std::abs(wanted) + 2e-6 * scale + floor) return;
  std::printf("FAILED %s: %s[%ld, %ld] is %.9g, wanted %.9g\n", where.c_str(), what, long(i),
              long(j), got, wanted);
  std::exit(1);
}

double activation_of(Activation a, double x, double* slope) {
  const double s = 1 / (1 + std::exp(-x));
  switch (a) {
    case Activation::clamped_swiglu: {
      const double g = std::min(x, 7.0), gs = 1 / (1 + std::exp(-1.702 * g));
      *slope = x > 7 ? 0 : gs + 1.702 * g * gs * (1 - gs);
      return g * gs;
    }
    case Activation::swiglu:
    case Activation::silu: *slope = s + x * s * (1 - s); return x * s;
    case Activation::relu2: *slope = x > 0 ? 2 * x : 0; return x > 0 ? x * x : 0;
    case Activation::geglu:
    case Activation::gelu: {
      const double c = std::sqrt(2 / M_PI), z = c * (x + 0.044715 * x * x * x), t = std::tanh(z);
      *slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
      return 0.5 * x * (1 + t);
    }
  }
  std::abort();
}

// What the up projection counts for beside the activated gate.
double up_of(Activation a, double up, double* slope) {
  *slope = 1;
  if (a != Activation::clamped_swiglu) return up;
  if (std::abs(up) > 7) *slope = 0;
  return std::clamp(up, -7.0, 7.0) + 1;
}

struct Case {
  DType dtype;
  Activation activation;
  int64_t tokens, hidden, size, slots;
  std::vector<int32_t> offsets, token_of_row, slot_of_row;
  int32_t residents() const { return int32_t(offsets.size()) - 1; }
  int64_t rows() const { return offsets.back(); }
};

Case random_case(DType dtype, Activation activation) {
  Case c{dtype, activation, pick(1, 300), pick(1, 90), pick(1, 90), 0, {0}, {}, {}};
  if (pick(0, 3) == 0) c.hidden = pick(500, 600);
  if (pick(0, 3) == 0) c.size = pick(500, 600);
  const int64_t experts = pick(1, 5);
  for (int64_t e = 0; e < experts; ++e)
    c.offsets.push_back(c.offsets.back() + int32_t(pick(0, 2) == 0 ? 0 : pick(1, 120)));
  c.slots = c.rows() + pick(0, 20);
  c.token_of_row.assign(size_t(c.slots), -1);
  c.slot_of_row.assign(size_t(c.slots), -1);
  std::vector<int32_t> order(size_t(c.slots));
  for (int64_t i = 0; i < c.slots; ++i) order[size_t(i)] = int32_t(i);
  std::shuffle(order.begin(), order.end(), generator);
  for (int64_t i = 0; i < c.rows(); ++i) {
    c.token_of_row[size_t(i)] = int32_t(pick(0, c.tokens - 1));
    c.slot_of_row[size_t(i)] = order[size_t(i)];
  }
  return c;
}

int32_t expert_of(const Case& c, int64_t row) {
  int32_t e = 0;
  while (c.offsets[size_t(e) + 1] <= row) ++e;
  return e;
}

// One hidden channel and a weight of 1: expand is then the activation itself, over its whole range.
void check_activation(Activation activation) {
  constexpr int kCount = 4001;
  std::vector<float> x(kCount), act(kCount), weight(2, 1.0f);
  std::vector<int32_t> index(kCount), offsets = {0, kCount};
  for (int i = 0; i < kCount; ++i) {
    index[size_t(i)] = i;
    x[size_t(i)] = std::uniform_real_distribution<float>(i % 2 ? -1.0f : -120.0f,
                                                         i % 2 ? 1.0f : 120.0f)(generator);
  }
  cpu::expand({.x = x.data(),
               .weight = weight.data(),
               .bias = nullptr,
               .token_of_row = index.data(),
               .offsets = offsets.data(),
               .tiles = nullptr,
               .dtype = DType::f32,
               .residents = 1,
               .tokens = kCount,
               .slots = kCount,
               .hidden = 1,
               .expert_size = 1,
               .activation = activation,
               .act = act.data(),
               .preact = nullptr});
  for (int i = 0; i < kCount; ++i) {
    double unused, wanted = activation_of(activation, x[size_t(i)], &unused);
    if (is_gated(activation)) wanted *= up_of(activation, x[size_t(i)], &unused);
    const double error = std::abs(act[size_t(i)] - wanted);
    // Where the tail of GELU cancels, relative to the argument instead.
    const double scale = std::abs(wanted) + std::abs(x[size_t(i)]) * 1e-2;
    if (error > 5e-7 * scale) expect(act[size_t(i)], wanted, 0, DType::f32, "activation", i, 0);
  }
}

// Plain sum over k of a(k) b(k), and of the magnitudes, the scale of its rounding.
template <class A, class B>
std::pair<double, double> dot(int64_t n, A a, B b) {
  double sum = 0, scale = 0;
  for (int64_t k = 0; k < n; ++k) {
    sum += a(k) * b(k);
    scale += std::abs(a(k) * b(k));
  }
  return {sum, scale};
}

// Biases are of one row per resident, or have none.
const void* data_of(const Matrix& bias) { return bias.rows > 0 ? bias.bytes.data() : nullptr; }
double at(const Matrix& bias, int64_t expert, int64_t column) {
  return bias.rows > 0 ? bias(expert, column) : 0;
}

void check_forward(const Case& c, const Matrix& x, const Matrix& w, const Matrix& wc,
                   const Matrix& bias, const Matrix& bias_c, Matrix& act, Matrix& preact) {
  const int64_t n = c.size, g = is_gated(c.activation) ? 2 : 1;
  const int64_t before = cpu::expand_rows_computed();
  cpu::expand({.x = x.bytes.data(),
               .weight = w.bytes.data(),
               .bias = data_of(bias),
               .token_of_row = c.token_of_row.data(),
               .offsets = c.offsets.data(),
               .tiles = nullptr,
               .dtype = c.dtype,
               .residents = c.residents(),
               .tokens = c.tokens,
               .slots = c.slots,
               .hidden = c.hidden,
               .expert_size = n,
               .activation = c.activation,
               .act = act.bytes.data(),
               .preact = preact.bytes.data()});
  expect(double(cpu::expand_rows_computed() - before), double(c.rows()), 0, DType::f32,
         "rows computed", 0, 0);
  Matrix rows(c.dtype, c.slots, c.hidden);
  cpu::contract({.act = act.bytes.data(),
                 .weight = wc.bytes.data(),
                 .bias = data_of(bias_c),
                 .offsets = c.offsets.data(),
                 .tiles = nullptr,
                 .dtype = c.dtype,
                 .residents = c.residents(),
                 .slots = c.slots,
                 .hidden = c.hidden,
                 .expert_size = n,
                 .rows = rows.bytes.data()});
  for (int64_t r = 0; r < c.rows(); ++r) {
    const int64_t e = expert_of(c, r), t = c.token_of_row[size_t(r)];
    for (int64_t j = 0; j < n; ++j) {
      double value[2], scale = 0, unused;
      for (int64_t half = 0; half < g; ++half) {
        const auto [sum, magnitude] = dot(
            c.hidden, [&](int64_t k) { return x(t, k); },
            [&](int64_t k) { return w((e * g + half) * n + j, k); });
        value[half] = sum + at(bias, e, half * n + j);
        expect(preact(r, half * n + j), value[half], magnitude, c.dtype, "preact", r, half * n + j);
        scale += magnitude;
      }
      double wanted = activation_of(c.activation, value[0], &unused);
      if (g == 2) wanted *= up_of(c.activation, value[1], &unused);
      if (c.activation == Activation::relu2) scale *= scale;
      if (g == 2) scale *= 1 + std::abs(value[0]) + std::abs(value[1]);
      expect(act(r, j), wanted, scale, c.dtype, "act", r, j);
    }
    for (int64_t j = 0; j < c.hidden; j += 1 + c.hidden / 40) {
      const auto [sum, magnitude] = dot(
          n, [&](int64_t k) { return act(r, k); },
          [&](int64_t k) { return wc(e * c.hidden + j, k); });
      expect(rows(r, j), sum + at(bias_c, e, j), magnitude, c.dtype, "contract", r, j);
    }
  }
  for (int64_t r = c.rows(); r < c.slots; ++r)  // poison stays
    if (!std::isnan(act(r, 0)) || !std::isnan(rows(r, 0)))
      expect(0, 1, 0, DType::f32, "row past the last", r, 0);
}

void check_contract_backward(const Case& c, const Matrix& dy, const Matrix& wc, const Matrix& bias,
                             const Matrix& preact, Matrix& grad_preact, Matrix& scaled_act) {
  const int64_t n = c.size, g = is_gated(c.activation) ? 2 : 1;
  Matrix weights(DType::f32, 1, c.slots), grad_weights(DType::f32, 1, c.slots);
  weights.fill();
  cpu::contract_backward({.grad_y = dy.bytes.data(),
                          .weight = wc.bytes.data(),
                          .bias = data_of(bias),
                          .preact = preact.bytes.data(),
                          .weights = reinterpret_cast<const float*>(weights.bytes.data()),
                          .token_of_row = c.token_of_row.data(),
                          .slot_of_row = c.slot_of_row.data(),
                          .offsets = c.offsets.data(),
                          .tiles = nullptr,
                          .dtype = c.dtype,
                          .residents = c.residents(),
                          .tokens = c.tokens,
                          .slots = c.slots,
                          .hidden = c.hidden,
                          .expert_size = n,
                          .activation = c.activation,
                          .grad_preact = grad_preact.bytes.data(),
                          .scaled_act = scaled_act.bytes.data(),
                          .grad_weights = reinterpret_cast<float*>(grad_weights.bytes.data()),
                          .workspace = nullptr});
  std::vector<bool> seen(size_t(c.slots), false);
  for (int64_t r = 0; r < c.rows(); ++r) {
    const int64_t e = expert_of(c, r), t = c.token_of_row[size_t(r)];
    const int64_t slot = c.slot_of_row[size_t(r)];
    seen[size_t(slot)] = true;
    auto [total, total_scale] = dot(
        c.hidden, [&](int64_t k) { return dy(t, k); }, [&](int64_t k) { return at(bias, e, k); });
    for (int64_t j = 0; j < n; ++j) {
      const auto [through, magnitude] = dot(
          c.hidden, [&](int64_t k) { return dy(t, k); },
          [&](int64_t k) { return wc(e * c.hidden + k, j); });
      double slope, value = activation_of(c.activation, preact(r, j), &slope);
      double up = 1, up_slope = 1;
      if (g == 2) up = up_of(c.activation, preact(r, n + j), &up_slope);
      const double weight = weights(0, slot);
      const double scale = magnitude * std::abs(weight) * (1 + std::abs(slope * up));
      expect(grad_preact(r, j), slope * up * through * weight, scale, c.dtype, "grad gate", r, j);
      if (g == 2)
        expect(grad_preact(r, n + j), value * up_slope * through * weight,
               magnitude * std::abs(weight) * (1 + std::abs(value)), c.dtype, "grad up", r, j);
      expect(scaled_act(r, j), value * up * weight, std::abs(value * up * weight) + 1e-3, c.dtype,
             "scaled act", r, j);
      total += value * up * through;
      total_scale += std::abs(value * up) * magnitude;
    }
    expect(grad_weights(0, slot), total, total_scale, DType::f32, "grad weight", slot, 0);
  }
  for (int64_t slot = 0; slot < c.slots; ++slot)
    if (!seen[size_t(slot)])
      expect(grad_weights(0, slot), 0, 0, DType::f32, "grad weight of a skipped slot", slot, 0);
}

void check_gradients(const Case& c, const Matrix& rows_in, const Matrix& x) {
  const int64_t in = rows_in.columns;
  Matrix w(c.dtype, c.residents() * in, c.hidden), out(c.dtype, c.slots, c.hidden);
  w.fill();
  cpu::grouped_rows({.rows_in = rows_in.bytes.data(),
                     .weight = w.bytes.data(),
                     .offsets = c.offsets.data(),
                     .tiles = nullptr,
                     .dtype = c.dtype,
                     .residents = c.residents(),
                     .slots = c.slots,
                     .in = in,
                     .out = c.hidden,
                     .rows_out = out.bytes.data()});
  for (int64_t r = 0; r < c.rows(); ++r)
    for (int64_t j = 0; j < c.hidden; j += 1 + c.hidden / 40) {
      const auto [sum, magnitude] = dot(
          in, [&](int64_t k) { return rows_in(r, k); },
          [&](int64_t k) { return w(expert_of(c, r) * in + k, j); });
      expect(out(r, j), sum, magnitude, c.dtype, "grouped rows", r, j);
    }
  // Left plain and right gathered, then the other way round and added to a total.
  for (const bool left_gathered : {false, true}) {
    const bool add = left_gathered;
    const Matrix &left = left_gathered ? x : rows_in, &right = left_gathered ? rows_in : x;
    const int32_t* index = c.token_of_row.data();
    Matrix grad(add ? DType::f32 : c.dtype, c.residents() * left.columns, right.columns);
    if (add) grad.fill();
    const Matrix before = grad;
    cpu::weight_grad({.left = left.bytes.data(),
                      .right = right.bytes.data(),
                      .left_index = left_gathered ? index : nullptr,
                      .right_index = left_gathered ? nullptr : index,
                      .offsets = c.offsets.data(),
                      .dtype = c.dtype,
                      .residents = c.residents(),
                      .left_lines = left.rows,
                      .right_lines = right.rows,
                      .left_size = left.columns,
                      .right_size = right.columns,
                      .add = add,
                      .grad_weight = grad.bytes.data()});
    for (int64_t e = 0; e < c.residents(); ++e)
      for (int64_t i = 0; i < left.columns; i += 1 + left.columns / 40)
        for (int64_t j = 0; j < right.columns; j += 1 + right.columns / 40) {
          const int64_t first = c.offsets[size_t(e)];
          const auto line = [&](bool gathered, int64_t k) {
            return gathered ? int64_t(index[first + k]) : first + k;
          };
          const auto [sum, magnitude] = dot(
              c.offsets[size_t(e) + 1] - first,
              [&](int64_t k) { return left(line(left_gathered, k), i); },
              [&](int64_t k) { return right(line(!left_gathered, k), j); });
          const double start = add ? before(e * left.columns + i, j) : 0;
          expect(grad(e * left.columns + i, j), start + sum, magnitude + std::abs(start),
                 grad.dtype, "weight grad", e * left.columns + i, j);
        }
  }
  // Rows as they are, then gathered and weighted.
  Matrix weights(DType::f32, 1, c.slots);
  weights.fill();
  for (const bool gathered : {false, true}) {
    const Matrix& in = gathered ? x : rows_in;
    Matrix grad(c.dtype, c.residents(), in.columns);
    cpu::bias_grad(
        {.in = in.bytes.data(),
         .index = gathered ? c.token_of_row.data() : nullptr,
         .weights = gathered ? reinterpret_cast<const float*>(weights.bytes.data()) : nullptr,
         .slot_of_row = gathered ? c.slot_of_row.data() : nullptr,
         .offsets = c.offsets.data(),
         .dtype = c.dtype,
         .residents = c.residents(),
         .width = in.columns,
         .grad_bias = grad.bytes.data()});
    for (int64_t e = 0; e < c.residents(); ++e)
      for (int64_t j = 0; j < in.columns; ++j) {
        const int64_t first = c.offsets[size_t(e)];
        const auto row = [&](int64_t k) { return size_t(first + k); };
        const auto [sum, magnitude] = dot(
            c.offsets[size_t(e) + 1] - first,
            [&](int64_t k) { return in(gathered ? c.token_of_row[row(k)] : first + k, j); },
            [&](int64_t k) { return gathered ? weights(0, c.slot_of_row[row(k)]) : 1.0; });
        expect(grad(e, j), sum, magnitude, c.dtype, "bias grad", e, j);
      }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const cpu::GemmKernels* tables[] = {&cpu::scalar::gemm_table, &cpu::twin512::gemm_table,
                                      &cpu::twin512_bf16::gemm_table,
#ifdef FOMOE_HAVE_AVX2
                                      &cpu::avx2::gemm_table
#endif
  };
  const unsigned seed = argc > 1 ? unsigned(std::atoi(argv[1])) : 0;
  int cases = 0;
  for (const auto* table : tables)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (int a = 0; a < 6; ++a) {
        generator.seed(seed * 1000 + unsigned(cases++));
        cpu::current = table;
        const Case c = random_case(dtype, Activation(a));
        where = table->name;
        check_activation(Activation(a));
        where = std::string(table->name) + " dtype " + std::to_string(int(dtype)) + " activation " +
                std::to_string(a) + " hidden " + std::to_string(c.hidden) + " expert size " +
                std::to_string(c.size) + " rows " + std::to_string(c.rows());
        const int64_t g = is_gated(c.activation) ? 2 : 1;
        Matrix x(dtype, c.tokens, c.hidden),
            dy = x, w(dtype, c.residents() * g * c.size, c.hidden),
            wc(dtype, c.residents() * c.hidden, c.size), act(dtype, c.slots, c.size),
            preact(dtype, c.slots, g * c.size), grad_preact = preact, scaled = act;
        const int64_t biases = pick(0, 1) * c.residents();
        Matrix bias(dtype, biases, g * c.size), bias_c(dtype, biases, c.hidden);
        for (Matrix* m : {&x, &dy, &w, &wc, &bias, &bias_c}) m->fill();
        // Sums of hundreds of terms would drive every activation into saturation.
        Matrix moderate = preact;
        check_forward(c, x, w, wc, bias, bias_c, act, preact);
        moderate.fill();
        check_contract_backward(c, dy, wc, bias_c, moderate, grad_preact, scaled);
        check_gradients(c, moderate, x);
      }
  for (const auto* table : tables) std::printf("%s ", table->name);
  std::printf("passed %d cases\n", cases);
}
