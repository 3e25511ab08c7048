// route: the K best of a token's E experts and their weights; kernels.h.
//
// Bound by memory: logits are read once. A warp owns a token. Choosing takes one pass over the
// values in registers: the K-th largest of the lanes' largest values is a lower bound of the K-th
// largest of all, so the few values that reach it are gathered in shared memory and each is ranked
// among them; its rank is its slot. Where too many reach it (ties, K > 32) the warp takes its
// largest value K times instead.
//
// Without selection bias and groups nothing but the K chosen logits becomes a sigmoid score.
#include <cstdint>
#include <type_traits>

#include "router.cuh"

namespace fomoe::cuda {
namespace {

constexpr int kMaxCandidates = 64;
constexpr int64_t kMaxBlocks = 2048;
// With statistics every block adds its part to the total at the end.
constexpr int64_t kMaxBlocksCounting = 512;
// 64 scores of up to 2^24 fit an int32.
constexpr int kTokensPerFlush = kFewBlocks < 64 ? int(kFewBlocks) : 64;
constexpr float kScoreUnits = 16777216.0f, kEntropyUnits = 4294967296.0f;

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

template <class Element, int kPerLane>
struct Router {
  using L = Lanes<Element, kPerLane>;
  static constexpr int kExperts = kWarp * kPerLane;
  static constexpr int kWarps = kPerLane == 32 ? 4 : 8;

  // The shared memory of a warp.
  struct alignas(16) Space {
    float scores[kExperts];
    // These four share memory, in this order of use; each is written after a __syncwarp that follows
    // the last read of the one before.
    union {
      float choice[kExperts];               // by expert: order_by_choice, read by group_score()
      float group_score[kExperts];          // by group: keep_best_groups
      uint32_t group_kept[kExperts];        // by group, 1 or 0: read by order_by_choice
      uint64_t candidates[kMaxCandidates];  // gather_candidates, read by rank_candidates
    };
    uint64_t chosen[kMaxTopK];
    float partial[16];
  };

  const Params& p;
  Space& space;
  const int lane;
  uint32_t order[kPerLane];        // of the choice score, kNever where an expert may not be chosen
  float top = 0.0f, total = 1.0f;  // softmax: score = exp(logit - top) / total

  __device__ Router(const Params& params, Space& warp_space, int warp_lane)
      : p(params), space(warp_space), lane(warp_lane) {}

  __device__ bool allowed(int expert) const {
    return expert < p.experts && (p.allowed == nullptr || p.allowed[expert] != 0);
  }

  // Reads the logits; order[] is that of the logits. False when they are bad.
  __device__ bool read(int64_t token, float (&logits)[kPerLane]) {
    const auto* row = static_cast<const typename Element::Unit*>(p.logits) + token * p.experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logits[i] = 0.0f;
    L::load(row, p.experts, p.whole_vectors, lane, logits);
    bool bad = false;
    uint32_t largest = kNever;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      bad |= logits[i] != logits[i];
      order[i] = allowed(L::expert(lane, i)) ? order_of(logits[i]) : kNever;
      largest = max(largest, order[i]);
    }
    if (p.scoring == Scoring::softmax) {
      largest = __reduce_max_sync(kAllLanes, largest);
      top = value_of(largest);
      bad |= largest != kNever && !(fabsf(top) <= FLT_MAX);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      // An infinite logit may be chosen too.
      if (order[i] != kNever) order[i] = max(order[i], kLowestFinite);
    }
    return !__any_sync(kAllLanes, bad);
  }

  // Scores of all experts, into scores[] and space.scores; 0 where softmax may not choose.
  __device__ void score(const float (&logits)[kPerLane], float (&scores)[kPerLane]) {
    const bool softmax = p.scoring == Scoring::softmax;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      if (softmax) {
        scores[i] = order[i] != kNever ? exp_exact(logits[i] - top) : 0.0f;
      } else {
        scores[i] = sigmoid(logits[i]);
      }
      if (e < p.experts) space.scores[e] = scores[i];
    }
    if (!softmax) return;
    total = sum_of_scores(space.scores, p.experts, lane, space.partial);
    if (p.by_logits && p.statistics == nullptr) return;  // chosen ones are divided later
    if (!(total > 0.0f)) return;                         // no expert may be chosen
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      scores[i] = scores[i] / total;
      if (e < p.experts) space.scores[e] = scores[i];
    }
  }

  // order[] of score + bias, within the groups that are kept.
  __device__ void order_by_choice(const float (&scores)[kPerLane]) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      const bool open = order[i] != kNever;
      const float bias = open && p.selection_bias != nullptr ? p.selection_bias[e] : 0.0f;
      const float choice = open ? scores[i] + bias : -INFINITY;
      order[i] = open ? order_of(choice) : kNever;
      if (e < p.experts) space.choice[e] = choice;
    }
    if (p.groups == 1) return;
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
    constexpr int kSlots = kMaxTopK / kWarp;
    float scores[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int k = i * kWarp + lane;
      scores[i] = k < count ? score_of(space.chosen[k]) : 0.0f;
    }
    float sum = 0.0f;
    if (p.renormalize) {
      for (int k = 0; k < count; ++k)
        sum += __shfl_sync(kAllLanes, k < kWarp ? scores[0] : scores[1], k % kWarp);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int k = i * kWarp + lane;
      if (k >= p.top_k) continue;
      const float share = sum > 0.0f ? scores[i] / sum : scores[i];
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

  // Entropy of the allowed experts' scores normalised to sum 1, in nats.
  __device__ float entropy(const float (&logits)[kPerLane], const float (&scores)[kPerLane]) const {
    const bool softmax = p.scoring == Scoring::softmax;
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (order[i] == kNever || !(scores[i] > 0.0f)) continue;
      sum += scores[i];
      // An infinite logit has score 0 but for rounding.
      weighted += scores[i] * (softmax ? fmaxf(logits[i] - top, -87.3f) : __logf(scores[i]));
    }
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, apart);
      weighted += __shfl_xor_sync(kAllLanes, weighted, apart);
    }
    if (!(sum > 0.0f)) return 0.0f;
    return (softmax ? __logf(total) : __logf(sum)) - weighted / sum;
  }
};

