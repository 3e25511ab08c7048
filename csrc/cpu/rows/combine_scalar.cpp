// combine for scalar.
#define FOMOE_ISA scalar
#include "combine_impl.h"
