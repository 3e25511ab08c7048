// route for avx512.
#define FOMOE_ISA avx512
#include "route_impl.h"
