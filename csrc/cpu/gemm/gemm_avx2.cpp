// GEMM blocks for avx2.
#define FOMOE_ISA avx2
#define FOMOE_TILE_ROWS 6
#define FOMOE_TILE_VECTORS 2
#include "gemm_impl.h"
