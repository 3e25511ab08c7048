// Small kernels around every wrapper in csrc/cuda/arch and every way in which threads meet. Each is
// right for defect 0; other numbers plant a bug that the emulator must find (test_emulator.py).
// Compiled by g++ for the emulator and by nvcc for a GPU: both must write the same bytes.
#include <cstring>

#include "../../../csrc/cuda/arch/approximate.cuh"
#include "../../../csrc/cuda/arch/async_copy.cuh"
#include "../../../csrc/cuda/arch/barrier.cuh"
#include "../../../csrc/cuda/arch/bulk_copy.cuh"
#include "../../../csrc/cuda/arch/compiler.cuh"
#include "../../../csrc/cuda/arch/matrix.cuh"
#include "../../../csrc/cuda/arch/memory_order.cuh"
#include "../../../csrc/cuda/arch/prefetch.cuh"
#include "../../../csrc/cuda/arch/shared_memory.cuh"
#include "selftest.h"

namespace fomoe::cuda {
namespace {

// out[t] = in[t + 1], through shared memory.
__global__ void neighbours(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint32_t, values, [128]);
  const unsigned t = threadIdx.x;
  values[t + (defect == 3 && t == 127)] = in[t];
  if (defect == 2 && t < 64) {
    __syncthreads();  // not the barrier of the others
  } else if (defect != 1) {
    __syncthreads();
  }
  out[t] = values[(t + 1) % 128];
}

// Counts of values modulo 8, by several blocks.
__global__ void histogram(const uint32_t* in, uint32_t* out, int defect) {
  const unsigned i = blockIdx.x * 64 + threadIdx.x;
  uint32_t* count = out + in[i] % 8;
  if (defect == 1) {
    *count += 1;
  } else {
    atomicAdd(count, 1u);
  }
}

// Inclusive sums over a warp, votes, matches, reductions.
__global__ void warp_words(const uint32_t* in, uint32_t* out, int defect) {
  const unsigned lane = threadIdx.x;
  const unsigned all = defect == 1 ? 0xffffu : 0xffffffffu;
  uint32_t sum = in[lane] % 100;
  for (unsigned apart = 1; apart < 32; apart *= 2) {
    const uint32_t other = __shfl_up_sync(all, sum, apart);
    if (lane >= apart) sum += other;
  }
  if (defect == 3 && lane >= 30) return;  // the others go on without them
  if (defect == 2 && lane < 8) {
    sum += __popc(__ballot_sync(0xffu, lane & 1));
    sum += __shfl_sync(0xffffffffu, sum, 3);  // lanes 8 .. 31 are at a vote
  }
  out[lane] = sum;
  out[32 + lane] = __ballot_sync(all, in[lane] & 1);
  out[64 + lane] = __match_any_sync(all, in[lane] % 3);
  out[96 + lane] = __reduce_max_sync(all, in[lane]);
  out[128 + lane] = __reduce_min_sync(all, in[lane]);
  out[160 + lane] = __reduce_add_sync(all, in[lane]);
  out[192 + lane] = __shfl_xor_sync(all, in[lane], 5);
  out[224 + lane] = __shfl_down_sync(all, in[lane], 3u, 8);
}

// Warp 0 produces, warp 1 consumes; numbered barriers both ways.
__global__ void named_barriers(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint32_t, values, [32]);
  const unsigned lane = threadIdx.x % 32;
  const bool producer = threadIdx.x < 32;
  for (int round = 0; round < 4; ++round) {
    if (producer) {
      values[lane] = in[round * 32 + lane];
      barrier_arrive(1, 64);
      if (defect != 1) barrier_sync(2, 64);
    } else {
      barrier_sync(1, defect == 2 ? 96 : 64);
      out[round * 32 + lane] = values[31 - lane];
      barrier_arrive(2, 64);
    }
  }
}

// Two stages of 16-byte copies, every third line left out.
__global__ void async_copies(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint4, stage, [2][33]);
  const unsigned t = threadIdx.x;
  const auto load = [&](int round) {
    if (round < 4) {
      unsigned char* to = reinterpret_cast<unsigned char*>(&stage[round % 2][t]);
      const uint4* from = reinterpret_cast<const uint4*>(in) + round * 32 + t;
      async_copy_16(to + (defect == 3 ? 4 : 0), from, t % 3 != 0);
    }
    async_copy_commit();
  };
  load(0);
  for (int round = 0; round < 4; ++round) {
    load(round + 1);
    if (defect == 1) {
      async_copy_wait<2>();
    } else {
      async_copy_wait<1>();
    }
    __syncthreads();
    reinterpret_cast<uint4*>(out)[round * 32 + t] = stage[round % 2][31 - t];
    if (defect != 2) __syncthreads();
  }
  if (defect != 4) async_copy_wait<0>();
}

