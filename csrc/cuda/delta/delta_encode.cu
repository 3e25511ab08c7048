// delta_encode: anchor minus local, plus error, into a payload; kernels.h.
//
// Bound by memory. For int8 with anchor and error 17 bytes move per value, and a lane has its three
// 16-byte loads in flight before it uses the first. The table of parts is an argument of the kernel.
#include "delta_blocks.cuh"
#include "delta_topk.cuh"

namespace fomoe::cuda {
namespace {

using namespace delta;

__device__ float as_float(float value) { return value; }
__device__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float as_float(__half value) { return __half2float(value); }

// The value as T holds it.
template <class T>
__device__ float held(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return as_float(__float2bfloat16_rn(value));
  if constexpr (std::is_same_v<T, __half>) return as_float(__float2half_rn(value));
  return value;
}

struct Difference {
  const float* anchor;  // or null
  const float* error;   // or null
  int64_t numel;
  bool anchor_aligned, error_aligned;
  int32_t num_parts, widest_step;  // of the search for a part: a power of two
  DeltaPart parts[kMaxDeltaParts];

  __device__ void prepare(int64_t, int) const {}

  __device__ void four(int64_t i, int present, float (&v)[kFour]) const {
    float anchors[kFour] = {}, errors[kFour] = {};
    if (anchor != nullptr) load_four(anchor, i, present, anchor_aligned, anchors);
    if (error != nullptr) load_four(error, i, present, error_aligned, errors);
#pragma unroll
    for (int e = 0; e < kFour; ++e) v[e] = 0.0f;
    if (present > 0) {
      // The last part that begins at i or before; then those that begin among the four values.
      int at = 0;
      for (int step = widest_step; step > 0; step /= 2)
        if (at + step < num_parts && parts[at + step].begin <= i) at += step;
      const int64_t stop = i + present;
      int64_t end;
      do {
        const DeltaPart& part = parts[at++];
        end = at < num_parts ? min(parts[at].begin, stop) : stop;
        if (part.local == nullptr) continue;
        switch (part.dtype) {
          case DType::f32: subtract<float>(part, i, end, anchors, v); break;
          case DType::bf16: subtract<__nv_bfloat16>(part, i, end, anchors, v); break;
          case DType::f16: subtract<__half>(part, i, end, anchors, v); break;
        }
      } while (end < stop);
    }
    if (error == nullptr) return;
#pragma unroll
    for (int e = 0; e < kFour; ++e) v[e] += errors[e];
  }

 private:
  // The part's values among i .. i+3, up to `end`.
  template <class T>
  __device__ void subtract(const DeltaPart& part, int64_t i, int64_t end,
                           const float (&anchors)[kFour], float (&v)[kFour]) const {
    const T* local = static_cast<const T*>(part.local);
    const int64_t first = i - part.begin;
    const float weight = part.weight;
    const auto value = [&](int e, T read) {
      const float here = as_float(read);
      return weight * (anchor == nullptr ? here : held<T>(anchors[e]) - here);
    };
    if (first >= 0 && end == i + kFour) {
      Vector<T, kFour> read;
      if (reinterpret_cast<uintptr_t>(local + first) % sizeof(read) == 0) {
        read = *reinterpret_cast<const Vector<T, kFour>*>(local + first);
      } else {
#pragma unroll
        for (int e = 0; e < kFour; ++e) read.unit[e] = local[first + e];
      }
#pragma unroll
      for (int e = 0; e < kFour; ++e) v[e] = value(e, read.unit[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kFour; ++e)
        if (first + e >= 0 && i + e < end) v[e] = value(e, local[first + e]);
    }
  }
};

Difference difference_of(const DeltaEncodeArgs& args) {
  Difference source{};
  source.anchor = args.anchor;
  source.error = args.error;
  source.numel = args.numel;
  source.anchor_aligned = is_aligned(args.anchor, 16);
  source.error_aligned = is_aligned(args.error, 16);
  source.num_parts = args.num_parts;
  for (int32_t step = 1; step < args.num_parts; step *= 2) source.widest_step = step;
  std::copy_n(args.parts, args.num_parts, source.parts);
  return source;
}

}  // namespace

int delta_encode(const DeltaEncodeArgs& args, void* stream) {
  if (args.numel == 0) return cudaSuccess;
  if (args.num_parts < 1 || args.num_parts > kMaxDeltaParts) return cudaErrorInvalidValue;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Difference source = difference_of(args);
  const Target target = target_of(args);
  if (args.codec.format == Format::topk) return launch_topk(source, target, cuda_stream);
  return with_format(args.codec, [&](auto format, auto block) {
    return launch_encode<decltype(format)::value, decltype(block)::value>(source, target,
                                                                          cuda_stream);
  });
}

}  // namespace fomoe::cuda
