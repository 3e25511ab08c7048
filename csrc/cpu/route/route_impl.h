// route for one instruction set. Scores are computed a vector of experts at a time; the K best are
// kept in a short sorted list; once it is full few experts enter it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../simd.h"
#include "../token_kernels.h"

namespace fomoe::cpu::FOMOE_ISA {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n) { return (n + kSumLanes - 1) / kSumLanes * kSumLanes; }

// 0 where an expert may be chosen, -inf elsewhere and in the padding.
std::vector<float> choice_mask(const uint8_t* allowed, int64_t experts) {
  std::vector<float> mask(round_up(experts), kNever);
  for (int64_t e = 0; e < experts; ++e) {
    if (allowed == nullptr || allowed[e]) mask[e] = 0.0f;
  }
  return mask;
}

template <class S>
vf load_logits(const typename S::type* logits, int64_t first, int64_t experts) {
  return first + kLanes <= experts
             ? load_as(S{}, logits + first)
             : load_part(S{}, logits + first, std::max<int64_t>(experts - first, 0));
}

// scores[E, padded with zeros or sigmoid(0)]; false when a logit is NaN.
template <class S>
bool sigmoid_scores(const typename S::type* logits, int64_t experts, float* scores) {
  vi bad = {};
  for (int64_t e = 0; e < experts; e += kLanes) {
    const vf logit = load_logits<S>(logits, e, experts);
    bad |= (vi)(logit != logit);
    store(scores + e, sigmoid(logit));
  }
  return !any(bad);
}

// Softmax over the experts whose mask is 0, the others get 0. False when a logit is NaN, or when the
// largest one is infinite; scores are zeros when no expert is allowed.
template <class S>
bool softmax_scores(const typename S::type* logits, const float* mask, int64_t experts,
                    float* scores) {
  const int64_t padded = round_up(experts);
  vi bad = {};
  vf largest = splat(kNever);
  vi allowed = {};
  for (int64_t e = 0; e < padded; e += kLanes) {
    const vf logit = load_logits<S>(logits, e, experts);
    const vf open = load(mask + e);
    bad |= (vi)(logit != logit);
    allowed |= (vi)(open == 0.0f);
    const vf candidate = select((vi)(open == 0.0f), logit, splat(kNever));
    largest = select((vi)(candidate > largest), candidate, largest);
    store(scores + e, logit);
  }
  if (any(bad)) return false;
  if (!any(allowed)) {
    std::fill(scores, scores + padded, 0.0f);
    return true;
  }
  float top = largest[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, largest[i]);
  if (!std::isfinite(top)) return false;

  WideSum sum;
  for (int64_t e = 0; e < padded; e += kSumLanes) {
    for (int i = 0; i < kSumVectors; ++i) {
      float* at = scores + e + i * kLanes;
      const vi open = (vi)(load(mask + e + i * kLanes) == 0.0f);
      const vf share = select(open, exp(load(at) - top), vf{});
      sum.part[i] += share;
      store(at, share);
    }
  }
  const vf total = splat(sum.total());
  for (int64_t e = 0; e < padded; e += kLanes) store(scores + e, load(scores + e) / total);
  return true;
}

// The best `capacity` of a sequence of values, best first; of equal values the earlier one first.
class Best {
 public:
  explicit Best(int32_t capacity) : value_(capacity), index_(capacity), capacity_(capacity) {}

  void clear() { count_ = 0; }
  int32_t count() const { return count_; }
  int32_t index(int32_t i) const { return index_[i]; }
  // A value must exceed this to enter.
  float threshold() const { return count_ < capacity_ ? kNever : value_[capacity_ - 1]; }

  void offer(float value, int32_t index) {
    if (!(value > threshold())) return;
    int32_t at = count_ < capacity_ ? count_++ : capacity_ - 1;
    for (; at > 0 && value_[at - 1] < value; --at) {
      value_[at] = value_[at - 1];
      index_[at] = index_[at - 1];
    }
    value_[at] = value;
    index_[at] = index;
  }

  // Offers values[0 .. padded), in order.
  void offer_all(const float* values, int64_t padded) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      if (!any((vi)(load(values + i) > threshold()))) continue;
      for (int lane = 0; lane < kLanes; ++lane) offer(values[i + lane], int32_t(i + lane));
    }
  }

 private:
  std::vector<float> value_;
  std::vector<int32_t> index_;
  int32_t capacity_, count_ = 0;
};