// A block's part of the statistics, added to the total at the end.
template <int kExperts>
struct BlockStatistics {
  unsigned long long scores[kExperts];
  unsigned long long entropy;
  unsigned load[kExperts];
};

template <class Element, int kPerLane>
__global__ void __launch_bounds__(kWarp* Router<Element, kPerLane>::kWarps)
    route_kernel(const __grid_constant__ Params p) {
  using R = Router<Element, kPerLane>;
  FOMOE_SHARED(typename R::Space, spaces, [R::kWarps]);
  FOMOE_SHARED(BlockStatistics<R::kExperts>, block, [1]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const bool counting = p.statistics != nullptr;
  if (counting) {
    for (int e = warp * kWarp + lane; e < R::kExperts; e += R::kWarps * kWarp) {
      block[0].scores[e] = 0;
      block[0].load[e] = 0;
    }
    if (warp == 0 && lane == 0) block[0].entropy = 0;
    __syncthreads();
  }

  R router(p, spaces[warp], lane);
  int32_t score_sum[kPerLane] = {};
  int unflushed = 0;
  unsigned long long entropy_sum = 0;
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = R::L::expert(lane, i);
      if (e < p.experts && score_sum[i] != 0)
        atomicAdd(&block[0].scores[e], static_cast<unsigned long long>(score_sum[i]));
      score_sum[i] = 0;
    }
    unflushed = 0;
  };

  const int64_t step = int64_t(gridDim.x) * R::kWarps;
  for (int64_t token = int64_t(blockIdx.x) * R::kWarps + warp; token < p.tokens; token += step) {
    float logits[kPerLane], scores[kPerLane];
    if (!router.read(token, logits)) {
      router.write_bad(token);
      continue;
    }
    if (!p.by_logits || counting || p.scoring == Scoring::softmax) router.score(logits, scores);
    if (counting) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (router.order[i] != kNever) score_sum[i] += __float2int_rn(scores[i] * kScoreUnits);
      }
      const float entropy = router.entropy(logits, scores);
      if (lane == 0) entropy_sum += __float2ll_rn(entropy * kEntropyUnits);
    }
    if (!p.by_logits) router.order_by_choice(scores);
    __syncwarp();
    const int count = router.choose();
    router.write(token, count);
    if (counting) {
      for (int k = lane; k < count; k += kWarp)
        atomicAdd(&block[0].load[expert_in(spaces[warp].chosen[k])], 1u);
      if (++unflushed == kTokensPerFlush) flush();
    }
    __syncwarp();
  }

  if (!counting) return;
  flush();
  if (lane == 0) atomicAdd(&block[0].entropy, entropy_sum);
  __syncthreads();
  auto* statistics = reinterpret_cast<unsigned long long*>(p.statistics);
  for (int e = warp * kWarp + lane; e < p.experts; e += R::kWarps * kWarp) {
    if (block[0].load[e] != 0)
      atomicAdd(statistics + e, static_cast<unsigned long long>(block[0].load[e]));
    if (block[0].scores[e] != 0) atomicAdd(statistics + p.experts + e, block[0].scores[e]);
  }
  if (warp == 0 && lane == 0) atomicAdd(statistics + 2 * p.experts, block[0].entropy);
}

template <class Element, int kPerLane>
cudaError_t launch(const RouteArgs& args, void* stream) {
  using R = Router<Element, kPerLane>;
  Params params{args, false, false, 0, 0};
  params.whole_vectors = R::L::whole_vectors(args.logits, args.experts);
  params.by_logits = args.selection_bias == nullptr && args.groups == 1;
  const uint32_t group_size = uint32_t(args.experts / args.groups);
  // Exact for e < 2^20: the error of the quotient is below e * group_size / 2^32.
  params.group_divide = group_size == 1 ? 0 : uint32_t((uint64_t(1) << 32) / group_size + 1);
  params.lanes_per_group = 1;
  while (params.lanes_per_group * 2 * args.groups <= kWarp) params.lanes_per_group *= 2;
  const int64_t most = args.statistics != nullptr ? kMaxBlocksCounting : kMaxBlocks;
  const auto config = warp_per_token(args.tokens, R::kWarps, most, stream);
  return cudaLaunchKernelEx(&config, route_kernel<Element, kPerLane>, params);
}

}  // namespace

int route(const RouteArgs& args, void* stream) {
  if (args.tokens == 0 || args.top_k == 0) return cudaSuccess;
  if (args.top_k > kMaxTopK) return cudaErrorInvalidValue;
  return for_logits(args.logits_dtype, args.experts, [&](auto element, auto per_lane) {
    return launch<decltype(element), decltype(per_lane)::value>(args, stream);
  });
}

}  // namespace fomoe::cuda
