// The gradient of route to its logits; kernels.h. A warp owns a token: lane l has slots l and
// l + 32. The row of the gradient is assembled in shared memory and written once.
#include <cstdint>
#include <type_traits>

#include "router.cuh"

namespace fomoe::cuda {
namespace {

constexpr int64_t kMaxBlocks = 2048;
constexpr int kSlotsPerLane = kMaxTopK / kWarp;

struct Params : RouteBackwardArgs {
  bool whole_logits, whole_grads;  // rows are made of whole aligned vectors
};

// The sum of a value per slot in slot order, as the CPU takes it.
__device__ float sum_over_slots(const float (&values)[kSlotsPerLane], int top_k) {
  float sum = 0.0f;
  for (int k = 0; k < top_k; ++k)
    sum += __shfl_sync(kAllLanes, k < kWarp ? values[0] : values[1], k % kWarp);
  return sum;
}

template <class Element, int kPerLane>
struct RouteGradient {
  using L = Lanes<Element, kPerLane>;
  static constexpr int kExperts = kWarp * kPerLane;
  static constexpr int kWarps = kPerLane == 32 ? 4 : 8;

  struct alignas(16) Space {
    float row[kExperts];  // scores, then the gradient
    float partial[16];
  };

  const Params& p;
  Space& space;
  const int lane;
  int id[kSlotsPerLane];                            // -1: no expert in this slot
  float score[kSlotsPerLane], grad[kSlotsPerLane];  // of the chosen experts

  __device__ RouteGradient(const Params& params, Space& warp_space, int warp_lane)
      : p(params), space(warp_space), lane(warp_lane) {}

  // scores[] of the token's experts (softmax over the allowed ones), also into space.row.
  __device__ void softmax(int64_t token, float (&scores)[kPerLane]) {
    const auto* row = static_cast<const typename Element::Unit*>(p.logits) + token * p.experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] = 0.0f;
    L::load(row, p.experts, p.whole_logits, lane, scores);
    uint32_t order[kPerLane];
    uint32_t largest = kNever;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      const bool open = e < p.experts && (p.allowed == nullptr || p.allowed[e] != 0);
      order[i] = open ? order_of(scores[i]) : kNever;
      largest = max(largest, order[i]);
    }
    const float top = value_of(__reduce_max_sync(kAllLanes, largest));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      scores[i] = order[i] != kNever ? exp_exact(scores[i] - top) : 0.0f;
      if (e < p.experts) space.row[e] = scores[i];
    }
    const float total = sum_of_scores(space.row, p.experts, lane, space.partial);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      if (total > 0.0f) scores[i] = scores[i] / total;
      if (e < p.experts) space.row[e] = scores[i];
    }
    __syncwarp();
  }

  // From grad_weights to the gradients of the chosen scores. With w = s / S, S the sum over the
  // chosen: ds_k = (g_k - sum_j g_j w_j) / S; else ds_k = g_k; g = scale * grad_weights.
  __device__ void score_grads(int64_t token) {
    float dots[kSlotsPerLane];
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      const int k = i * kWarp + lane;
      grad[i] = id[i] < 0 ? 0.0f : p.grad_weights[token * p.top_k + k] * p.scale;
    }
    if (!p.renormalize) return;
    const float sum = sum_over_slots(score, p.top_k);
    if (!(sum > 0.0f)) return;
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) dots[i] = grad[i] * (score[i] / sum);
    const float dot = sum_over_slots(dots, p.top_k);
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i)
      if (id[i] >= 0) grad[i] = (grad[i] - dot) / sum;
  }

  __device__ void load_ids(int64_t token) {
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      const int k = i * kWarp + lane;
      id[i] = k < p.top_k ? p.expert_ids[token * p.top_k + k] : -1;
    }
  }

  __device__ void clear_row() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      if (e < p.experts) space.row[e] = 0.0f;
    }
    __syncwarp();
  }

  // After clear_row: each chosen expert is in one slot.
  __device__ void scatter(const float (&values)[kSlotsPerLane]) {
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i)
      if (id[i] >= 0) space.row[id[i]] = values[i];
    __syncwarp();
  }

  // The row, by the lanes that own its experts.
  __device__ void read_row(float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = L::expert(lane, i);
      values[i] = e < p.experts ? space.row[e] : 0.0f;
    }
  }

  __device__ void sigmoid_row(int64_t token, float (&values)[kPerLane]) {
    const auto* row = static_cast<const typename Element::Unit*>(p.logits) + token * p.experts;
    float opposite[kSlotsPerLane];
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      float logit = 0.0f;
      if (id[i] >= 0) Element::unpack(row[id[i]], &logit);
      score[i] = id[i] >= 0 ? sigmoid(logit) : 0.0f;
      opposite[i] = sigmoid(-logit);  // 1 - sigmoid without cancellation
    }
    score_grads(token);
    clear_row();
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) grad[i] = grad[i] * score[i] * opposite[i];
    scatter(grad);
    read_row(values);
  }

  __device__ void softmax_row(int64_t token, float (&values)[kPerLane]) {
    float scores[kPerLane], dots[kSlotsPerLane];
    softmax(token, scores);
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) score[i] = id[i] < 0 ? 0.0f : space.row[id[i]];
    score_grads(token);
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) dots[i] = grad[i] * score[i];
    const float dot = sum_over_slots(dots, p.top_k);
    __syncwarp();
    clear_row();
    scatter(grad);
    read_row(values);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = scores[i] * (values[i] - dot);
  }
};

template <class Element, int kPerLane>
__global__ void __launch_bounds__(kWarp* RouteGradient<Element, kPerLane>::kWarps)
    route_backward_kernel(const __grid_constant__ Params p) {
  using R = RouteGradient<Element, kPerLane>;
  FOMOE_SHARED(typename R::Space, spaces, [R::kWarps]);
  const int lane = threadIdx.x, warp = threadIdx.y;
  R gradient(p, spaces[warp], lane);
  const int64_t step = int64_t(gridDim.x) * R::kWarps;
  for (int64_t token = int64_t(blockIdx.x) * R::kWarps + warp; token < p.tokens; token += step) {
    float values[kPerLane];
    gradient.load_ids(token);
    if (p.scoring == Scoring::sigmoid) {
      gradient.sigmoid_row(token, values);
    } else {
      gradient.softmax_row(token, values);
    }
    auto* row = static_cast<typename Element::Unit*>(p.grad_logits) + token * p.experts;
    R::L::store(row, p.experts, p.whole_grads, lane, values);
    __syncwarp();
  }
}

template <class Element, int kPerLane>
cudaError_t launch(const RouteBackwardArgs& args, void* stream) {
  using R = RouteGradient<Element, kPerLane>;
  Params params{args, false, false};
  params.whole_logits = R::L::whole_vectors(args.logits, args.experts);
  params.whole_grads = R::L::whole_vectors(args.grad_logits, args.experts);
  const auto config = warp_per_token(args.tokens, R::kWarps, kMaxBlocks, stream);
  return cudaLaunchKernelEx(&config, route_backward_kernel<Element, kPerLane>, params);
}

}  // namespace

int route_backward(const RouteBackwardArgs& args, void* stream) {
  if (args.tokens == 0 || args.experts == 0) return cudaSuccess;
  if (args.top_k > kMaxTopK) return cudaErrorInvalidValue;
  return for_logits(args.logits_dtype, args.experts, [&](auto element, auto per_lane) {
    return launch<decltype(element), decltype(per_lane)::value>(args, stream);
  });
}

}  // namespace fomoe::cuda
