// ldmatrix and mma.sync, as the CPU twins in csrc/cuda/arch/matrix.cuh call them.
#pragma once

#include "emulator.h"

namespace fomoe::emulator {

// Turns a register into its two values.
using Unpack = void (*)(uint32_t unit, float* values);

struct MatrixPair {
  uint32_t left, right;
};

void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed, Here here);
void store_matrices(const uint32_t (&matrices)[4], void* row, Here here);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], MatrixPair b, Unpack unpack, Here here);

}  // namespace fomoe::emulator
