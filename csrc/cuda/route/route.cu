// route: the K best of a token's E experts and their weights; kernels.h.
//
// Bound by memory: logits are read once. A warp owns a token. Choosing takes one pass over the
// values in registers: the K-th largest of the lanes' largest values is a lower bound of the K-th
// largest of all, so the few values that reach it are gathered in shared memory and each is ranked
// among them; its rank is its slot. Where too many reach it (ties, K > 32) the warp takes its
// largest value K times instead.
//
// Without selection bias, groups and statistics nothing but the K chosen logits becomes a sigmoid
// score. Where all experts have a score, none of them has a branch of its own: a warp asks once
// whether a division needs the compiler's general code.
//
// Sums of scores are kept in registers until the block adds those of its warps to the total.
#include <cstdint>
#include <type_traits>

#include "../arch/approximate.cuh"
#include "router.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kMaxCandidates = 64;
// 255 scores of up to 2^24 fit 32 bits.
constexpr int kTokensPerFlush = kFewBlocks < 255 ? int(kFewBlocks) : 255;
constexpr float kScoreUnits = 16777216.0f, kEntropyUnits = 4294967296.0f;
constexpr float kLn2 = 0.693147181f;

// A choice as one number: the larger is better; of equal values the lower expert is better.
__device__ uint64_t choice_of(uint32_t order, int expert) {
  return uint64_t(order) << 32 | uint32_t(~expert);
}
__device__ uint32_t order_in(uint64_t choice) { return uint32_t(choice >> 32); }
__device__ int expert_in(uint64_t choice) { return int(~uint32_t(choice)); }

struct Params : RouteArgs {
  bool whole_vectors;     // of the logits' rows
  bool by_logits;         // compare logits, not scores
  uint32_t group_divide;  // e / (experts per group) == umulhi(e, group_divide); 0: one per group
  int32_t lanes_per_group;
};

template <class Element, int kPerLane, bool kCounting>
struct Router {
  using L = Lanes<Element, kPerLane>;
  static constexpr int kExperts = kWarp * kPerLane;
  static constexpr int kWarps = kPerLane == 32 ? 4 : 8;
  static constexpr int kCounted = kCounting ? kExperts : 1;
  // Blocks that must fit a multiprocessor; 1 leaves the registers to the compiler. Under a bound it
  // computes addresses again for each use, so there is one only where it would take too many.
  static constexpr int kBlocks = !kCounting ? 1 : kPerLane == 8 ? 4 : kPerLane == 16 ? 2 : 1;

  // The shared memory of a warp.
  struct alignas(16) Space {
    union {
      float scores[kExperts];
      uint32_t score_sums[kExperts];  // of the warp's tokens, when it has no more
    };
    // These four share memory, in this order of use; each is written after a __syncwarp that follows
    // the last read of the one before.
    union {
      float choice[kExperts];               // by expert: order_by_choice, read by group_score()
      float group_score[kExperts];          // by group: keep_best_groups
      uint32_t group_kept[kExperts];        // by group, 1 or 0: read by order_by_choice
      uint64_t candidates[kMaxCandidates];  // gather_candidates, read by rank_candidates
    };
    uint64_t chosen[kMaxTopK];
    float chosen_scores[kMaxTopK];  // zeros past the last chosen
    float partial[16];
    unsigned long long entropy;  // of the warp's tokens; lane 0's
  };

  const Params& p;
  Space& space;
  const float* bias;  // by expert, shared memory
  const int lane;
  uint32_t open = 0;               // bit i: expert(lane, i) may be chosen
  uint32_t order[kPerLane];        // of the choice score, kNever where an expert may not be chosen
  float top = 0.0f, total = 1.0f;  // softmax: score = exp(logit - top) / total

