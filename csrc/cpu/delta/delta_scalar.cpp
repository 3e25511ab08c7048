// The delta codecs for scalar.
#define FOMOE_ISA scalar
#include "delta_impl.h"
