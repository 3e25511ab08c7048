// Asynchronous copies and the barriers they report to, as the CPU twins in csrc/cuda/arch call them.
// What each does is said there; when copies land is the schedule's business (README.md).
#pragma once

#include "emulator.h"

namespace fomoe::emulator {

void async_copy_16(void* shared, const void* global, bool valid, Here here);
void async_copy_commit();
void async_copy_wait(unsigned pending);

void mbarrier_init(uint64_t* barrier, unsigned count, Here here);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes, Here here);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Here here);

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Here here);
void bulk_store(void* global, const void* shared, unsigned bytes, Here here);
void bulk_commit();
void bulk_wait_read(unsigned pending);
void bulk_wait(unsigned pending);
void fence_proxy_async();

}  // namespace fomoe::emulator