  __device__ Router(const Params& params, Space& warp_space, const float* block_bias, int warp_lane)
      : p(params), space(warp_space), bias(block_bias), lane(warp_lane) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      if (e < p.experts && (p.allowed == nullptr || p.allowed[e] != 0)) open |= 1u << i;
    }
  }

  __device__ bool is_open(int i) const { return (open >> i & 1) != 0; }

  // Reads the logits. False when they are bad.
  __device__ bool read(int64_t token, float (&logits)[kPerLane]) {
    const auto* row = static_cast<const typename Element::Unit*>(p.logits) + token * p.experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logits[i] = 0.0f;
    L::load(row, p.experts, p.whole_vectors, lane, logits);
    bool bad = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) bad |= logits[i] != logits[i];
    if (p.scoring == Scoring::softmax) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        highest = fmaxf(highest, is_open(i) ? logits[i] : -INFINITY);
      uint32_t largest = open != 0 ? order_of(highest) : kNever;
      largest = __reduce_max_sync(kAllLanes, largest);
      top = value_of(largest);
      bad |= largest != kNever && !(fabsf(top) <= FLT_MAX);
    }
    return !__any_sync(kAllLanes, bad);
  }

  // Scores of all experts, into scores[] and, for later readers, space.scores; 0 where softmax may
  // not choose.
  __device__ void score(const float (&logits)[kPerLane], float (&scores)[kPerLane]) {
    if (p.scoring == Scoring::sigmoid) {
      sigmoids(logits, scores);
      if (!p.by_logits) L::put(space.scores, lane, scores);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] = is_open(i) ? exp_exact(logits[i] - top) : 0.0f;
    L::put(space.scores, lane, scores);
    total = sum_of_scores(space.scores, p.experts, lane, space.partial);
    if (p.by_logits && !kCounting) return;  // chosen ones are divided later
    if (!(total > 0.0f)) return;            // no expert may be chosen
    divide(scores, total);
    if (!p.by_logits) L::put(space.scores, lane, scores);
  }

  // order[] of the logits: an infinite one may be chosen too.
  __device__ void order_by_logit(const float (&logits)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) order[i] = max(order_of(logits[i]), kLowestFinite);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) order[i] = is_open(i) ? order[i] : kNever;
  }

  // order[] of score + bias, within the groups that are kept.
  __device__ void order_by_choice(const float (&scores)[kPerLane]) {
    float choice[kPerLane];
    if (p.selection_bias != nullptr) {
      L::get(bias, lane, choice);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) choice[i] = scores[i] + choice[i];
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) choice[i] = scores[i];
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      order[i] = is_open(i) ? order_of(choice[i]) : kNever;
      choice[i] = is_open(i) ? choice[i] : -INFINITY;
    }
    if (p.groups == 1) return;
    L::put(space.choice, lane, choice);
    __syncwarp();
    keep_best_groups();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      if (e < p.experts && space.group_kept[group_of(e)] == 0) order[i] = kNever;
    }
    __syncwarp();
  }

  __device__ int group_of(int expert) const {
    return p.group_divide == 0 ? expert : int(__umulhi(unsigned(expert), p.group_divide));
  }

  // The sum of the two best choice scores of the group of this lane (-inf: none), from its
  // lanes_per_group lanes, all of which get it.
  __device__ float group_score(int group, int part) const {
    const int size = p.experts / p.groups;
    const int steps = (size + p.lanes_per_group - 1) / p.lanes_per_group;
    float first = -INFINITY, second = -INFINITY;
    if (group < p.groups) {
      int step = group % steps;  // groups start at different steps: no bank conflicts
      for (int i = 0; i < steps; ++i) {
        const int member = step * p.lanes_per_group + part;
        if (member < size) {
          const float choice = space.choice[group * size + member];
          second = fmaxf(second, fminf(first, choice));
          first = fmaxf(first, choice);
        }
        step = step + 1 == steps ? 0 : step + 1;
      }
    }
    for (int apart = 1; apart < p.lanes_per_group; apart *= 2) {
      const float other_first = __shfl_xor_sync(kAllLanes, first, apart);
      const float other_second = __shfl_xor_sync(kAllLanes, second, apart);
      second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
      first = fmaxf(first, other_first);
    }
    return second == -INFINITY ? first : first + second;
  }

  // Turns the choice scores by expert in space into a 1 or 0 per group.
  __device__ void keep_best_groups() {
    const int groups_at_once = kWarp / p.lanes_per_group;
    float mine[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * groups_at_once >= p.groups) break;
      mine[i] =
          group_score(i * groups_at_once + lane / p.lanes_per_group, lane % p.lanes_per_group);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int group = i * groups_at_once + lane / p.lanes_per_group;
      if (i * groups_at_once >= p.groups) break;
      if (group < p.groups && lane % p.lanes_per_group == 0) space.group_score[group] = mine[i];
    }
    __syncwarp();
    uint32_t keep = 0;  // bit i: group lane + 32 i
    for (int group = lane; group < p.groups; group += kWarp) {
      const float score = space.group_score[group];
      int rank = 0;
      for (int other = 0; other < p.groups; ++other) {
        const float theirs = space.group_score[other];
        rank += theirs > score || (theirs == score && other < group);
      }
      if (rank < p.groups_kept && score > -INFINITY) keep |= 1u << group / kWarp;
    }
    __syncwarp();
    for (int group = lane; group < p.groups; group += kWarp)
      space.group_kept[group] = keep >> group / kWarp & 1;
    __syncwarp();
  }

  // space.chosen: the best top_k experts by order[], best first; returns how many there are.
  __device__ int choose() {
    if (p.top_k <= kWarp) {
      const int count = gather_candidates();
      if (count <= kMaxCandidates) {
        rank_candidates(count);
        return min(count, p.top_k);
      }
    }
    return choose_one_by_one();
  }

  // Lists all choices that can be among the top_k best, in any order; returns their number, of
  // which no more than kMaxCandidates are listed.
  __device__ int gather_candidates() {
    uint32_t best = kNever;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, order[i]);
    uint32_t least = kNever;
    for (int k = 0; k < p.top_k; ++k) {
      least = __reduce_max_sync(kAllLanes, best);
      if (least == kNever) break;
      if (best == least) best = kNever;
    }
    least = max(least, kNever + 1);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool in = order[i] >= least;
      const unsigned lanes = __ballot_sync(kAllLanes, in);
      if (lanes == 0) continue;
      const int at = count + __popc(lanes & ((1u << lane) - 1));
      if (in && at < kMaxCandidates) space.candidates[at] = choice_of(order[i], L::expert(lane, i));
      count += __popc(lanes);
    }
    __syncwarp();
    return count;
  }

  __device__ void rank_candidates(int count) {
    for (int i = lane; i < count; i += kWarp) {
      const uint64_t mine = space.candidates[i];
      int rank = 0;
      for (int other = 0; other < count; ++other) rank += space.candidates[other] > mine;
      if (rank < p.top_k) space.chosen[rank] = mine;
    }
    __syncwarp();
  }

  __device__ int choose_one_by_one() {
    int k = 0;
    for (; k < p.top_k; ++k) {
      uint32_t best = kNever;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) best = max(best, order[i]);
      best = __reduce_max_sync(kAllLanes, best);
      if (best == kNever) break;
      unsigned expert = kExperts;
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i)
        if (order[i] == best) expert = L::expert(lane, i);
      expert = __reduce_min_sync(kAllLanes, expert);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (L::expert(lane, i) == int(expert)) order[i] = kNever;
      if (lane == 0) space.chosen[k] = choice_of(best, int(expert));
    }
    __syncwarp();
    return k;
  }

  __device__ float score_of(uint64_t choice) const {
    if (!p.by_logits) return space.scores[expert_in(choice)];
    const float logit = value_of(order_in(choice));
    return p.scoring == Scoring::softmax ? exp_exact(logit - top) / total : sigmoid(logit);
  }

  // Writes the slots; lane l has slots l and l + 32.
  __device__ void write(int64_t token, int count) const {
    for (int k = lane; k < kMaxTopK; k += kWarp) {
      space.chosen_scores[k] = k < count ? score_of(space.chosen[k]) : 0.0f;
      if (p.top_k <= kWarp) break;
    }
    __syncwarp();
    float sum = 0.0f;
    if (p.renormalize) {
      for (int k = 0; k < count; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(space.chosen_scores + k);
        sum += four.x;
        sum += four.y;
        sum += four.z;
        sum += four.w;
      }
    }
    for (int k = lane; k < p.top_k; k += kWarp) {
      const float score = space.chosen_scores[k];
      const float share = sum > 0.0f ? score / sum : score;
      p.weights[token * p.top_k + k] = share * p.scale;
      p.expert_ids[token * p.top_k + k] = k < count ? expert_in(space.chosen[k]) : -1;
    }
  }

  __device__ void write_bad(int64_t token) const {
    for (int k = lane; k < p.top_k; k += kWarp) {
      p.weights[token * p.top_k + k] = NAN;
      p.expert_ids[token * p.top_k + k] = k;
    }
  }

  // Adds the scores of the experts that may be chosen to the sums, in 2^-24; returns the entropy of
  // those scores normalised to sum 1, in nats. Denormal scores count as 0, as on the CPU.
  __device__ float count_scores(const float (&logits)[kPerLane], const float (&scores)[kPerLane],
                                uint32_t (&sums)[kPerLane]) const {
    const bool softmax = p.scoring == Scoring::softmax;
    float sum = 0.0f, weighted = 0.0f;  // by logarithms, of base 2 with sigmoid scores
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float score = is_open(i) && scores[i] >= FLT_MIN ? scores[i] : 0.0f;
      sums[i] += uint32_t(__float2int_rn(score * kScoreUnits));
      sum += score;
      // An infinite logit has score 0 but for rounding; so has an infinite logarithm.
      const float logarithm = softmax ? logits[i] - top : log2_approximate(score);
      weighted = fmaf(score, fmaxf(logarithm, softmax ? -87.3f : -126.0f), weighted);
    }
    // The sum over the warp of both: each half of the warp adds up one of them.
    const bool upper = lane >= kWarp / 2;
    float mine = upper ? weighted : sum;
    mine += __shfl_xor_sync(kAllLanes, upper ? sum : weighted, kWarp / 2);
    for (int apart = kWarp / 4; apart > 0; apart /= 2)
      mine += __shfl_xor_sync(kAllLanes, mine, apart);
    const float other = __shfl_xor_sync(kAllLanes, mine, kWarp / 2);
    sum = upper ? other : mine;
    weighted = upper ? mine : other;
    if (!(sum >= FLT_MIN)) return 0.0f;
    const float mean = weighted * reciprocal_approximate(sum);
    return softmax ? kLn2 * log2_approximate(total) - mean : kLn2 * (log2_approximate(sum) - mean);
  }
};

