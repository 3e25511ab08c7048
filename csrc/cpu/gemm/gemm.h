// The blocks a grouped GEMM is made of, one table of functions per instruction set.
//
// Operands are packed into 4-byte *units*: an fp32 value, or a pair of bf16 values that are
// neighbours along the sum (for the bf16 dot instruction). The driver in experts.cpp decides which
// block of which expert is next; the functions here know nothing of experts.
#pragma once

#include <cstdint>

#include "../../kernels.h"

namespace fomoe::cpu {

// Largest number of units along the sum that one multiply takes: a panel of B then fits in L1.
constexpr int64_t kBlockK = 256;
// Row stride of packed A; the extra units keep rows out of each other's cache sets.
constexpr int64_t kRowStrideA = kBlockK + 16;

enum class Unit : int32_t { f32, bf16_pair };

// Where one operand's elements come from. `line` is the strided dimension; if `index` is given,
// line i is read from index[i].
struct Source {
  const void* data;
  int64_t stride;        // elements between lines
  const int32_t* index;  // or null
};

// A finished block of C, fp32, on its way to the outputs.
struct Block {
  const float* c;
  int64_t stride;  // floats between rows of c
  int64_t rows, columns;
};

struct GemmKernels {
  const char* name;
  int32_t mr, nr;   // rows and columns of a register tile
  bool bf16_pairs;  // has the bf16 dot instruction

  // Bytes of a packed block never exceed 4 * (lines rounded up) * units; unused lines are zero.
  // A from lines = rows of A, contiguous along the sum: out[row][kRowStrideA].
  void (*pack_a_rows)(DType, Unit, Source, int64_t row, int64_t rows, int64_t k, int64_t depth,
                      void* out);
  // A from lines = steps of the sum, contiguous along the rows of A: out[tile][unit][mr].
  void (*pack_a_columns)(DType, Unit, Source, int64_t row, int64_t rows, int64_t k, int64_t depth,
                         void* out);
  // B from lines = columns of B, contiguous along the sum (a transpose): out[panel][unit][nr].
  void (*pack_b_columns)(DType, Unit, Source, int64_t column, int64_t columns, int64_t k,
                         int64_t depth, void* out);
  // B from lines = steps of the sum, contiguous along the columns: out[panel][unit][nr].
  void (*pack_b_rows)(DType, Unit, Source, int64_t column, int64_t columns, int64_t k,
                      int64_t depth, void* out);
  // c (+)= a . b over `units` units. a_by_rows tells which of the two A layouts `a` has.
  void (*multiply)(Unit, bool a_by_rows, const void* a, const void* b, float* c, int64_t stride,
                   int64_t rows, int64_t columns, int64_t units, bool accumulate);

  // out[j] = in[j] as fp32.
  void (*load)(DType, const void* in, int64_t count, float* out);
  // out[i][j] = c[i][j] + bias[j], rows `stride` elements apart; bias of the dtype or null.
  void (*store)(DType, Block, const void* bias, void* out, int64_t stride);
  // out[i][j] += c[i][j].
  void (*add)(Block, float* out, int64_t stride);
  // sum[j] += factor * in[j].
  void (*add_scaled)(DType, const void* in, float factor, int64_t count, float* sum);
  // The sum over j of a[j] * b[j].
  float (*dot)(DType, const void* a, const void* b, int64_t count);
  // The epilogue of expand: column j of the gate is c[.][j], of the up projection
  // c[.][up_column + j]. Each plus its bias, at the block's first column, up expert_size further;
  // bias and preact may be null.
  void (*activate)(DType, Activation, Block, int64_t up_column, const void* bias, void* act,
                   int64_t expert_size, void* preact);
  // The epilogue of contract's backward; pointers at the block's first row and column.
  // dot[i] = <activation(preact), c> over the block's columns.
  void (*activate_backward)(DType, Activation, Block, const void* preact, int64_t expert_size,
                            const float* weights, void* grad_preact, void* scaled_act, float* dot);
};

// The table for the instruction set that features.h chose.
const GemmKernels& gemm_kernels();

namespace scalar {
extern const GemmKernels gemm_table;
}
namespace avx2 {
extern const GemmKernels gemm_table;
}
namespace avx512 {
extern const GemmKernels gemm_table;
}
namespace avx512_bf16 {
extern const GemmKernels gemm_table;
}

}  // namespace fomoe::cpu
