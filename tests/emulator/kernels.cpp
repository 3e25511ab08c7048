// The CUDA kernels as a shared library for the CPU, with C entry points for ctypes.
#include "../../csrc/cuda/combine.cu"

extern "C" int emulated_combine(const void* rows, const float* weights, const int32_t* row_of_slot,
                                int32_t dtype, int64_t tokens, int64_t hidden, int32_t top_k,
                                void* y) {
  fomoe::CombineArgs args{};
  args.rows = rows;
  args.weights = weights;
  args.row_of_slot = row_of_slot;
  args.dtype = static_cast<fomoe::DType>(dtype);
  args.tokens = tokens;
  args.hidden = hidden;
  args.top_k = top_k;
  args.y = y;
  return fomoe::cuda::combine(args, nullptr);
}