// A block's part of the load, added to the total at the end.
template <int kExperts>
struct BlockLoad {
  unsigned of[kExperts];
};

template <int kExperts>
struct alignas(16) BlockBias {
  float of[kExperts];
};

template <class Element, int kPerLane, bool kCounting>
__global__ void __launch_bounds__(kWarp* Router<Element, kPerLane, kCounting>::kWarps,
                                  Router<Element, kPerLane, kCounting>::kBlocks)
    route_kernel(const __grid_constant__ Params p) {
  using R = Router<Element, kPerLane, kCounting>;
  FOMOE_SHARED(typename R::Space, spaces, [R::kWarps]);
  FOMOE_SHARED(BlockBias<R::kExperts>, bias, [1]);
  FOMOE_SHARED(BlockLoad<R::kCounted>, load, [1]);
  constexpr int kThreads = R::kWarps * kWarp;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * kWarp + lane;
  if (p.selection_bias != nullptr) {
    for (int e = thread; e < p.experts; e += kThreads) bias[0].of[e] = p.selection_bias[e];
  }
  if constexpr (kCounting) {
    for (int e = thread; e < p.experts; e += kThreads) load[0].of[e] = 0;
  }
  if (kCounting || p.selection_bias != nullptr) __syncthreads();

  R router(p, spaces[warp], bias[0].of, lane);
  auto* statistics = reinterpret_cast<unsigned long long*>(p.statistics);
  uint32_t score_sums[kPerLane] = {};
  int unflushed = 0;
  if (kCounting && lane == 0) spaces[warp].entropy = 0;

  const int64_t step = int64_t(gridDim.x) * R::kWarps;
  for (int64_t token = int64_t(blockIdx.x) * R::kWarps + warp; token < p.tokens; token += step) {
    float logits[kPerLane], scores[kPerLane];
    if (!router.read(token, logits)) {
      router.write_bad(token);
      continue;
    }
    if (kCounting || !p.by_logits || p.scoring == Scoring::softmax) router.score(logits, scores);
    if constexpr (kCounting) {
      const float entropy = router.count_scores(logits, scores, score_sums);
      if (lane == 0)
        spaces[warp].entropy +=
            static_cast<unsigned long long>(__float2ll_rn(entropy * kEntropyUnits));
    }
    if (p.by_logits)
      router.order_by_logit(logits);
    else
      router.order_by_choice(scores);
    __syncwarp();
    const int count = router.choose();
    router.write(token, count);
    if constexpr (kCounting) {
      for (int k = lane; k < count; k += kWarp)
        atomicAdd(&load[0].of[expert_in(spaces[warp].chosen[k])], 1u);
      if (++unflushed == kTokensPerFlush) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int e = R::L::expert(lane, i);
          if (score_sums[i] != 0)
            atomicAdd(statistics + p.experts + e, static_cast<unsigned long long>(score_sums[i]));
          score_sums[i] = 0;
        }
        unflushed = 0;
      }
    }
  }

  if constexpr (kCounting) {
    R::L::put(spaces[warp].score_sums, lane, score_sums);
    __syncthreads();
    for (int e = thread; e < p.experts; e += kThreads) {
      unsigned long long sum = 0;
#pragma unroll
      for (int w = 0; w < R::kWarps; ++w) sum += spaces[w].score_sums[e];
      if (sum != 0) atomicAdd(statistics + p.experts + e, sum);
      if (load[0].of[e] != 0)
        atomicAdd(statistics + e, static_cast<unsigned long long>(load[0].of[e]));
    }
    if (thread != 0) return;
    unsigned long long sum = 0;
    for (int w = 0; w < R::kWarps; ++w) sum += spaces[w].entropy;
    atomicAdd(statistics + 2 * p.experts, sum);
  }
}

