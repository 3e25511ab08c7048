// libfomoe_facts.so: build facts, CPU features, and the tile of each product. Read by
// fomoe_ext/_C.py through ctypes: plain C functions, so that it needs neither Python nor torch nor a
// GPU, and one build serves every Python.
//
// Returned texts live as long as the library; errors live until the next call of the thread.
#include <cstdint>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <string>

#include "build_facts.h"
#include "cpu/features.h"
#include "cuda/gemm/experts_choice.h"

#define FOMOE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fomoe {
namespace {

thread_local std::string last_error;

// The result of `body`; if it throws, `failed`, with the reason in last_error.
template <class Answer, class Body>
Answer guarded(Answer failed, const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return failed;
  }
}

const char* kernel_name(cuda::Kernel kernel) {
  switch (kernel) {
    case cuda::Kernel::multistage: return "multistage";
    case cuda::Kernel::ping_pong: return "ping_pong";
    case cuda::Kernel::cooperative: return "cooperative";
    case cuda::Kernel::paired: return "paired";
  }
  return "";
}

// The index of `got` among names; std::invalid_argument if it is not one of them.
template <size_t N>
int index_of(const char* argument, const std::string& got, const char* const (&names)[N]) {
  std::string wanted;
  for (size_t i = 0; i < N; ++i) {
    if (got == names[i]) return static_cast<int>(i);
    wanted += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + wanted + ", got '" +
                              got + "'");
}

}  // namespace
}  // namespace fomoe

// The error of the last call of this thread that failed.
FOMOE_EXPORT const char* fomoe_error() { return fomoe::last_error.c_str(); }

// A JSON object, as CMake wrote it.
FOMOE_EXPORT const char* fomoe_build_facts() { return fomoe::facts::kJson; }

// Names of instruction sets in ascending order; null past the last.
FOMOE_EXPORT const char* fomoe_isa_name(int32_t index) {
  if (index < 0 || index >= fomoe::cpu::kIsaCount) return nullptr;
  return fomoe::cpu::isa_name(static_cast<fomoe::cpu::Isa>(index));
}

FOMOE_EXPORT int32_t fomoe_isa_found() { return static_cast<int32_t>(fomoe::cpu::detected_isa()); }

// -1 where FOMOE_CPU_ISA is unknown or more than this CPU and build have.
FOMOE_EXPORT int32_t fomoe_isa_chosen() {
  return fomoe::guarded(int32_t{-1}, [] { return static_cast<int32_t>(fomoe::cpu::chosen_isa()); });
}

// Tile `index` of the table: its name, or null past the last, and through the pointers its kernel,
// rows and columns.
FOMOE_EXPORT const char* fomoe_expert_tile_at(int32_t index, const char** kernel, int32_t* rows,
                                              int32_t* columns) {
  if (index < 0 || index >= static_cast<int32_t>(std::size(fomoe::cuda::kTiles))) return nullptr;
  const fomoe::cuda::Tile& tile = fomoe::cuda::kTiles[index];
  *kernel = fomoe::kernel_name(tile.kernel);
  *rows = static_cast<int32_t>(fomoe::kTileRows);
  *columns = tile.columns;
  return tile.name;
}

// The name of the tile that a product takes; null for an unknown verb, dtype or FOMOE_EXPERTS_TILE.
FOMOE_EXPORT const char* fomoe_expert_tile(const char* verb, const char* dtype, int64_t columns,
                                           int64_t terms, bool hopper) {
  using namespace fomoe;
  return guarded(static_cast<const char*>(nullptr), [&] {
    const char* const dtypes[] = {"float32", "bfloat16", "float16"};
    const auto which = static_cast<cuda::Verb>(index_of("verb", verb, cuda::kVerbNames));
    const auto type = static_cast<DType>(index_of("dtype", dtype, dtypes));
    return cuda::choose_tile(which, type, columns, terms, hopper).name;
  });
}