// Experts outside the groups_kept best groups get -inf. A group's score is the sum of its two best.
void keep_best_groups(const RouteArgs& args, float* choice, Best& best) {
  const int32_t size = args.experts / args.groups;
  best.clear();
  for (int32_t g = 0; g < args.groups; ++g) {
    float first = kNever, second = kNever;
    for (int32_t e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    best.offer(second == kNever ? first : first + second, g);
  }
  for (int32_t g = 0; g < args.groups; ++g) {
    bool keep = false;
    for (int32_t i = 0; i < best.count(); ++i) keep |= best.index(i) == g;
    if (!keep) std::fill(choice + g * size, choice + (g + 1) * size, kNever);
  }
}

// choice[E, padded]: the logits of the experts that may be chosen, infinite ones too, -inf for the
// others. False when a logit is NaN.
template <class S>
bool choice_by_logits(const typename S::type* logits, const float* mask, int64_t experts,
                      float* choice) {
  const vf lowest = splat(std::numeric_limits<float>::lowest());
  vi bad = {};
  for (int64_t e = 0; e < round_up(experts); e += kLanes) {
    const vf logit = load_logits<S>(logits, e, experts);
    bad |= (vi)(logit != logit);
    store(choice + e, select((vi)(logit > lowest), logit, lowest) + load(mask + e));
  }
  return !any(bad);
}

// Entropy in nats of the scores of the allowed experts, normalised to sum 1.
float entropy(const float* scores, const float* mask, int64_t experts) {
  WideSum sum, weighted;
  for (int64_t e = 0; e < round_up(experts); e += kSumLanes) {
    for (int i = 0; i < kSumVectors; ++i) {
      const vf score = load(scores + e + i * kLanes);
      const vi counts =
          (vi)(load(mask + e + i * kLanes) == 0.0f) & (vi)(score >= 1.17549435e-38f);  // normal
      sum.part[i] += select(counts, score, vf{});
      weighted.part[i] += select(counts, score * log(select(counts, score, splat(1.0f))), vf{});
    }
  }
  const float total = sum.total();
  return total > 0.0f ? std::log(total) - weighted.total() / total : 0.0f;
}

// The statistics of a range of tokens.
class Statistics {
 public:
  explicit Statistics(const RouteArgs& args)
      : args_(args), sum_(args.statistics ? 2 * args.experts + 1 : 0, 0) {}

  void add(const float* scores, const float* mask, const Best& best) {
    for (int32_t k = 0; k < best.count(); ++k) ++sum_[best.index(k)];
    for (int32_t e = 0; e < args_.experts; ++e) {
      if (mask[e] == 0.0f) sum_[args_.experts + e] += std::lrint(scores[e] * 0x1p24f);
    }
    sum_[2 * args_.experts] += std::llrint(entropy(scores, mask, args_.experts) * 0x1p32f);
  }

  void write() const {
    for (size_t i = 0; i < sum_.size(); ++i)
      std::atomic_ref<int64_t>(args_.statistics[i]).fetch_add(sum_[i], std::memory_order_relaxed);
  }

 private:
  const RouteArgs& args_;
  std::vector<int64_t> sum_;
};

// Scores of the chosen experts, from all scores or, where those were not computed, the logits.
template <class S>
void chosen_scores(const Best& best, const float* scores, const typename S::type* logits,
                   float* chosen) {
  for (int32_t k = 0; k < best.count(); ++k)
    chosen[k] = scores ? scores[best.index(k)] : to_float(S{}, logits[best.index(k)]);
  if (scores) return;
  for (int64_t k = 0; k < best.count(); k += kLanes) store(chosen + k, sigmoid(load(chosen + k)));
}

void write_slots(const RouteArgs& args, int64_t token, const Best& best, const float* chosen) {
  float sum = 0.0f;
  for (int32_t k = 0; k < best.count(); ++k) sum += chosen[k];
  float* weights = args.weights + token * args.top_k;
  int32_t* expert_ids = args.expert_ids + token * args.top_k;
  for (int32_t k = 0; k < args.top_k; ++k) {
    const bool exists = k < best.count();
    expert_ids[k] = exists ? best.index(k) : -1;
    const float score = exists ? chosen[k] : 0.0f;
    weights[k] = (args.renormalize && sum > 0.0f ? score / sum : score) * args.scale;
  }
}

template <class S>
bool route_tokens(const RouteArgs& args, int64_t begin, int64_t end) {
  using T = typename S::type;
  const std::vector<float> mask = choice_mask(args.allowed, args.experts);
  const int64_t padded = int64_t(mask.size());
  const bool by_logits = args.selection_bias == nullptr && args.groups == 1;
  const bool softmax = args.scoring == Scoring::softmax;
  const bool all_scores = !by_logits || softmax || args.statistics != nullptr;
  std::vector<float> offset = mask;  // choice score - score
  if (args.selection_bias) {
    for (int32_t e = 0; e < args.experts; ++e) offset[e] += args.selection_bias[e];
  }
  std::vector<float> scores(padded), choice(padded), chosen(round_up(args.top_k));
  Best best(args.top_k), best_groups(args.groups_kept);
  Statistics statistics(args);

  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(args.logits) + t * args.experts;
    if (by_logits && !choice_by_logits<S>(logits, mask.data(), args.experts, choice.data()))
      return false;
    if (all_scores) {
      const bool valid = softmax
                             ? softmax_scores<S>(logits, mask.data(), args.experts, scores.data())
                             : sigmoid_scores<S>(logits, args.experts, scores.data());
      if (!valid) return false;
    }
    if (!by_logits) {
      for (int64_t e = 0; e < padded; e += kLanes)
        store(choice.data() + e, load(scores.data() + e) + load(offset.data() + e));
      if (args.groups > 1) keep_best_groups(args, choice.data(), best_groups);
    }
    best.clear();
    best.offer_all(choice.data(), padded);
    chosen_scores<S>(best, all_scores ? scores.data() : nullptr, logits, chosen.data());
    write_slots(args, t, best, chosen.data());
    if (args.statistics) statistics.add(scores.data(), mask.data(), best);
  }
  statistics.write();
  return true;
}

