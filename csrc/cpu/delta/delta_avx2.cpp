// The delta codecs for avx2.
#define FOMOE_ISA avx2
#include "delta_impl.h"
