// GEMM blocks for avx512 with bf16.
#define FOMOE_ISA avx512_bf16
#define FOMOE_TILE_ROWS 14
#define FOMOE_TILE_VECTORS 2
#define FOMOE_BF16_DOT
#include "gemm_impl.h"