// Thread 0 loads lines of 512 bytes in bulk into a ring of two stages; all threads add one to a copy
// of them, which thread 0 stores in bulk.
__global__ void bulk_ring(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint4, loaded, [2][32]);
  FOMOE_SHARED(uint4, changed, [2][32]);
  FOMOE_SHARED(uint64_t, full, [2]);
  constexpr unsigned kLine = 512, kLines = 8;
  const unsigned t = threadIdx.x;
  const auto load = [&](unsigned line) {
    if (t != 0 || line >= kLines + (defect == 8)) return;
    const unsigned expected = defect == 1 ? kLine / 2 : defect == 2 ? 2 * kLine : kLine;
    mbarrier_arrive_expect(&full[line % 2], expected);
    for (unsigned half = 0; half < 2 && line < kLines; ++half)
      bulk_load(&loaded[line % 2][half * 16], in + (2 * line + half) * 64, kLine / 2,
                &full[line % 2]);
  };
  if (t == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    mbarrier_init_fence();
  }
  if (defect != 7) __syncthreads();
  load(0);
  for (unsigned line = 0; line < kLines; ++line) {
    load(line + 1);
    mbarrier_wait(&full[line % 2], defect == 6 ? 1 - line / 2 % 2 : line / 2 % 2);
    uint4 value = loaded[line % 2][t];
    value.x += 1;
    value.w += t;
    if (t == 0 && line >= 2 && defect != 5) bulk_wait_read<1>();  // the store of two lines ago
    __syncthreads();
    changed[line % 2][t] = value;
    if (defect != 3) fence_proxy_async();
    __syncthreads();
    if (t == 0) {
      bulk_store(out + line * kLine / 4, changed[line % 2], kLine);
      bulk_commit();
    }
  }
  if (t == 0 && defect != 4) bulk_wait<0>();
}

// Warp 0 hands lines to warp 1 through a ring of two stages; one lane of warp 1 says for all of them
// that a line has been read.
__global__ void spoken_for(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint32_t, stages, [2][32]);
  FOMOE_SHARED(uint64_t, full, [2]);
  FOMOE_SHARED(uint64_t, empty, [2]);
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(&full[stage], 32);
      mbarrier_init(&empty[stage], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  for (unsigned line = 0; line < 8; ++line) {
    const unsigned stage = line % 2, round = line / 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(&empty[stage], (round + 1) % 2);
      stages[stage][lane] = in[line * 32 + lane];
      mbarrier_arrive(&full[stage]);
    } else {
      mbarrier_wait(&full[stage], round % 2);
      out[line * 32 + lane] = stages[stage][31 - lane];
      if (defect != 1) __syncwarp();
      if (lane == 0) mbarrier_arrive(&empty[stage]);
    }
  }
}

// Block b adds its numbers to what block b - 1 hands on: the blocks wait for each other in turn.
__global__ void chain(const uint32_t* in, uint32_t* out, int defect) {
  uint32_t* ticket = out + 1000;
  uint32_t* handed = out + 500;  // by block
  uint32_t* ready = out + 600;
  FOMOE_SHARED(uint32_t, turn, [1]);
  if (threadIdx.x == 0) turn[0] = defect == 2 ? blockIdx.x : atomicAdd(ticket, 1u);
  __syncthreads();
  const uint32_t b = turn[0];
  if (threadIdx.x != 0) return;
  uint32_t sum = in[b] % 1000;
  if (b > 0) {
    while (defect == 1 ? *const_cast<volatile uint32_t*>(ready + b - 1) == 0
                       : load_acquire(ready + b - 1) == 0)
      polling_pause();
    sum += handed[b - 1];
  }
  handed[b] = sum;
  if (defect == 1) {
    *const_cast<volatile uint32_t*>(ready + b) = 1;
  } else {
    store_release(ready + b, 1u);
  }
  out[b] = sum;
}

