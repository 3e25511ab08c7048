// Asynchronous copies and the barriers they report to, as the CPU twins in csrc/cuda/arch call them.
// What each does is said there; when copies land is the schedule's business (README.md).
#pragma once

#include "emulator.h"

namespace fomoe::emulator {

void async_copy_16(void* shared, const void* global, bool valid, Here here);
void async_copy_commit();
void async_copy_wait(unsigned pending);
void async_copy_arrive(uint64_t* barrier, Here here);

void mbarrier_init(uint64_t* barrier, unsigned count, Here here);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes, Here here);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Here here);

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Here here);
void bulk_store(void* global, const void* shared, unsigned bytes, Here here);
void bulk_commit();
void bulk_wait_read(unsigned pending);
void bulk_wait(unsigned pending);
void fence_proxy_async();

// What the driver packs into a CUtensorMap: a tensor of three dimensions, innermost first, and the
// box that is loaded at a time. 128-byte swizzle, zeros outside.
struct alignas(64) TensorMap {
  uint64_t magic;
  const unsigned char* base;
  int64_t element_bytes;
  int64_t sizes[3];    // in elements
  int64_t strides[2];  // of dimensions 1 and 2, in bytes
  int32_t box[3];      // in elements
};
constexpr uint64_t kTensorMapWord = 0x74656e736f726d61ull;

void tensor_load(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                 Here here);
// To the same place in the blocks of the cluster that have a bit in `blocks`, each with its mbarrier.
void tensor_load_to_blocks(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1,
                           int c2, unsigned blocks, Here here);
void prefetch_tensor_map(const TensorMap* map, Here here);
void prefetch(const void* global, Here here);

// ---- clusters ------------------------------------------------------------------------------------

unsigned cluster_rank();
// All lanes of a warp come to each of these together.
void cluster_arrive(Here here);
void cluster_wait(Here here);
// The same place in the shared memory of another block of the cluster. `name`: of the instruction.
void* remote_shared(const void* shared, unsigned rank, const char* name, Here here);
void remote_arrive(void* barrier, Here here);
// A word in another block's shared memory, about to be read or written.
uint32_t* remote_word(void* word, const char* name, Here here);

}  // namespace fomoe::emulator
