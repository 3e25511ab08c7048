// route for scalar.
#define FOMOE_ISA scalar
#include "route_impl.h"
