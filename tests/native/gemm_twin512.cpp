// The AVX-512 GEMM blocks with the vectors of AVX-512 on a narrower machine.
#define FOMOE_ISA twin512
#define FOMOE_VECTOR_BYTES 64
#define FOMOE_TILE_ROWS 14
#define FOMOE_TILE_VECTORS 2
#include "../../csrc/cpu/gemm/gemm_impl.h"
