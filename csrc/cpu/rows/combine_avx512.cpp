// combine for avx512.
#define FOMOE_ISA avx512
#include "combine_impl.h"