// As many blocks as run at once: none waits for others to end. Warps loop over tokens.
template <class Element, int kPerLane, bool kCounting>
cudaError_t launch(const Params& params, void* stream) {
  static PersistentGrid grid;
  constexpr int kWarps = Router<Element, kPerLane, kCounting>::kWarps;
  const auto kernel = route_kernel<Element, kPerLane, kCounting>;
  unsigned blocks = 0;
  if (const cudaError_t error = grid.size(kernel, kWarps * kWarp, 0, blocks)) return error;
  const auto config = warp_per_token(params.tokens, kWarps, blocks, stream);
  return cudaLaunchKernelEx(&config, kernel, params);
}

Params params_of(const RouteArgs& args, bool whole_vectors) {
  Params params{args, whole_vectors, false, 0, 0};
  params.by_logits = args.selection_bias == nullptr && args.groups == 1;
  const uint32_t group_size = uint32_t(args.experts / args.groups);
  // Exact for e < 2^20: the error of the quotient is below e * group_size / 2^32.
  params.group_divide = group_size == 1 ? 0 : uint32_t((uint64_t(1) << 32) / group_size + 1);
  params.lanes_per_group = 1;
  while (params.lanes_per_group * 2 * args.groups <= kWarp) params.lanes_per_group *= 2;
  return params;
}

}  // namespace

int route(const RouteArgs& args, void* stream) {
  if (args.tokens == 0 || args.top_k == 0) return cudaSuccess;
  if (args.top_k > kMaxTopK) return cudaErrorInvalidValue;
  return for_logits(args.logits_dtype, args.experts, [&](auto element, auto per_lane) {
    using Element = decltype(element);
    constexpr int kPerLane = decltype(per_lane)::value;
    const Params params =
        params_of(args, Lanes<Element, kPerLane>::whole_vectors(args.logits, args.experts));
    return args.statistics != nullptr ? launch<Element, kPerLane, true>(params, stream)
                                      : launch<Element, kPerLane, false>(params, stream);
  });
}

}  // namespace fomoe::cuda