// Gradients of the chosen experts' scores; absent slots get 0. With w = s / S (S the sum over the
// chosen): ds_k = (g_k - sum_j g_j w_j) / S, else ds_k = g_k, where g = scale * grad_weights.
void score_grads(const RouteBackwardArgs& args, const float* grad_weights, const int32_t* ids,
                 const float* scores, float* grads) {
  float sum = 0.0f, dot = 0.0f;
  for (int32_t k = 0; k < args.top_k; ++k) {
    grads[k] = ids[k] < 0 ? 0.0f : grad_weights[k] * args.scale;
    if (ids[k] >= 0) sum += scores[k];
  }
  if (!args.renormalize || !(sum > 0.0f)) return;
  for (int32_t k = 0; k < args.top_k; ++k) dot += grads[k] * (scores[k] / sum);
  for (int32_t k = 0; k < args.top_k; ++k) {
    if (ids[k] >= 0) grads[k] = (grads[k] - dot) / sum;
  }
}

template <class S>
void backward_tokens(const RouteBackwardArgs& args, int64_t begin, int64_t end) {
  using T = typename S::type;
  const std::vector<float> mask = choice_mask(args.allowed, args.experts);
  const int64_t padded = int64_t(mask.size()), padded_k = round_up(args.top_k);
  std::vector<float> scores(padded), row(padded), logit(padded_k), chosen(padded_k),
      opposite(padded_k), grads(padded_k);

  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(args.logits) + t * args.experts;
    const int32_t* ids = args.expert_ids + t * args.top_k;
    T* grad_logits = static_cast<T*>(args.grad_logits) + t * args.experts;
    std::fill(row.begin(), row.end(), 0.0f);
    if (args.scoring == Scoring::sigmoid) {
      for (int32_t k = 0; k < args.top_k; ++k)
        logit[k] = ids[k] < 0 ? 0.0f : to_float(S{}, logits[ids[k]]);
      for (int64_t k = 0; k < padded_k; k += kLanes) {
        const vf x = load(logit.data() + k);
        store(chosen.data() + k, sigmoid(x));
        store(opposite.data() + k, sigmoid(-x));  // 1 - sigmoid(x) without cancellation
      }
      score_grads(args, args.grad_weights + t * args.top_k, ids, chosen.data(), grads.data());
      for (int32_t k = 0; k < args.top_k; ++k) {
        if (ids[k] >= 0) row[ids[k]] += grads[k] * chosen[k] * opposite[k];
      }
    } else {
      softmax_scores<S>(logits, mask.data(), args.experts, scores.data());
      for (int32_t k = 0; k < args.top_k; ++k) chosen[k] = ids[k] < 0 ? 0.0f : scores[ids[k]];
      score_grads(args, args.grad_weights + t * args.top_k, ids, chosen.data(), grads.data());
      float dot = 0.0f;
      for (int32_t k = 0; k < args.top_k; ++k) {
        dot += grads[k] * chosen[k];
        if (ids[k] >= 0) row[ids[k]] += grads[k];
      }
      for (int64_t e = 0; e < padded; e += kLanes)
        store(row.data() + e, load(scores.data() + e) * (load(row.data() + e) - dot));
    }
    for (int64_t e = 0; e < args.experts; e += kLanes) {
      const vf value = load(row.data() + e);
      const int64_t rest = args.experts - e;
      rest >= kLanes ? store_as(S{}, grad_logits + e, value)
                     : store_part(S{}, grad_logits + e, value, rest);
    }
  }
}

bool route_range(const RouteArgs& args, int64_t begin, int64_t end) {
  switch (args.logits_dtype) {
    case DType::f32: return route_tokens<F32>(args, begin, end);
    case DType::bf16: return route_tokens<BF16>(args, begin, end);
    case DType::f16: return route_tokens<F16>(args, begin, end);
  }
  return false;
}

void backward_range(const RouteBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.logits_dtype) {
    case DType::f32: return backward_tokens<F32>(args, begin, end);
    case DType::bf16: return backward_tokens<BF16>(args, begin, end);
    case DType::f16: return backward_tokens<F16>(args, begin, end);
  }
}

}  // namespace

const RouteKernels route_table = {route_range, backward_range};

}  // namespace fomoe::cpu::FOMOE_ISA
