// The contract of every kernel. Read this first.
//
// Plain pointers, shapes and layouts; no torch, no Python. `fomoe::cpu` implements every kernel
// here; `fomoe::cuda` implements those listed at the bottom, with a stream as an extra argument.
// The callers (csrc/ops) check shapes, dtypes and devices and allocate every output.
//
// Letters: T tokens, K slots per token (top_k), E experts of the layer, R resident experts,
// D hidden size, N intermediate size, G = 2 for gated activations (SwiGLU, GeGLU) else 1,
// S = T * K slots. Tensors are dense and row-major unless a leading stride is given.
#pragma once

#include <cstdint>

// Marks functions that kernels call too.
#ifdef __CUDACC__
#define FOMOE_ANYWHERE __host__ __device__
#else
#define FOMOE_ANYWHERE
#endif

namespace fomoe {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
enum class Scoring : int32_t { softmax = 0, sigmoid = 1 };
constexpr const char* kScoringNames[] = {"softmax", "sigmoid"};  // by number, as those below

// Gated: activation(gate) * up. GELU is the tanh form, as in Gemma's GeGLU. clamped_swiglu is that of
// gpt-oss: with g = min(gate, limit) and u = up clamped to -limit .. limit it is
// g * sigmoid(slope * g) * (u + 1).
enum class Activation : int32_t {
  swiglu = 0,
  geglu = 1,
  silu = 2,
  relu2 = 3,
  gelu = 4,
  clamped_swiglu = 5
};
constexpr const char* kActivationNames[] = {"swiglu", "geglu", "silu",
                                            "relu2",  "gelu",  "clamped_swiglu"};
FOMOE_ANYWHERE constexpr bool is_gated(Activation a) {
  return a == Activation::swiglu || a == Activation::geglu || a == Activation::clamped_swiglu;
}
constexpr float kClampedSwigluLimit = 7.0f, kClampedSwigluSlope = 1.702f;

// ---- route: logits -> the K chosen experts of every token and their combine weights ------------
// score = sigmoid(logit) or softmax over the allowed experts, fp32. An expert is *chosen* by
// score + selection_bias (ties: lower index first), after group-limited choice when groups > 1:
// a group's score is the sum of its two best choice scores and only groups_kept groups stay.
// Its *weight* is its score without the bias, divided by the sum over the chosen when
// `renormalize`, times `scale`. Slots are in descending order of choice score. If fewer than K
// experts are allowed in the kept groups the rest of the slots get expert -1 and weight 0.
// Without a bias and with one group the logits themselves are compared: the same order, and logits
// whose scores round to the same number do not tie. CPU and CUDA choose the same, bit for bit.
// A NaN logit, or for softmax an infinite largest logit, is bad: see the entry points below.
//
// `statistics` are integers, so that sums are exact in any order: [0, E) slots that chose each expert,
// [E, 2E) the sum over tokens of its score in 2^-24, [2E] the sum of the entropy (nats, of the
// allowed experts' scores normalised to sum 1) in 2^-32.
struct RouteArgs {
  const void* logits;  // [T, E] of logits_dtype
  DType logits_dtype;
  const float* selection_bias;  // [E] or null
  const uint8_t* allowed;       // [E], 1 = may be chosen; null = all
  int64_t tokens;
  int32_t experts, top_k;
  Scoring scoring;
  int32_t groups, groups_kept;
  bool renormalize;
  float scale;
  float* weights;       // out [T, K]
  int32_t* expert_ids;  // out [T, K]
  int64_t* statistics;  // in and out [2E + 1], added to; or null
};

// Limits of the CUDA kernels.
constexpr int32_t kMaxExperts = 1024, kMaxTopK = 64, kMaxResidents = 1024;

struct RouteBackwardArgs {
  const float* grad_weights;  // [T, K]
  const void* logits;         // [T, E] of logits_dtype
  DType logits_dtype;
  const int32_t* expert_ids;  // [T, K], each expert at most once per token
  const uint8_t* allowed;     // [E] or null
  int64_t tokens;
  int32_t experts, top_k;
  Scoring scoring;
  bool renormalize;
  float scale;
  void* grad_logits;  // out [T, E] of logits_dtype, every element written
};

// ---- compact: chosen experts -> a gap-free list of rows grouped by resident expert ---------------
// A slot is skipped when its expert is -1 or resident_index[expert] is -1. Rows are ordered by
// resident expert, then by slot (stable). Row tables are sized for the worst case, S rows;
// entries past offsets[R] are -1.
//
// The tile schedule lists what a grouped GEMM with tiles of `tile_rows` rows has to do: (resident,
// first row) pairs, each tile ending at first row + tile_rows or at the resident's last row. Tiles
// of one resident are consecutive, so that its weights stay in cache. Residents with more rows come
// first (ties: lower resident first), so that blocks that take every n-th tile share large groups
// and finish with small ones. Entries past the last tile are (-1, -1).
struct CompactArgs {
  const int32_t* expert_ids;      // [T, K]
  const int32_t* resident_index;  // [E], position among the resident experts, -1 = not resident
  int64_t tokens;
  int32_t top_k, experts, residents;
  int32_t* token_of_row;  // out [S]
  int32_t* slot_of_row;   // out [S], t * K + k
  int32_t* row_of_slot;   // out [T, K], -1 = skipped
  int32_t* offsets;       // out [R + 1], rows of resident r are offsets[r] .. offsets[r+1]
  int32_t tile_rows;      // 0 = no schedule
  int32_t* tiles;         // out [max_tiles, 2] or null
  int32_t* workspace;     // CUDA only: cuda::compact_workspace(args) entries
};

// Capacity of a schedule: every resident may end with a partly filled tile.
constexpr int64_t max_tiles(int64_t slots, int64_t residents, int64_t tile_rows) {
  return tile_rows > 0 ? slots / tile_rows + residents : 0;
}

// ---- gather: rows[row_of_slot[t,k]] = x[t], for GEMMs that do not gather by themselves ----------
// Each row belongs to one slot, as compact gives them.
struct GatherArgs {
  const void* x;               // [T, D] of dtype
  const int32_t* row_of_slot;  // [T, K]
  const int32_t* row_count;    // [1], number of rows, or null
  DType dtype;
  int64_t tokens, hidden;
  int32_t top_k;
  void* rows;  // out [S, D] of dtype; past the last row zeros, or untouched without row_count
};

// ---- The grouped GEMMs --------------------------------------------------------------------------
// On CUDA those that write rows follow compact's schedule `tiles` for tiles of kTileRows rows, with
// room for max_tiles of them, and rows of every operand start at multiples of 16 bytes.
constexpr int32_t kTileRows = 128;

// ---- expand: preact = x[token] . We^T + bias, act = activation(preact), grouped by expert ---------
struct ExpandArgs {
  const void* x;                // [T, D]
  const void* weight;           // [R, G*N, D]; gated: rows 0..N-1 gate, N..2N-1 up
  const void* bias;             // [R, G*N] or null
  const int32_t* token_of_row;  // [S]
  const int32_t* offsets;       // [R + 1]
  const int32_t* tiles;         // CUDA only
  DType dtype;                  // of x, weight, bias, act and preact
  int32_t residents;
  int64_t tokens, slots, hidden, intermediate_size;
  Activation activation;
  void* act;     // out [S, N]; rows past offsets[R] untouched
  void* preact;  // out [S, G*N] or null
};

// ---- contract: rows = act . Wc^T + bias, grouped by expert ----------------------------------------
struct ContractArgs {
  const void* act;         // [S, N]
  const void* weight;      // [R, D, N]
  const void* bias;        // [R, D] or null
  const int32_t* offsets;  // [R + 1]
  const int32_t* tiles;    // CUDA only
  DType dtype;
  int32_t residents;
  int64_t slots, hidden, intermediate_size;
  void* rows;  // out [S, D]; rows past offsets[R] untouched
};

// ---- combine: y[t] = sum over k in slot order of weights[t,k] * rows[row_of_slot[t,k]] ------------
// Skipped slots are not read. weights null = all ones (the sum of row gradients into tokens).
// fp32 accumulation, one rounding at the end.
struct CombineArgs {
  const void* rows;            // [S, D] of dtype
  const float* weights;        // [T, K] or null
  const int32_t* row_of_slot;  // [T, K]
  DType dtype;
  int64_t tokens, hidden;
  int32_t top_k;
  void* y;  // out [T, D] of dtype, every element written
};

// Each row belongs to one slot.
struct CombineBackwardArgs {
  const void* grad_y;          // [T, D] of dtype
  const void* rows;            // [S, D] of dtype, or null when grad_weights is null
  const float* weights;        // [T, K]
  const int32_t* row_of_slot;  // [T, K]
  DType dtype;
  int64_t tokens, hidden;
  int32_t top_k;
  // out [S, D] of dtype: weights[slot] * grad_y[token]; zeros past the last row
  void* grad_rows;
  float* grad_weights;  // out [T, K] or null: <rows, grad_y>, 0 where skipped
  int32_t* workspace;   // CUDA only: 1 entry
};

// ---- backward of contract + combine in one pass, without the contract output -------------------
// With g = grad_y[token] . Wc of a row and a = activation(preact):
//   grad_weights[slot] = <a, g> + <bias, grad_y[token]>,
//   grad_preact = activation'(preact) * (w * g),  scaled_act = w * a
// (the order of computation of SonicMoE, arXiv 2512.14080).
struct ContractBackwardArgs {
  const void* grad_y;           // [T, D]
  const void* weight;           // [R, D, N]
  const void* bias;             // [R, D], contract's, or null
  const void* preact;           // [S, G*N]
  const float* weights;         // [T, K] combine weights
  const int32_t* token_of_row;  // [S]
  const int32_t* slot_of_row;   // [S]
  const int32_t* offsets;       // [R + 1]
  const int32_t* tiles;         // CUDA only
  DType dtype;
  int32_t residents;
  int64_t tokens, slots, hidden, intermediate_size;
  Activation activation;
  void* grad_preact;    // out [S, G*N]; rows past offsets[R] untouched
  void* scaled_act;     // out [S, N]; likewise
  float* grad_weights;  // out [S]; zero where skipped
  float* workspace;     // CUDA only: cuda::contract_backward_workspace(args) entries
};

// ---- rows_out[r] = rows_in[r] . W of the row's expert, W [R, in, out] as stored -------------------
// The gradient of both grouped GEMMs to their inputs.
struct GroupedRowsArgs {
  const void* rows_in;     // [S, in]
  const void* weight;      // [R, in, out]
  const int32_t* offsets;  // [R + 1]
  const int32_t* tiles;    // CUDA only
  DType dtype;
  int32_t residents;
  int64_t slots, in, out;
  void* rows_out;  // out [S, out]; rows past offsets[R] untouched
};

// ---- grad_weight[e] = sum over the expert's rows of left[row]^T right[row] -----------------------
// Either side may be gathered: index null = row itself, else token_of_row. Rows in order, fp32
// accumulation; experts without rows get zeros. `add`: instead, grad_weight is fp32 and the sums are
// added to it; experts without rows leave theirs as they are.
struct WeightGradArgs {
  const void* left;            // [S or T, left_size]
  const void* right;           // [S or T, right_size]
  const int32_t* left_index;   // [S] or null
  const int32_t* right_index;  // [S] or null
  const int32_t* offsets;      // [R + 1]
  DType dtype;
  int32_t residents;
  int64_t left_lines, right_lines;  // S or T
  int64_t left_size, right_size;
  bool add;
  void* grad_weight;  // out [R, left_size, right_size] of dtype, or fp32 when `add`
};

// ---- grad_bias[e] = sum over the expert's rows of factor[row] * in[row or its index] ------------
// fp32 accumulation in one fixed order; experts without rows get zeros. The factor of a row is
// weights[slot_of_row[row]], or 1 where weights is null.
struct BiasGradArgs {
  const void* in;              // [S or T, width]
  const int32_t* index;        // [S] or null
  const float* weights;        // [S] or null
  const int32_t* slot_of_row;  // [S], null when weights is
  const int32_t* offsets;      // [R + 1]
  DType dtype;
  int32_t residents;
  int64_t width;
  void* grad_bias;  // out [R, width] of dtype, every element written
};

// ---- elementwise: grad_preact = activation'(preact) * grad_act --------------------------------------
struct ActivationBackwardArgs {
  const void* grad_act;  // [S, N]
  const void* preact;    // [S, G*N]
  const int32_t* offsets;
  DType dtype;
  int32_t residents;
  int64_t slots, intermediate_size;
  Activation activation;
  void* grad_preact;  // out [S, G*N]; rows past offsets[R] untouched
};

// ---- zero_tail: zeroes rows [*row_count, slots) of up to two tensors -------------------------------
struct ZeroTailArgs {
  void* rows[2];         // [slots, row_bytes]; null = none
  int64_t row_bytes[2];  // a multiple of 2
  int64_t slots;
  const int32_t* row_count;  // [1]
};

// ---- delta: fp32 values <-> the bytes that travel -------------------------------------------------
// A payload holds n values in payload_bytes(codec, n) bytes, little endian, at any address. Decoding
// needs the payload and n alone, and every decoded value is a product that fp32 holds exactly (or a
// stored float): the same bytes decode to the same bits everywhere, with or without fused multiply-adds.
// Padding bits of a byte are 0.
//
// fp32, bf16: the values (bf16 to nearest, ties to even).
// int8, int4, int2: consecutive blocks of `block` = 64 or 128 values, the last one shorter.
//   Each block is its step, bf16, followed by a code of b = 8, 4 or 2 bits per value, its value i at bits
//   b*i .. b*i + b-1 (low bits of a byte first).
//   int8, int4: code q in -M .. M, two's complement, M = 127 or 7, value q * step. step is
//     max|v| / M (an fp32 division) rounded *up* to bf16.
//     Nearest: q = v / step rounded to nearest even, clamped; v / step as v * (1 / step), both fp32.
//   int2: code q in 0 .. 3, value (2q - 3) * step. With k = floor(log2 max|v|) and
//     r = |v| * 2^(10-k) rounded to nearest even, an integer, step is
//     0.498f * (sqrtf(float(sum of r^2) / count) * 2^(k-10)) rounded to nearest bf16: the best four
//     even levels for normal values. Nearest: q = v * (0.5f / step) + 1.5f, rounded to nearest even,
//     clamped to 0 .. 3 (product, then sum: two roundings).
// topk: chunks of kTopkChunk = 4096 values, the last one shorter; each keeps the ceil(count / 64) values
//   of largest magnitude, ties to the lower index. Per chunk: a unit, bf16; the kept indices within the
//   chunk, ascending, 12 bits each; a 2-bit code per kept value: bit 0 = large, bit 1 = v < 0; indices
//   and codes each packed like codes above and padded to a byte. Value +-7 or +-10 times unit. With k of
//   the chunk's largest magnitude and r = |v| * 2^(20-k) rounded to nearest even, unit is
//   (float(sum of r over the kept) / kept * 2^(k-20)) * 0.125f rounded to nearest bf16; large means
//   |v| > 8.5f * unit. All other values decode to 0.
// A step (unit) is at most max_step(format), the largest bf16 with which all decoded values are finite.
// A block or chunk whose largest magnitude is under 2^-90 gets step (unit) 0 and codes 0 (topk: and
// indices 0, 1, ..): it decodes to zeros. A block or chunk with NaN or an infinity is bad: the CPU entry
// point returns its index; on CUDA its step is NaN, and it decodes to NaN.
//
// Stochastic rounding (int8, int4, int2; ignored by the others): in place of rounding t to nearest,
// floor(t + u) with u = (random_bits(seed, first + i) >> 8) * 2^-24, then clamped.
enum class Format : int32_t { fp32 = 0, bf16 = 1, int8 = 2, int4 = 3, int2 = 4, topk = 5 };
constexpr const char* kFormatNames[] = {"fp32", "bf16", "int8", "int4", "int2", "topk"};

// Bits of the largest bf16 whose product with the largest factor of a code is finite in fp32.
constexpr uint16_t max_step(Format format) {
  switch (format) {
    case Format::int8: return 0x7c01;  // 127
    case Format::int4: return 0x7e12;  // 7
    case Format::int2: return 0x7eaa;  // 3
    case Format::topk: return 0x7dcc;  // 10
    default: return 0x7f7f;
  }
}

struct DeltaCodec {
  Format format;
  int32_t block;  // 64 or 128; for int8, int4 and int2
  bool stochastic;
  uint64_t seed;
};

constexpr int64_t kTopkChunk = 4096, kTopkShare = 64;

constexpr int64_t payload_bytes(const DeltaCodec& codec, int64_t n) {
  const auto packed = [](int64_t count, int64_t bits) { return (count * bits + 7) / 8; };
  const auto blocks = [&](int64_t bits) {
    return 2 * ((n + codec.block - 1) / codec.block) + packed(n, bits);
  };
  switch (codec.format) {
    case Format::fp32: return 4 * n;
    case Format::bf16: return 2 * n;
    case Format::int8: return blocks(8);
    case Format::int4: return blocks(4);
    case Format::int2: return blocks(2);
    case Format::topk: break;
  }
  const auto chunk = [&](int64_t count) {
    const int64_t kept = (count + kTopkShare - 1) / kTopkShare;
    return count == 0 ? 0 : 2 + packed(kept, 12) + packed(kept, 2);
  };
  return n / kTopkChunk * chunk(kTopkChunk) + chunk(n % kTopkChunk);
}

// A counter-based generator (two rounds of a 32-bit finaliser).
FOMOE_ANYWHERE constexpr uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
FOMOE_ANYWHERE constexpr uint32_t random_bits(uint64_t seed, uint64_t index) {
  return mix_bits(mix_bits(uint32_t(index) ^ uint32_t(seed)) + uint32_t(seed >> 32) +
                  uint32_t(index >> 32));
}

// A contiguous range of the values, taken from one tensor: `begin` up to the next part's begin.
struct DeltaPart {
  const void* local;  // of dtype; null = these values are 0 before the error is added
  DType dtype;
  float weight;
  int64_t begin;
};

// v = weight * (anchor as the part's dtype holds it - local), or weight * local without an anchor;
// plus error. Every operation rounds once, in that order. Encodes v; error becomes v - what the
// payload decodes to.
struct DeltaEncodeArgs {
  const float* anchor;     // [n] or null
  const DeltaPart* parts;  // [num_parts], begins strictly ascending from 0; on the host
  int32_t num_parts;
  float* error;  // in and out [n], or null
  int64_t numel;
  DeltaCodec codec;
  uint64_t first;    // index of value 0 for the random bits
  uint8_t* payload;  // out [payload_bytes]
};

// Limit of the CUDA kernel; a caller with more parts first copies them into one tensor.
constexpr int32_t kMaxDeltaParts = 64;

// v = the sum over the members, in rank order, each addition rounded to fp32, starting with the value
// of member 0 itself, plus error. If `own` is not null it is the value of member `own_rank`, as it is,
// and `payloads` holds only those of the other members. Encodes v into `payload`, and error becomes
// v - what the payload decodes to; or, with `payload` null, writes v to `sum`.
struct DeltaReduceArgs {
  const uint8_t* payloads;  // member m's, or with own the others' in order, at m * stride
  int64_t stride;           // bytes
  int32_t members, own_rank;
  const float* own;  // [n] or null
  float* error;      // in and out [n], or null (always null with sum)
  int64_t numel;
  DeltaCodec codec;
  uint64_t first;
  uint8_t* payload;  // out [payload_bytes] or null
  float* sum;        // out [n] or null: exactly one of the two
};

// A 64-bit hash of bits: the sum, mod 2^64, over the 4-byte words w_i (the last one padded with zero
// bytes) of mix64(w_i + (i << 32)), plus the number of bytes. The order of summation does not matter.
constexpr uint64_t kMixFactor = 0xd6e8feb86659fd93u;
FOMOE_ANYWHERE constexpr uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 32)) * kMixFactor;
  x = (x ^ (x >> 32)) * kMixFactor;
  return x ^ (x >> 32);
}
struct HashArgs {
  const void* bytes;
  int64_t numel;   // bytes
  uint64_t* hash;  // out, one
};

