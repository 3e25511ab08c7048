// Small kernels around tensor maps and products of warpgroups, in the manner of selftest.cu. Planted
// bugs are template arguments, since the assembler reorders around wgmma only in straight code.
#include "../../../csrc/cuda/arch/warpgroup.cuh"

#include <string>

#include "../../../csrc/cuda/arch/async_copy.cuh"
#include "../../../csrc/cuda/arch/bulk_copy.cuh"
#include "../../../csrc/cuda/arch/tensor_map.cuh"
#include "kernels.cuh"

namespace fomoe::cuda {
namespace {

// ---- boxes of a tensor ---------------------------------------------------------------------------

constexpr int kBoxes = 5, kBoxBytes = 1024;

// Boxes that lie in the tensor, overhang it on every side, miss it; as they stand in shared memory.
template <int kDefect>
__global__ void tensor_boxes(const __grid_constant__ TensorMap map, uint4* out) {
  FOMOE_DYNAMIC_SHARED(shared);
  FOMOE_SHARED(uint64_t, full, [1]);
  constexpr int kAt[kBoxes][3] = {{0, 0, 0}, {-8, -1, 1}, {40, 3, 3}, {8, 1, -9}, {-72, 0, 0}};
  unsigned char* boxes = shared + (kDefect == 1 ? 128 : 0);
  const unsigned t = threadIdx.x;
  if (t == 0) {
    prefetch_tensor_map(&map);
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(full, kDefect == 2   ? (kBoxes - 1) * kBoxBytes
                                 : kDefect == 7 ? 1u << 20
                                                : kBoxes * kBoxBytes);
    for (int box = 0; box < kBoxes; ++box)
      tensor_load(boxes + box * kBoxBytes, &map, full, kAt[box][0] - (kDefect == 6), kAt[box][1],
                  kAt[box][2] + (kDefect == 4 && box == 0 ? 4 : 0));
  }
  __syncthreads();
  if (kDefect != 3) mbarrier_wait(full, 0);
  for (int i = int(t); i < kBoxes * kBoxBytes / 16; i += int(kWarpgroup))
    out[i] = reinterpret_cast<const uint4*>(boxes)[i];
}

int run_tensor_boxes(int defect, const void* in, void* out) {
  // 4 planes of 5 rows of 72 values, rows 160 bytes apart, planes 960 bytes.
  TensorMap map{};
  const int64_t planes = defect == 4 ? 5 : 4;
  const cudaError_t error =
      make_tensor_map(&map, DType::bf16, in, {72, 5, planes}, {160, 960}, {64, 4, 2});
  if (error != cudaSuccess) return error;
  if (defect == 5) map = {};
  return with_defect<7>(defect, [&](auto planted) {
    return launch(tensor_boxes<planted.value>, kWarpgroup, kBoxes * kBoxBytes + 1024, map,
                  static_cast<uint4*>(out));
  });
}

// ---- products of operands that threads wrote -----------------------------------------------------

constexpr int kRows = 64, kDepth = 64;  // of A; K to a tile
constexpr unsigned kPattern = 1024;     // bytes of 8 rows

// out = a . b^T: a by cp.async, b by ordinary stores.
template <class Format, int kColumns, int kDefect>
__global__ void __launch_bounds__(kWarpgroup)
    stored_operands(const uint16_t* a, const uint16_t* b, float* out) {
  FOMOE_DYNAMIC_SHARED(shared);
  unsigned char *a_tile = shared, *b_tile = shared + kRows * 128;
  // With f16 some lanes of a warp write nothing and need no fence.
  constexpr int kWriters = std::is_same_v<Format, F16x2> ? 112 : int(kWarpgroup);
  const int t = int(threadIdx.x);
  if (t < kWriters) {
    for (int i = t; i < kRows * 8; i += kWriters)
      async_copy_16(swizzled(a_tile, i / 8, i % 8), a + i * 8, true);
    async_copy_commit();
    if (kDefect == 2) fence_proxy_async();
    async_copy_wait<0>();
    if (kDefect == 3) fence_proxy_async();
    for (int i = t; i < kColumns * 8; i += kWriters)
      *reinterpret_cast<uint4*>(swizzled(b_tile, i / 8, i % 8)) =
          reinterpret_cast<const uint4*>(b)[i];
    if (kDefect == 0) fence_proxy_async();
  }
  __syncthreads();
  float acc[kColumns / 2] = {};
  warpgroup_fence(acc);
  warpgroup_arrive();
#pragma unroll
  for (unsigned k = 0; k < 4; ++k)
    warpgroup_multiply<Format, kColumns, false, false>(
        acc, shared_matrix(a_tile, 16, kPattern) + 2 * k,
        shared_matrix(b_tile, 16, kPattern) + 2 * k, true);
  warpgroup_commit();
  warpgroup_wait<0>();
  warpgroup_fence(acc);
  write_out<kColumns>(acc, out);
}

template <class Format, class Element, int kColumns>
int run_stored_operands(int defect, void* out) {
  auto* result = static_cast<float*>(out);
  auto* a = reinterpret_cast<uint16_t*>(result + kRows * kColumns);
  uint16_t* b = a + kRows * kDepth;
  launch(fill<Element>, kWarpgroup, 0, a, kRows * kDepth, 1u);
  launch(fill<Element>, kWarpgroup, 0, b, kColumns * kDepth, 2u);
  return with_defect<3>(defect, [&](auto planted) {
    return launch(stored_operands<Format, kColumns, planted.value>, kWarpgroup,
                  (kRows + kColumns) * 128, a, b, result);
  });
}

// ---- a GEMM --------------------------------------------------------------------------------------

// out (128 x 128) = a (128 x 192) . b (192 x 128), with either operand in either order of storage. A
// producer warpgroup loads by tensor maps into a ring of stages, a consumer warpgroup multiplies.
constexpr int kSize = 128, kLength = 192, kSteps = kLength / kDepth, kStages = 2;
constexpr unsigned kTileBytes = kSize * kDepth * 2, kHalfTile = kTileBytes / 2;

// Transposed: two boxes of 64 values of M or N, by 64 of K.
template <bool kTransposed>
__device__ void load_tile(unsigned char* tile, const TensorMap* map, uint64_t* full, int step) {
  if (kTransposed) {
    tensor_load(tile, map, full, 0, step * kDepth, 0);
    tensor_load(tile + kHalfTile, map, full, 64, step * kDepth, 0);
  } else {
    tensor_load(tile, map, full, step * kDepth, 0, 0);
  }
}

// The descriptor for 16 steps of K from 16 * k on.
template <bool kTransposed, int kDefect>
__device__ uint64_t matrix_at(const unsigned char* tile, unsigned k) {
  constexpr unsigned kLeading = kDefect == 6 ? kPattern : kHalfTile;
  constexpr unsigned kStride = kDefect == 5 ? 2 * kPattern : kPattern;
  constexpr unsigned kStep = (kTransposed ? 2 * kPattern : 32) * (kDefect == 4 ? 2 : 1);
  return shared_matrix(tile, kLeading, kStride) + k * kStep / 16;
}

template <bool kTransposeA, bool kTransposeB, int kDefect>
__device__ void multiply_stage(float (&acc)[2][kSize / 2], const unsigned char* stage, int step) {
  constexpr bool kSwapped = kDefect == 10;
  const unsigned t = threadIdx.x - kWarpgroup;
  if (kDefect == 13 && t >= 96) return;
  if (kDefect != 1) warpgroup_arrive();
#pragma unroll
  for (unsigned k = 0; k < 4; ++k) {
    const uint64_t b = matrix_at<kTransposeB, kDefect>(stage + kTileBytes, k);
#pragma unroll
    for (unsigned block = 0; block < 2; ++block) {
      uint64_t a = matrix_at<kTransposeA, kDefect>(stage + block * kHalfTile, k);
      if (kDefect == 11 && t == 77) a += 2;
      if (kDefect == 12) a += 2 * kStages * kTileBytes / 16;
      const bool accumulate = kDefect == 15 ? k > 0 : step > 0 || k > 0;
      warpgroup_multiply<Bf16x2, kSize, kTransposeA != kSwapped, kTransposeB != kSwapped>(
          acc[kDefect == 20 && t == 5 && k == 1 ? 1 - block : block], a, b,
          kDefect == 19 ? accumulate && t != 3 : accumulate);
    }
  }
  if (kDefect != 14) warpgroup_commit();
}

template <bool kTransposeA, bool kTransposeB, int kDefect>
__global__ void __launch_bounds__(2 * kWarpgroup, 1)
    gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
         float* out) {
  FOMOE_DYNAMIC_SHARED(shared);
  FOMOE_SHARED(uint64_t, full, [kStages]);
  FOMOE_SHARED(uint64_t, empty, [kStages]);
  const unsigned t = threadIdx.x;
  unsigned char* stages = shared + (kDefect == 9 ? 128 : 0);
  if (t == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (t < kWarpgroup) {
    if (kDefect != 17 || t < 32) registers_lower<40>();
    if (t != 0) return;
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      unsigned char* to = stages + unsigned(stage) * 2 * kTileBytes;
      mbarrier_wait(&empty[stage], unsigned(kDefect == 7 ? round : 1 - round) % 2);
      mbarrier_arrive_expect(&full[stage], kDefect == 8 ? kTileBytes : 2 * kTileBytes);
      load_tile<kTransposeA>(to, &a_map, &full[stage], step);
      load_tile<kTransposeB>(to + kTileBytes, &b_map, &full[stage], step);
    }
    return;
  }
  registers_raise<232>();
  float acc[2][kSize / 2] = {};
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    if (kDefect != 16 || t == kWarpgroup) mbarrier_wait(&full[stage], unsigned(step / kStages) % 2);
    multiply_stage<kTransposeA, kTransposeB, kDefect>(
        acc, stages + unsigned(stage) * 2 * kTileBytes, step);
    // The products of the step before are done, its stage is free.
    warpgroup_wait<kDefect == 3 ? 2 : 1>();
    if (t == kWarpgroup && step > 0) mbarrier_arrive(&empty[(step - 1) % kStages]);
  }
  if (kDefect != 2) warpgroup_wait<0>();
  if (kDefect == 18 && t % 2 == 1) warpgroup_wait<1>();
#pragma unroll
  for (unsigned block = 0; block < 2; ++block) {
    warpgroup_fence(acc[block]);
    write_out<kSize>(acc[block], out + block * 64 * kSize);
  }
}

