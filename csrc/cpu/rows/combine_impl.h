// combine for one instruction set: rows of any storage type, fp32 sums in registers.
#include "../simd.h"
#include "../token_kernels.h"

namespace fomoe::cpu::FOMOE_ISA {
namespace {

constexpr int kBlockVectors = 4;  // columns that are summed in registers over all slots
constexpr int64_t kBlock = kBlockVectors * kLanes;

template <class S>
void combine_token(const CombineArgs& args, int64_t token) {
  using T = typename S::type;
  const T* rows = static_cast<const T*>(args.rows);
  const int32_t* row_of_slot = args.row_of_slot + token * args.top_k;
  const float* weights = args.weights ? args.weights + token * args.top_k : nullptr;
  T* y = static_cast<T*>(args.y) + token * args.hidden;

  // load(column block's vector v of a row) and store(v, sum): whole vectors or the ragged end.
  const auto sum_block = [&](int64_t column, int vectors, auto&& load_vector, auto&& store_vector) {
    vf sum[kBlockVectors] = {};
    for (int32_t k = 0; k < args.top_k; ++k) {
      if (row_of_slot[k] < 0) continue;
      const T* row = rows + int64_t(row_of_slot[k]) * args.hidden + column;
      const vf weight = splat(weights ? weights[k] : 1.0f);
      for (int v = 0; v < vectors; ++v) sum[v] = fused(weight, load_vector(row, v), sum[v]);
    }
    for (int v = 0; v < vectors; ++v) store_vector(y + column, v, sum[v]);
  };
  const auto load_whole = [](const T* p, int v) { return load_as(S{}, p + v * kLanes); };
  const auto store_whole = [](T* p, int v, vf sum) { store_as(S{}, p + v * kLanes, sum); };

  int64_t column = 0;
  for (; column + kBlock <= args.hidden; column += kBlock)
    sum_block(column, kBlockVectors, load_whole, store_whole);
  for (; column + kLanes <= args.hidden; column += kLanes)
    sum_block(column, 1, load_whole, store_whole);
  if (const int64_t rest = args.hidden - column; rest > 0) {
    sum_block(
        column, 1, [&](const T* p, int) { return load_part(S{}, p, rest); },
        [&](T* p, int, vf sum) { store_part(S{}, p, sum, rest); });
  }
}

// row_out = weight * in; returns <in, row> when `row` is given.
template <class S>
float scale_and_dot(const typename S::type* in, const typename S::type* row, float weight,
                    int64_t count, typename S::type* out) {
  const vf factor = splat(weight);
  WideSum dot;
  int64_t i = 0;
  int part = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf value = load_as(S{}, in + i);
    store_as(S{}, out + i, factor * value);
    if (row) dot.part[part] = fused(value, load_as(S{}, row + i), dot.part[part]);
    part = (part + 1) % kSumVectors;
  }
  if (const int64_t rest = count - i; rest > 0) {
    const vf value = load_part(S{}, in + i, rest);
    store_part(S{}, out + i, factor * value, rest);
    if (row) dot.part[part] = fused(value, load_part(S{}, row + i, rest), dot.part[part]);
  }
  return row ? dot.total() : 0.0f;
}

template <class S>
void backward_token(const CombineBackwardArgs& args, int64_t token) {
  using T = typename S::type;
  const T* grad_y = static_cast<const T*>(args.grad_y) + token * args.hidden;
  for (int64_t slot = token * args.top_k; slot < (token + 1) * args.top_k; ++slot) {
    const int64_t row = args.row_of_slot[slot];
    float dot = 0.0f;
    if (row >= 0) {
      const bool wanted = args.grad_weights != nullptr;
      const T* values = wanted ? static_cast<const T*>(args.rows) + row * args.hidden : nullptr;
      T* grad_row = static_cast<T*>(args.grad_rows) + row * args.hidden;
      dot = scale_and_dot<S>(grad_y, values, args.weights[slot], args.hidden, grad_row);
    }
    if (args.grad_weights) args.grad_weights[slot] = dot;
  }
}

// Calls body with the storage type's tag.
template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(F32{});
    case DType::bf16: return body(BF16{});
    case DType::f16: return body(F16{});
  }
}

void combine_range(const CombineArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto storage) {
    for (int64_t t = begin; t < end; ++t) combine_token<decltype(storage)>(args, t);
  });
}

void backward_range(const CombineBackwardArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto storage) {
    for (int64_t t = begin; t < end; ++t) backward_token<decltype(storage)>(args, t);
  });
}

}  // namespace

const CombineKernels combine_table = {combine_range, backward_range};

}  // namespace fomoe::cpu::FOMOE_ISA