// 64-bit words handed from warp to warp.
__global__ void wide_words(const uint32_t* in, uint32_t* out, int) {
  auto* words = reinterpret_cast<uint64_t*>(out);
  if (threadIdx.x == 0) store_release(words + 1, uint64_t(in[0]) << 32 | 7u);
  __syncthreads();
  if (threadIdx.x == 32) words[0] = load_acquire(words + 1) + 1;
}

// Products of 16 x 16 matrices by one warp: a . b^T four times, by what is contiguous in a and in b. In
// shared memory the matrices stand as they are and transposed.
template <class Format>
__global__ void matrices(const uint32_t*, uint32_t* out, int defect) {
  FOMOE_SHARED(uint4, tiles, [2][2][33]);  // of a and b: as it is, transposed
  const int lane = threadIdx.x;
  const auto value = [](int seed, int row, int column) {
    const uint32_t index = uint32_t(16 * row + column + seed);
    return float((index * 2654435761u >> 16) % 5) - 2.0f;
  };
  for (int i = lane; i < 16 * 8; i += 32) {
    const int row = i / 8, column = i % 8 * 2;
    for (int which = 0; which < 2; ++which) {
      const int seed = which + 1;
      const float pair[] = {value(seed, row, column), value(seed, row, column + 1)};
      const float down[] = {value(seed, column, row), value(seed, column + 1, row)};
      reinterpret_cast<uint32_t*>(tiles[which][0])[i] = Format::pack(pair);
      reinterpret_cast<uint32_t*>(tiles[which][1])[i] = Format::pack(down);
    }
  }
  if (defect != 1) __syncwarp();
  if (defect == 2 && lane >= 16) return;  // ldmatrix wants the whole warp
  for (int combination = 0; combination < 4; ++combination) {
    const bool a_transposed = combination & 1, b_transposed = combination & 2;
    const int down = lane % 8 + lane / 16 * 8, right = lane / 8 % 2;
    uint32_t a[4], b[4];
    const uint4* tile_a = tiles[0][a_transposed];
    const uint4* tile_b = tiles[1][b_transposed];
    const auto* shift = reinterpret_cast<const unsigned char*>(tile_a) + (defect == 3 ? 8 : 0);
    tile_a = reinterpret_cast<const uint4*>(shift);
    if (a_transposed) {
      load_matrices_transposed(a, tile_a + down * 2 + right);
    } else {
      load_matrices(a, tile_a + lane % 16 * 2 + lane / 16);
    }
    if (b_transposed) {
      load_matrices_transposed(b, tile_b + lane % 16 * 2 + lane / 16);
    } else {
      load_matrices(b, tile_b + down * 2 + right);
    }
    for (int half = 0; half < 2; ++half) {
      float c[4] = {};
      multiply_add<Format>(c, a, b[2 * half], b[2 * half + 1]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * half + lane % 4 * 2 + i % 2;
        out[256 * combination + 16 * row + column] = __float_as_uint(c[i]);
      }
    }
  }
}

// Four matrices of words from `in`, by stmatrix to rows in another order.
__global__ void stored_matrices(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint4, rows, [33]);
  const unsigned lane = threadIdx.x;
  uint32_t matrices[4];
  for (unsigned i = 0; i < 4; ++i) matrices[i] = in[32 * i + lane];
  if (defect == 2 && lane >= 16) return;  // stmatrix wants the whole warp
  auto* to = reinterpret_cast<unsigned char*>(defect == 5 ? reinterpret_cast<uint4*>(out) : rows);
  to += lane * (defect == 4 ? 4 : 5) % 32 * 16 + (defect == 3 ? 8 : 0);
  if (defect == 6 && lane == 7) {
    __syncwarp();  // the others are at an stmatrix
  }
  store_matrices(matrices, to);
  if (defect != 1) __syncwarp();
  reinterpret_cast<uint4*>(out)[lane] = rows[lane];
}