template <bool kTransposeA, bool kTransposeB, int kDefect>
int run_gemm(void* out) {
  auto* result = static_cast<float*>(out);
  uint16_t* operands[2] = {reinterpret_cast<uint16_t*>(result + kSize * kSize)};
  operands[1] = operands[0] + kSize * kLength;
  TensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    launch(fill<Bf16>, kWarpgroup, 0, operands[i], kSize * kLength, unsigned(i + 1));
    const bool transposed = i == 0 ? kTransposeA : kTransposeB;
    const int width = transposed ? kSize : kLength, lines = transposed ? kLength : kSize;
    const cudaError_t error = make_tensor_map(&maps[i], DType::bf16, operands[i], {width, lines, 1},
                                              {int64_t(width) * 2, int64_t(kSize) * kLength * 2},
                                              {64, transposed ? kDepth : kSize, 1});
    if (error != cudaSuccess) return error;
  }
  return launch(gemm<kTransposeA, kTransposeB, kDefect>, 2 * kWarpgroup,
                kStages * 2 * kTileBytes + (kDefect == 9 ? 1024 : 0), maps[0], maps[1], result);
}

}  // namespace

int warpgroup_selftest(const char* name_, int defect, const void* in, void* out) {
  const std::string name = name_;
  if (name == "tensor_boxes") return run_tensor_boxes(defect, in, out);
  if (name == "stored_bf16_64") return run_stored_operands<Bf16x2, Bf16, 64>(defect, out);
  if (name == "stored_bf16_256") return run_stored_operands<Bf16x2, Bf16, 256>(defect, out);
  if (name == "stored_f16_64") return run_stored_operands<F16x2, F16, 64>(defect, out);
  if (name == "stored_f16_128") return run_stored_operands<F16x2, F16, 128>(defect, out);
  if (name == "stored_f16_256") return run_stored_operands<F16x2, F16, 256>(defect, out);
  // By what is contiguous in A and in B. Bugs are planted in one of them.
  if (name == "gemm_kk") return run_gemm<false, false, 0>(out);
  if (name == "gemm_mk") return run_gemm<true, false, 0>(out);
  if (name == "gemm_mn") return run_gemm<true, true, 0>(out);
  if (name == "gemm_kn")
    return with_defect<20>(defect,
                           [&](auto planted) { return run_gemm<false, true, planted.value>(out); });
  return kUnknownTest;
}

}  // namespace fomoe::cuda

// Why a tensor cannot be mapped, null when it can; `error` is what make_tensor_map says.
extern "C" __attribute__((visibility("default"))) const char* fomoe_selftest_map(
    int dtype_, const void* base, const int64_t* sizes_, const int64_t* strides_, const int* box_,
    int* error) {
  const auto dtype = fomoe::DType(dtype_);
  const int64_t sizes[] = {sizes_[0], sizes_[1], sizes_[2]};
  const int64_t strides[] = {strides_[0], strides_[1]};
  const int box[] = {box_[0], box_[1], box_[2]};
  fomoe::cuda::TensorMap map;
  *error = fomoe::cuda::make_tensor_map(&map, dtype, base, sizes, strides, box);
  return fomoe::cuda::mapping_fault(dtype, base, sizes, strides, box);
}
