// GEMM blocks for avx512.
#define FOMOE_ISA avx512
#define FOMOE_TILE_ROWS 14
#define FOMOE_TILE_VECTORS 2
#include "gemm_impl.h"
