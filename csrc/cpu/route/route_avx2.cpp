// route for avx2.
#define FOMOE_ISA avx2
#include "route_impl.h"
