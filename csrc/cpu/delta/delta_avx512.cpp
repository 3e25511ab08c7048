// The delta codecs for avx512.
#define FOMOE_ISA avx512
#include "delta_impl.h"
