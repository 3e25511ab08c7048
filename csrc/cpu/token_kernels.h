// The kernels that work token by token, one table per instruction set. Each function handles the
// tokens begin .. end-1 of its arguments; route.cpp and combine.cpp distribute tokens over threads.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "features.h"

namespace fomoe::cpu {

struct RouteKernels {
  bool (*route)(const RouteArgs&, int64_t begin, int64_t end);
  void (*backward)(const RouteBackwardArgs&, int64_t begin, int64_t end);
};

struct CombineKernels {
  void (*combine)(const CombineArgs&, int64_t begin, int64_t end);
  void (*backward)(const CombineBackwardArgs&, int64_t begin, int64_t end);
};

namespace scalar {
extern const RouteKernels route_table;
extern const CombineKernels combine_table;
}  // namespace scalar
namespace avx2 {
extern const RouteKernels route_table;
extern const CombineKernels combine_table;
}  // namespace avx2
namespace avx512 {
extern const RouteKernels route_table;
extern const CombineKernels combine_table;
}  // namespace avx512

#if FOMOE_HAVE_AVX2
#define FOMOE_AVX2_TABLE(name) (&avx2::name)
#else
#define FOMOE_AVX2_TABLE(name) nullptr
#endif
#if FOMOE_HAVE_AVX512
#define FOMOE_AVX512_TABLE(name) (&avx512::name)
#else
#define FOMOE_AVX512_TABLE(name) nullptr
#endif

// The best table for the chosen instruction set among those compiled in.
template <class Table>
const Table& choose_table(const Table* scalar, const std::type_identity_t<Table>* avx2,
                          const std::type_identity_t<Table>* avx512) {
  const Isa isa = chosen_isa();
  if (isa >= Isa::avx512 && avx512 != nullptr) return *avx512;
  if (isa >= Isa::avx2 && avx2 != nullptr) return *avx2;
  return *scalar;
}

}  // namespace fomoe::cpu
