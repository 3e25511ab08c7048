// Shared memory, spelled so that the emulator (tests/emulator) can give every block its own.
#pragma once

#ifdef FOMOE_EMULATED
#include "emulator.h"
// FOMOE_SHARED(float, sums, [4][8]); is __shared__ float sums[4][8];
#define FOMOE_SHARED(type, name, ...) FOMOE_EMULATED_SHARED(type, name, __VA_ARGS__)
#else
#define FOMOE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#endif
