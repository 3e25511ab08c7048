// combine for avx2.
#define FOMOE_ISA avx2
#include "combine_impl.h"
