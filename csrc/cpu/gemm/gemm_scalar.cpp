// GEMM blocks for the baseline instruction set of the machine.
#define FOMOE_ISA scalar
#define FOMOE_TILE_ROWS 4
#define FOMOE_TILE_VECTORS 2
#include "gemm_impl.h"
