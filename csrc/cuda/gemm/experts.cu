// The verbs of the grouped GEMMs: what each multiplies, and which kernel does it.
#include "../per_device.h"
#include "grouped.cuh"

namespace fomoe::cuda {
namespace {

#ifdef FOMOE_HAVE_SM90A  // built for it
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif

// Whether the current device runs sm_90a code.
cudaError_t runs_hopper_code(bool& answer) {
  enum : int { kNo = 1, kYes };
  static PerDevice known;
  int state = 0;
  const cudaError_t error = known.get(state, [](int device, int& found) {
    int major = 0;
    const cudaError_t failed =
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    found = kHopperCode && major == 9 ? kYes : kNo;
    return failed;
  });
  answer = state == kYes;
  return error;
}

template <class Problem>
cudaError_t run(Verb verb, DType dtype, const Problem& problem, cudaStream_t stream) {
  using Epilogue = typename Problem::Epilogue;
  bool hopper = false;
  if (const cudaError_t error = runs_hopper_code(hopper)) return error;
  const int64_t columns = problem.schedule.columns * (Epilogue::kInterleaved ? 2 : 1);
  int64_t terms = 0;
  if constexpr (!Problem::kSumsRows) terms = problem.schedule.depth;
  const Tile tile = choose_tile(verb, dtype, columns, terms, hopper);
  if constexpr (kHopperCode && !kIsF32<typename Epilogue::Format>)
    if (tile.kernel != Kernel::multistage) return run_warp_specialized(problem, tile, stream);
  return run_multistage(problem, tile, stream);
}

template <class Body>
cudaError_t with_format(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(F32{});
    case DType::bf16: return body(Bf16x2{});
#ifndef FOMOE_FEW_KERNELS  // tests do without one of the 16-bit formats
    case DType::f16: return body(F16x2{});
#else
    case DType::f16: break;
#endif
  }
  return cudaErrorInvalidValue;
}

// body(format, activation), both known when it is compiled.
template <class Body>
cudaError_t with_format_and_activation(DType dtype, Activation activation, const Body& body) {
  return with_format(dtype, [&](auto format) {
    return with_activation(activation, [&](auto known) { return body(format, known); });
  });
}

// Rows are read 16 bytes at a time, at addresses that a 32-bit multiply-add makes, two sizes in a row of
// pre-activations.
bool good_row(DType dtype, int64_t size) {
  const int64_t bytes = size * (dtype == DType::f32 ? 4 : 2);
  return bytes % 16 == 0 && bytes < int64_t(1) << 31;
}

}  // namespace

int expand(const ExpandArgs& args, void* stream) {
  if (!good_row(args.dtype, args.hidden) || !good_row(args.dtype, args.expert_size))
    return cudaErrorInvalidValue;
  const auto body = [&](auto format, auto activation) {
    using Epilogue = Activate<decltype(format), decltype(activation)::value>;
    const int64_t width = args.expert_size * Epilogue::kGates;
    const RowsProblem<Epilogue, Major::sum, true> problem{
        {args.x, args.token_of_row, args.tokens, args.hidden},
        {args.weight, nullptr, width, args.hidden},
        {args.offsets, args.tiles, args.residents, args.expert_size, args.hidden, nullptr},
        {args.act, args.preact, args.bias, args.expert_size}};
    return run(Verb::expand, args.dtype, problem, static_cast<cudaStream_t>(stream));
  };
  return with_format_and_activation(args.dtype, args.activation, body);
}

int contract(const ContractArgs& args, void* stream) {
  if (!good_row(args.dtype, args.hidden) || !good_row(args.dtype, args.expert_size))
    return cudaErrorInvalidValue;
  const auto body = [&](auto format) {
    const RowsProblem<StoreRows<decltype(format)>, Major::sum, false> problem{
        {args.act, nullptr, args.slots, args.expert_size},
        {args.weight, nullptr, args.hidden, args.expert_size},
        {args.offsets, args.tiles, args.residents, args.hidden, args.expert_size, nullptr},
        {args.rows, args.hidden, args.bias}};
    return run(Verb::contract, args.dtype, problem, static_cast<cudaStream_t>(stream));
  };
  return with_format(args.dtype, body);
}

int contract_backward_rows(const ContractBackwardArgs& args, void* stream) {
  if (!good_row(args.dtype, args.hidden) || !good_row(args.dtype, args.expert_size))
    return cudaErrorInvalidValue;
  const auto body = [&](auto format, auto activation) {
    using Epilogue = ActivateBackward<decltype(format), decltype(activation)::value>;
    const RowsProblem<Epilogue, Major::line, true> problem{
        {args.grad_y, args.token_of_row, args.tokens, args.hidden},
        {args.weight, nullptr, args.hidden, args.expert_size},
        {args.offsets, args.tiles, args.residents, args.expert_size, args.hidden, nullptr},
        {args.preact, args.weights, args.slot_of_row, args.grad_preact, args.scaled_act,
         args.workspace, args.slots, args.expert_size}};
    return run(Verb::contract_backward, args.dtype, problem, static_cast<cudaStream_t>(stream));
  };
  return with_format_and_activation(args.dtype, args.activation, body);
}

int grouped_rows(const GroupedRowsArgs& args, void* stream) {
  if (!good_row(args.dtype, args.in) || !good_row(args.dtype, args.out))
    return cudaErrorInvalidValue;
  const auto body = [&](auto format) {
    const RowsProblem<StoreRows<decltype(format)>, Major::line, false> problem{
        {args.rows_in, nullptr, args.slots, args.in},
        {args.weight, nullptr, args.in, args.out},
        {args.offsets, args.tiles, args.residents, args.out, args.in, nullptr},
        {args.rows_out, args.out, nullptr}};
    return run(Verb::grouped_rows, args.dtype, problem, static_cast<cudaStream_t>(stream));
  };
  return with_format(args.dtype, body);
}

int weight_grad(const WeightGradArgs& args, void* stream) {
  if (!good_row(args.dtype, args.left_size) || !good_row(args.dtype, args.right_size))
    return cudaErrorInvalidValue;
  const auto body = [&](auto format) {
    using Format = decltype(format);
    const auto run_with = [&](const auto& epilogue) {
      const WeightsProblem<std::decay_t<decltype(epilogue)>> problem{
          {args.left, args.left_index, args.left_lines, args.left_size},
          {args.right, args.right_index, args.right_lines, args.right_size},
          {args.offsets, args.residents, args.left_size, args.right_size, nullptr},
          epilogue};
      return run(Verb::weight_grad, args.dtype, problem, static_cast<cudaStream_t>(stream));
    };
    if (args.add)
      return run_with(AddRows<Format>{static_cast<float*>(args.grad_weight), args.right_size});
    return run_with(StoreRows<Format>{args.grad_weight, args.right_size, nullptr});
  };
  return with_format(args.dtype, body);
}

}  // namespace fomoe::cuda