namespace cpu {

// False when logits are bad; outputs are then undefined.
bool route(const RouteArgs&);
void route_backward(const RouteBackwardArgs&);
// False when an expert id is outside -1 .. experts-1.
bool compact(const CompactArgs&);
void gather(const GatherArgs&);
void expand(const ExpandArgs&);
void contract(const ContractArgs&);
void combine(const CombineArgs&);
void combine_backward(const CombineBackwardArgs&);
void contract_backward(const ContractBackwardArgs&);
void grouped_rows(const GroupedRowsArgs&);
void weight_grad(const WeightGradArgs&);
void bias_grad(const BiasGradArgs&);
void activation_backward(const ActivationBackwardArgs&);
// The index of a value (delta_reduce: of a sum) that is NaN or infinite, or -1. The block of such a
// value is undefined.
int64_t delta_encode(const DeltaEncodeArgs&);
int64_t delta_reduce(const DeltaReduceArgs&);
void hash_bits(const HashArgs&);

// Rows multiplied by expand since the library was loaded. Skipped slots do not count.
int64_t expand_rows_computed();

// The thread pool of all loops; csrc/ops installs torch's. Loops are serial until then.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody,
                             void* context);
void set_parallel_for(ParallelFor, int (*num_threads)());

}  // namespace cpu

