// Instructions of warpgroups (128 threads), as the CPU twins in csrc/cuda/arch/warpgroup.cuh call them.
#pragma once

#include "emulator.h"

namespace fomoe::emulator {

enum class Element { bf16, f16 };

// D (64 x columns, fp32) = A (64 x 16) . B (16 x columns), plus D when `accumulate`.
struct Product {
  Element element;
  int columns;
  bool transpose_a, transpose_b;  // M or N is contiguous, not K
  uint64_t a, b;                  // matrix descriptors
  bool accumulate;
};

// Of dynamic shared memory, as matrix descriptors have it; `tile` is aligned to 16 bytes.
uint32_t matrix_address(const void* tile, Here here);

// All threads of the warpgroup come to each of these. Only the wait lets them wait for each other.
void warpgroup_arrive(Here here);
void warpgroup_multiply(float* accumulators, const Product& product, Here here);
void warpgroup_commit(Here here);
void warpgroup_wait(unsigned pending, Here here);
void registers_change(const char* name, unsigned registers, Here here);

}  // namespace fomoe::emulator
