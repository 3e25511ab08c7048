// The AVX-512 BF16 GEMM blocks with the twin of the bf16 dot instruction.
#define FOMOE_ISA twin512_bf16
#define FOMOE_VECTOR_BYTES 64
#define FOMOE_TILE_ROWS 14
#define FOMOE_TILE_VECTORS 2
#define FOMOE_BF16_DOT
#include "../../csrc/cpu/gemm/gemm_impl.h"