namespace cuda {

// `stream` is a cudaStream_t; the return value a cudaError_t. No call waits for the device or
// allocates memory, so all of them can be captured in a graph. Values are not checked: a token with
// bad logits gets experts 0 .. K-1 with NaN weights, so that NaN reaches the output if one of them is
// resident; ids and rows out of range count as -1 in compact and must not occur elsewhere.
int route(const RouteArgs&, void* stream);
int route_backward(const RouteBackwardArgs&, void* stream);
int64_t compact_workspace(const CompactArgs&);
int compact(const CompactArgs&, void* stream);
int gather(const GatherArgs&, void* stream);
int combine(const CombineArgs&, void* stream);
int combine_backward(const CombineBackwardArgs&, void* stream);
int expand(const ExpandArgs&, void* stream);
int contract(const ContractArgs&, void* stream);
int64_t contract_backward_workspace(const ContractBackwardArgs&);
int contract_backward(const ContractBackwardArgs&, void* stream);
int grouped_rows(const GroupedRowsArgs&, void* stream);
int weight_grad(const WeightGradArgs&, void* stream);
int bias_grad(const BiasGradArgs&, void* stream);
int activation_backward(const ActivationBackwardArgs&, void* stream);
int delta_encode(const DeltaEncodeArgs&, void* stream);  // num_parts <= kMaxDeltaParts
int delta_reduce(const DeltaReduceArgs&, void* stream);
int hash_bits(const HashArgs&, void* stream);  // adds to *hash, which the caller zeroes
int zero_tail(const ZeroTailArgs&, void* stream);

}  // namespace cuda

}  // namespace fomoe
