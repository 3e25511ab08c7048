// Shared memory, spelled so that the emulator (tests/emulator) can give every block its own.
#pragma once

#include <cstdint>

#ifdef FOMOE_EMULATED
#include "emulator.h"

// FOMOE_SHARED(float, sums, [4][8]); is __shared__ float sums[4][8];
#define FOMOE_SHARED(type, name, ...) FOMOE_EMULATED_SHARED(type, name, __VA_ARGS__)
// Dynamic shared memory as unsigned char* name, aligned to 1024 bytes.
#define FOMOE_DYNAMIC_SHARED(name) unsigned char* name = ::fomoe::emulator::dynamic_shared()

#else

#define FOMOE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define FOMOE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace fomoe::cuda {

// The 32-bit address that instructions on shared memory take.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fomoe::cuda

#endif
