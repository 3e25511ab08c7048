// The delta codecs with vectors as wide as AVX-512's, for machines that have AVX2 only.
#define FOMOE_ISA twin512
#define FOMOE_VECTOR_BYTES 64
#include "../../csrc/cpu/delta/delta.h"
namespace fomoe::cpu::twin512 {
extern const DeltaKernels delta_table;
}
#include "../../csrc/cpu/delta/delta_impl.h"
