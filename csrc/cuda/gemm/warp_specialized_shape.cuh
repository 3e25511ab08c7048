// Shared by producer and consumers of a grouped GEMM on Hopper (warp_specialized.cuh): sizes, parameters,
// and the ring of stages between them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/tensor_map.cuh"
#include "../grid.cuh"
#include "grouped.cuh"
#include "slices.cuh"

namespace fomoe::cuda::warp_specialized {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kGroupWarps = kGroup / kWarp;
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kGroup;
constexpr int kDepth = 64, kRowBytes = kSliceBytes;  // of a slice: elements of the sum, 16-bit
constexpr int kPanel = 64 * kRowBytes;               // 64 lines of 128 bytes
constexpr int kGroupOf8 = 8 * kRowBytes;
constexpr int kRowsOfProduct = 64;  // of wgmma
constexpr int kSumOfProduct = 16;
// A multiprocessor has 65536 registers: at first 168 for each of 384 threads.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kSharedLimit = 227 << 10, kBarrierBytes = 4 << 10;

template <class Problem_, int kN_, bool kPingPong_>
struct Shape {
  using Problem = Problem_;
  using Epilogue = typename Problem::Epilogue;
  using Format = typename Epilogue::Format;
  static constexpr int kM = kTileRows, kN = kN_;
  static constexpr int kBlocks = 1;  // of a cluster
  static constexpr bool kPingPong = kPingPong_;
  // Products of 64 rows that a consumer makes of each slice.
  static constexpr int kProducts =
      kPingPong ? kM / kRowsOfProduct : kM / kRowsOfProduct / kConsumers;
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kStagingBytes = Epilogue::kWindows * kWindowBytes<Format>;  // of a warp
  static constexpr int kStagingTotal = kConsumers * kGroupWarps * kStagingBytes;
  static constexpr int kStages = (kSharedLimit - kBarrierBytes - kStagingTotal) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kStagingTotal;
  static_assert(kStages >= 3);
  // Whether the producer's threads copy. Each of them then arrives when its copies have arrived, and the
  // leader arrives once more for the TMA loads.
  static constexpr bool kCopies = Problem::kSumsRows || Problem::kGather;
  static constexpr unsigned kFullArrivals = kCopies ? kGroup + 1 : 1;
  static constexpr unsigned kEmptyArrivals = (kPingPong ? 1 : kConsumers) * kGroupWarps;
  // Lines of B in a box.
  static constexpr int kBoxB = Problem::kMajorB == Major::line ? kDepth
                               : Epilogue::kInterleaved        ? kStripColumns / 2
                                                               : kN;
};

// Ping-pong by two blocks of a cluster. Where they multiply by the same B, each loads one half of it for
// both. A stage is free when both have multiplied it, so both have as many slices.
template <class Problem_, int kN_>
struct PairShape : Shape<Problem_, kN_, true> {
  using Base = Shape<Problem_, kN_, true>;
  static_assert(!Problem_::kSumsRows);
  static constexpr int kBlocks = 2;
  static constexpr unsigned kEmptyArrivals = kBlocks * Base::kEmptyArrivals;
  static constexpr int kBoxB = Base::kBoxB == kN_ ? kN_ / kBlocks : Base::kBoxB;
};

template <class Problem>
struct Params {
  TensorMap a, b;
  Problem problem;
};

struct Barriers {
  uint64_t *full, *empty;
};

// A position in the ring, and the number of rounds so far.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned phase = 0;
  __device__ void next() {
    stage = stage == kStages - 1 ? 0 : stage + 1;
    phase ^= stage == 0 ? 1u : 0u;
  }
  __device__ void skip(int slices) {
    phase ^= unsigned(stage + slices) / kStages & 1u;
    stage = (stage + slices) % kStages;
  }
};

// The tile of an item; false past the last one.
template <class Shape, class Schedule>
__device__ inline bool get_work(const Schedule& schedule, int32_t item, Work& work) {
  constexpr int kColumns = result_columns<typename Shape::Epilogue>(Shape::kN);
  if constexpr (Shape::kBlocks == 1) {
    return schedule.get(item, kColumns, work);
  } else {
    return schedule.get_of_pair(item, kColumns, work);
  }
}

__device__ inline int slices_of(const Work& work) {
  return int((work.sum_end - work.sum_begin + kDepth - 1) / kDepth);
}

}  // namespace fomoe::cuda::warp_specialized