// Words by way of a pointer that is the same in all lanes and has been asked for early.
__global__ void uniform_words(const uint32_t* in, uint32_t* out, int defect) {
  FOMOE_SHARED(uint32_t, words, [64]);
  const unsigned t = threadIdx.x;
  if (defect == 2 && t % 32 < 8) __syncwarp();  // the others are at a warp_uniform
  const int warp = warp_uniform(int(t / (defect == 1 ? 16 : 32)));
  const auto* line = reinterpret_cast<const unsigned char*>(in) + warp * 256;
  keep_whole(line);
  prefetch_l2(line + (defect == 3 ? 4096 : 0));
  if (defect == 4) prefetch_l2(words);
  words[t] = t;
  out[t] = reinterpret_cast<const uint32_t*>(line)[t % 32];
}

// What is told of an approximation of `exact`: zeros, infinities and NaN as they are, and whether
// other values are as near as they should be.
__device__ inline uint32_t judged(float approximate, double exact) {
  if (approximate != approximate) return 0x7fc00000u;
  if (approximate == 0.0f || approximate - approximate != 0.0f) return __float_as_uint(approximate);
  const double error = double(approximate) / exact - 1.0;
  return error < 0x1p-21 && error > -0x1p-21 ? 1u : 2u;
}

// exp2, 1 / x and log2 of numbers at every border and of some between. Near 1 the error of log2 is small
// beside 1, not beside log2.
__global__ void approximations(const uint32_t* in, uint32_t* out, int defect) {
  constexpr uint32_t kBorders[] = {
      0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u,  // zeros, infinities, NaN
      0x00000001u, 0x807fffffu, 0x00800000u, 0x80800000u,               // denormals, least normals
      0x7f7fffffu, 0xff7fffffu, 0x7e800000u, 0x7e900000u, 0xfe900000u,  // great: 2^126 and above
      0x43000000u, 0x42fe0000u, 0xc2fc0000u, 0xc2fe0000u};              // 128, 127, -126, -127
  constexpr unsigned kCount = sizeof kBorders / sizeof kBorders[0];
  const unsigned t = threadIdx.x;
  const float x = t < kCount ? __uint_as_float(kBorders[t]) : float(int(in[t]) % 2000) * 0.01f;
  out[t] = judged(defect == 1 ? exp2f(x) : exp2_approximate(x), exp2(double(x)));
  out[64 + t] = judged(defect == 2 ? 1.0f / x : reciprocal_approximate(x), 1.0 / double(x));
  const bool near_one = x >= 0.5f && x <= 2.0f;
  const float logarithm = defect == 3 ? log2f(x) : log2_approximate(x);
  out[128 + t] =
      judged(near_one ? 2.0f + logarithm : logarithm, log2(double(x)) + (near_one ? 2.0 : 0.0));
}

struct Selftest {
  const char* name;
  void (*kernel)(const uint32_t*, uint32_t*, int);
  unsigned blocks, threads;
};

const Selftest kSelftests[] = {
    {"neighbours", neighbours, 1, 128},       {"histogram", histogram, 4, 64},
    {"warp_words", warp_words, 1, 32},        {"named_barriers", named_barriers, 1, 64},
    {"async_copies", async_copies, 1, 32},    {"bulk_ring", bulk_ring, 1, 32},
    {"spoken_for", spoken_for, 1, 64},        {"chain", chain, 6, 32},
    {"wide_words", wide_words, 1, 64},        {"matrices_bf16", matrices<Bf16x2>, 1, 32},
    {"matrices_f16", matrices<F16x2>, 1, 32}, {"stored_matrices", stored_matrices, 1, 32},
    {"uniform_words", uniform_words, 1, 64},  {"approximations", approximations, 1, 64},
};

}  // namespace
}  // namespace fomoe::cuda

// `in` holds 4096 bytes, `out` kOutBytes, zeros; returns a cudaError_t, kUnknownTest for an unknown name.
extern "C" __attribute__((visibility("default"))) int fomoe_selftest(const char* name, int defect,
                                                                     const void* in, void* out) {
  for (const auto& test : fomoe::cuda::kSelftests) {
    if (std::strcmp(test.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(test.blocks);
    config.blockDim = dim3(test.threads);
    return cudaLaunchKernelEx(&config, test.kernel, static_cast<const uint32_t*>(in),
                              static_cast<uint32_t*>(out), defect);
  }
  for (const auto test : {fomoe::cuda::warpgroup_selftest, fomoe::cuda::arrivals_selftest}) {
    const int error = test(name, defect, in, out);
    if (error != fomoe::cuda::kUnknownTest) return error;
  }
  return fomoe::cuda::clusters_selftest(name, defect, in, out);
}
