// What the driver's parts share: inputs, outputs in pairs, how cases are run.
#pragma once

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

extern "C" const char* fomoe_emulator_last_error();

namespace fomoe::driver {

constexpr unsigned char kGarbage = 0xcd;

// An output: exact size, garbage before; CPU's and CUDA's side by side.
template <class T>
struct Pair {
  explicit Pair(int64_t size) : cpu(size_t(size)), cuda(size_t(size)) {
    if (size == 0) return;
    std::memset(cpu.data(), kGarbage, cpu.size() * sizeof(T));
    std::memset(cuda.data(), kGarbage, cuda.size() * sizeof(T));
  }
  bool same(const char* name) const {
    for (size_t i = 0; i < cpu.size(); ++i) {
      if (std::memcmp(&cpu[i], &cuda[i], sizeof(T)) == 0) continue;
      std::printf("  %s[%zu]: cpu %g, cuda %g\n", name, i, double(cpu[i]), double(cuda[i]));
      return false;
    }
    return true;
  }
  std::vector<T> cpu, cuda;
};

inline bool launched(int error, const char* kernel) {
  if (error == 0) return true;
  std::printf("  %s: CUDA error %d: %s\n", kernel, error, fomoe_emulator_last_error());
  return false;
}

struct Random {
  explicit Random(unsigned seed) : engine(seed) {}
  float normal() { return std::normal_distribution<float>()(engine); }
  int below(int n) { return int(engine() % unsigned(n)); }
  bool chance(double p) { return std::uniform_real_distribution<>()(engine) < p; }
  std::mt19937 engine;
};

// Values as stored bytes of a dtype.
std::vector<char> stored(DType dtype, const std::vector<float>& values);

inline std::vector<float> normals(Random& random, int64_t size) {
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = random.normal();
  return values;
}

inline const char* dtype_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}

template <class Case>
int failures(const std::vector<Case>& cases, bool (*run)(const Case&)) {
  int failed = 0;
  for (const Case& c : cases) {
    if (run(c)) continue;
    std::printf("FAILED: %s\n", name_of(c).c_str());
    std::fflush(stdout);
    ++failed;
  }
  return failed;
}

// The parts; each returns how many cases failed.
int run_expert_cases(bool small);
int run_delta_cases(bool small);

}  // namespace fomoe::driver
