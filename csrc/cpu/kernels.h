// The CPU kernels as plain C++: argument structs, packed layouts and the table of function pointers.
//
// No torch, no STL: this header is seen by every per-ISA file, by the binding and by the sanitizer driver.
// Sizes and strides count elements; pointers need the alignment of their element only. Outputs alias no input, but for one
// case that a stack of blocks uses: y may be x itself, at the same stride.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace repavit {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kDTypes };
template <class T>
constexpr DType kDTypeOf = kDTypes;  // of no type but these
template <>
constexpr DType kDTypeOf<float> = kFloat32;
template <>
constexpr DType kDTypeOf<bf16> = kBFloat16;
template <>
constexpr DType kDTypeOf<fp16> = kFloat16;
template <>
constexpr DType kDTypeOf<double> = kFloat64;

// Instruction-set levels, each containing those before it. Also what the operator cpu_isa() returns.
enum IsaLevel : int32_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kIsaLevels };

// Whose threads the kernels run on: libtorch's pool in the extension, a toy one in the C++ driver.
struct Pool {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  int threads;  // how many of them may run at once, >= 1
  // Calls body on disjoint ranges that cover [0, count), in any order and on any thread, and returns when all are done.
  // A nested call may run serially: nothing here waits for another range.
  void (*run)(int64_t count, Body body, void* context);
};

// ---- Packed weights -------------------------------------------------------------------------------------------------
// A matrix W [N, K], used as x Wᵀ, is stored as ceil(N / 32) panels of 32 columns of Wᵀ; each panel is [K][32], so that
// the microkernel reads it front to back. bf16 keeps pairs of k together, [ceil(K / 2)][32][2], as vdpbf16ps wants them.
// Missing columns and the odd k are zeros. The layout depends on the dtype, never on the ISA level.
//
// Weights quantized to int8 stand in panels of int8_t, whatever dtype they were made of: first what belongs to the panel's
// columns (Int8Columns), then [ceil(K / 4)][32][4], as vpdpbusd wants them. Column n is scale[n] times whole numbers from
// -127 to 127: scale = max |w| / 127.
constexpr int kPanelColumns = 32;

// Consecutive k that are interleaved in a panel of this dtype.
template <class T>
constexpr int kInterleave = 1;
template <>
constexpr int kInterleave<bf16> = 2;
template <>
constexpr int kInterleave<int8_t> = 4;
template <>
constexpr int kInterleave<int16_t> = 2;  // of panels of int8_t that were widened (gemm_int8-inl.h)

// First 256 bytes of a panel of int8_t.
struct Int8Columns {
  float scale[kPanelColumns];  // 0 of a column that is missing or zero, NaN of one that is not finite
  int32_t sum[kPanelColumns];  // of the column's whole numbers
};
static_assert(sizeof(Int8Columns) == 256, "the numbers behind it start at a cache line");

// Longest depth at which int32_t holds every sum of products of 0 to 255 and -127 to 127. Deeper weights have no int8 form.
constexpr int64_t kInt8Depth = INT32_MAX / (255 * 127);

// First 64 bytes of a packed FFN. Panels of w_in (N = m, K = C) follow at once, then the output panels (N = C), in which
// w_out (K = m) stands on top of w_merged (K = C): one accumulation over [H | Z] gives both terms. A gated FFN has two
// input matrices, w_gate and w_up: a panel has 16 columns of each, a run of kGateRun of the one after a run of the other.
struct PackedFfnHeader {
  char magic[8];  // kPackedFfnMagic or kPackedGatedFfnMagic, version included
  int32_t dtype;  // DType
  int32_t has_merged;
  int64_t channels;  // C
  int64_t active;    // m
  int64_t bytes;     // of the whole buffer
  char reserved[16];
  uint64_t fingerprint;  // of the weights it was made of (fingerprint.h), in every header last
};
static_assert(sizeof(PackedFfnHeader) == 64, "panels start at a cache line");
constexpr char kPackedFfnMagic[8] = {'r', 'v', 'f', 'f', 'n', '0', '0', '1'};
constexpr char kPackedGatedFfnMagic[8] = {'r', 'v', 'g', 'f', 'n', '0', '0', '1'};
constexpr char kPackedInt8FfnMagic[8] = {'r', 'v', 'f', 'f', '8', '0', '0', '1'};  // in panels of int8_t
constexpr char kPackedInt8GatedFfnMagic[8] = {'r', 'v', 'g', 'f', '8', '0', '0', '1'};

// Columns of w_gate, and then of w_up, that stand side by side: as many as the narrowest vector has lanes, so that every
// level finds gates and their partners in the same tile.
template <class T>
constexpr int kGateRun = 4;
template <>
constexpr int kGateRun<double> = 2;

// ---- Norms in front of a sub-block: z = x, (x - mean) / sqrt(var + eps), x / sqrt(mean(x²) + eps); in the order of NORMS in
// repavit_ops/stack_plan.py, behind none.
enum Norm : int32_t { kNoNorm, kLayerNorm, kRmsNorm, kNorms };

// ---- partial_gelu_ffn, gated_ffn -------------------------------------------------------------------------------------
// x Φ(x) by erf, its approximation by tanh, x sigmoid(1.702 x), and x sigmoid(x): in the order of GATES in
// repavit_ops/stack_plan.py, the first three of GELU_FORMS.
enum Activation : int32_t { kGeluErf, kGeluTanh, kGeluQuick, kSilu, kActivations, kGeluForms = kSilu };

// What both FFNs have: y = H W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x],  z = norm(x).
struct FfnArgs {
  int64_t rows, channels, active;  // M, C, m; any may be 0
  const void* x;                   // [M, C] of T, row r at x + r * x_stride
  int64_t x_stride;                // elements, any value
  const void* packed;              // PackedFfnHeader and panels, of the same T, C and m
  const void* bias;                // [C] of T, or null
  void* y;                         // [M, C] of T, contiguous; every element is written
  double norm_eps;                 // read unless norm is none
  Norm norm;
  bool has_merged;                 // what the header of `packed` says: it is checked once and not read again
  bool residual;                   // add x, in the accumulator's precision
  bool int8;                       // `packed` has panels of int8_t: rows are quantized too (ffn_rows_int8-inl.h)
  Activation activation;
};

// H = gelu(z W_inᵀ + b_in), of one of the first kGeluForms forms.
struct PartialGeluFfnArgs : FfnArgs {
  const void* b_in;  // [m] of T, or null
};

// H = activation(z W_gateᵀ + b_gate) (z W_upᵀ + b_up), elementwise, or its LayerNorm core.
struct GatedFfnArgs : FfnArgs {
  const void *b_gate, *b_up;  // [m] of T, or null
  double inner_norm_eps;      // read when inner_norm
  bool inner_norm;            // H = core(H, inner_norm_eps)
};

// Weights in nn.Linear layout, contiguous: w_in [m, C], w_out [C, m], w_merged [C, C] or null. Of a gated FFN w_in is
// w_gate, w_up [m, C].
struct FfnWeights {
  int64_t channels, active;
  const void* w_in;
  const void* w_up;  // read of a gated FFN
  const void* w_out;
  const void* w_merged;
};

struct FfnMutableWeights {
  void* w_in;
  void* w_up;
  void* w_out;
  void* w_merged;  // null unless the header says has_merged
};

// ---- patch_projection -----------------------------------------------------------------------------------------------
// First 64 bytes of a packed matrix W [N, K]; its panels follow.
struct PackedMatrixHeader {
  char magic[8];  // kPackedMatrixMagic, version included
  int32_t dtype;  // DType
  int32_t reserved0;
  int64_t outputs;  // N
  int64_t depth;    // K
  int64_t bytes;    // of the whole buffer
  char reserved[16];
  uint64_t fingerprint;
};
static_assert(sizeof(PackedMatrixHeader) == 64, "panels start at a cache line");
constexpr char kPackedMatrixMagic[8] = {'r', 'v', 'm', 'a', 't', '0', '0', '1'};

// y = z Wᵀ [+ bias] for every patch of every map, z = the patch's elements or their LayerNorm core. A patch is planes x
// lines runs of consecutive elements: channels x rows x pixels of an image, or rows x channels-last pixels of a map.
struct PatchProjectionArgs {
  int64_t batch, grid[2];     // B; patches down and across; any may be 0
  int64_t planes, lines, run; // K = planes lines run
  int64_t outputs;            // N
  const void* x;              // of T
  int64_t strides[5];         // elements: map, patch down, patch across, plane, line
  const void* packed;         // PackedMatrixHeader and panels, of the same T, N and K
  const void* bias;           // [N] of T, or null
  void* y;                    // [B, grid, N] of T, contiguous; every element is written
  double norm_eps;            // read when normalize
  bool normalize;             // z = core(patch, norm_eps)
};

// ---- token_embedding -------------------------------------------------------------------------------------------------
// Per image the rows of `prefix`, then patches Wᵀ [+ bias]; all [+ position]; of all of them LayerNorm, if asked for.
struct TokenEmbeddingArgs {
  PatchProjectionArgs patches;  // its y: [B, prefix + grid, N], contiguous; at least one patch, N >= 1
  int64_t prefix;               // rows, any may be 0
  const void* prefix_rows;      // [prefix, N] of T
  const void* position;         // [prefix + grid, N] of T, or null
  const void* norm_weight;      // [N] of T; read, as the next two, when normalize
  const void* norm_bias;        // [N] of T
  double norm_eps;
  bool normalize;
};

// ---- pooled_head -----------------------------------------------------------------------------------------------------
// y = z Wᵀ [+ bias] per image, z the mean of tokens [first, first + count), each through LayerNorm if asked for.
struct PooledHeadArgs {
  int64_t batch, tokens, channels, outputs;  // B, T, C, N
  int64_t first, count;                      // 0 <= first, 1 <= count, first + count <= T
  const void* x;                             // [B, T, C] of T, contiguous
  const void* weight;                        // [N, C] of T, contiguous; null: y = z, N = C
  const void* bias;                          // [N] of T, or null
  void* y;                                   // [B, N] of T, contiguous
  const void* norm_weight;                   // [C] of T; read, as the next two, when normalize
  const void* norm_bias;                     // [C] of T
  double norm_eps;
  bool normalize;
};

// ---- rep_attention, window_rep_attention -----------------------------------------------------------------------------
// First 64 bytes of a packed attention block. Per head follow the panels of its [w_q; w_k; w_v] (N = 2 d_qk + d_v,
// K = C), so that one head's product is one run of panels; then those of w_proj (N = C_out, K = h d_v).
struct PackedAttentionHeader {
  char magic[8];  // kPackedAttentionMagic, version included
  int32_t dtype;  // DType
  int32_t heads;  // h
  int64_t channels, d_qk, d_v, channels_out;
  int64_t bytes;  // of the whole buffer
  uint64_t fingerprint;
};
static_assert(sizeof(PackedAttentionHeader) == 64, "panels start at a cache line");
constexpr char kPackedAttentionMagic[8] = {'r', 'v', 'a', 't', 't', '0', '0', '1'};
constexpr char kPackedInt8AttentionMagic[8] = {'r', 'v', 'a', 't', '8', '0', '0', '1'};  // in panels of int8_t

struct AttentionShape {
  int64_t channels, channels_out, heads, d_qk, d_v;  // C, C_out, h; all but the channels >= 1
};

// Weights in nn.Linear layout, contiguous: w_qkv [h d_qk + h d_qk + h d_v, C], w_proj [C_out, h d_v].
struct AttentionWeights {
  AttentionShape shape;
  const void* w_qkv;
  const void* w_proj;
};

struct AttentionMutableWeights {
  void* w_qkv;
  void* w_proj;
};

// Attention within (shifted) windows of a map. Index 0 is the vertical direction, 1 the horizontal.
struct WindowGrid {
  int64_t map[2];       // H, W; H W is the number of tokens
  int64_t window[2];    // >= 1
  int64_t shift[2];     // 0 <= shift < window
  bool roll_first;      // roll the map, then pad it to whole windows; else pad, then roll
  const void* bias;     // [h, N, N] of T, N tokens of a window, added to the scores
  const void* padding;  // k | v of a padded token [h d_qk + h d_v] of T; null: those of a zero row of z (or of qkv)
};

// What happens to queries and keys between their projection and the scores: a norm of each head's row, then rotation by
// its token's place.
struct QueryKeyArgs {
  Norm norm;                    // none: the next three are not read
  double norm_eps;
  const void *q_norm, *k_norm;  // [2, d_qk] of T: weight and bias behind the core
  const void *cos, *sin;        // [B, h, tokens, width] of float (of T: double), or both null: no rotation
  int64_t cos_strides[3];       // elements: image, head, token; 0 where it is broadcast
  int64_t sin_strides[3];
  int64_t tokens;               // of each image, its last; those before are not turned. 0 <= tokens <= T
  int64_t width;                // even, <= d_qk: the first channels of a head, which are turned
  bool interleaved;             // pairs are (0, 1), (2, 3), …; else (0, width / 2), (1, width / 2 + 1), …
};

// y = o W_projᵀ [+ b_proj] [+ x] with o = softmax(scale · q kᵀ + bias) v per head, or its LayerNorm core over all heads,
// q, k, v = z W_qkvᵀ + b_qkv and z = norm(x). Without packed weights only the attention itself: x holds q | k | v, y
// receives o.
struct RepAttentionArgs {
  int64_t batch, tokens;         // B, T; any may be 0
  AttentionShape shape;
  const void* x;                 // [B T, C] of T, row r at x + r * x_stride; [B T, h (2 d_qk + d_v)] without weights
  int64_t x_stride;              // elements, any value
  const void* packed;            // PackedAttentionHeader and panels, of the same T and shape; or null
  const void* b_qkv;             // [h (2 d_qk + d_v)] of T, or null
  const void* b_proj;            // [C_out] of T, or null
  const void* attn_bias;         // [B, h, T, T] of T at these strides, or null; never with windows
  int64_t attn_bias_strides[4];  // elements; 0 where it is broadcast, the last 0 or 1
  QueryKeyArgs qk;               // nothing with windows, or without weights
  const WindowGrid* windows;     // null: every token attends to its whole image
  void* y;                       // [B T, C_out] of T ([B T, h d_v] without weights), contiguous; wholly written
  double scale;
  double norm_eps;               // read unless norm is none
  double inner_norm_eps;         // read when inner_norm
  Norm norm;
  bool inner_norm;               // o = core(o, inner_norm_eps); never with windows, or without weights
  bool residual;                 // add x, in the accumulator's precision
  bool int8;                     // `packed` has panels of int8_t: z and o are quantized too, q, k and v are not
};

// ---- fused_blocks ----------------------------------------------------------------------------------------------------
// One half of a block: exactly one of the three is set. Its x, y, rows and batch are filled in by the stack.
struct StackStep {
  RepAttentionArgs attention;  // packed null: this is an FFN
  PartialGeluFfnArgs ffn;      // packed null: it is a gated one
  GatedFfnArgs gated;
};

// Steps one after the other, each from and to [B, T, C] of T.
struct StackArgs {
  int64_t batch, tokens, channels;  // B, T, C
  const StackStep* steps;
  int64_t count;                    // of steps, >= 1
  const void* x;                    // [B T, C], row r at x + r * x_stride
  int64_t x_stride;                 // elements, any value
  void* y;                          // [B T, C], contiguous
};

// One level's functions; a null entry is a dtype that no level up to this one serves.
struct Kernels {
  void (*partial_gelu_ffn[kDTypes])(const PartialGeluFfnArgs&, const Pool&);
  // Bytes of a packed buffer, for any numbers; kNoSize (checked.h) where they are no sizes of one or it has no size. So a
  // header can be held against the buffer that it stands in.
  int64_t (*partial_gelu_ffn_packed_bytes[kDTypes])(int64_t channels, int64_t active, bool has_merged);
  // destination: packed_bytes of this, 64-byte aligned for speed; every byte is written.
  void (*partial_gelu_ffn_pack[kDTypes])(const FfnWeights&, void* destination, const Pool&);
  void (*partial_gelu_ffn_unpack[kDTypes])(const void* packed, const FfnMutableWeights&, const Pool&);
  // The same in panels of int8_t, from and to weights of each dtype; null for float64.
  int64_t (*partial_gelu_ffn_int8_packed_bytes[kDTypes])(int64_t channels, int64_t active, bool has_merged);
  void (*partial_gelu_ffn_int8_pack[kDTypes])(const FfnWeights&, void* destination, const Pool&);
  void (*partial_gelu_ffn_int8_unpack[kDTypes])(const void* packed, const FfnMutableWeights&, const Pool&);

  void (*gated_ffn[kDTypes])(const GatedFfnArgs&, const Pool&);
  int64_t (*gated_ffn_packed_bytes[kDTypes])(int64_t channels, int64_t active, bool has_merged);  // as above
  void (*gated_ffn_pack[kDTypes])(const FfnWeights&, void* destination, const Pool&);
  void (*gated_ffn_unpack[kDTypes])(const void* packed, const FfnMutableWeights&, const Pool&);

  int64_t (*gated_ffn_int8_packed_bytes[kDTypes])(int64_t channels, int64_t active, bool has_merged);
  void (*gated_ffn_int8_pack[kDTypes])(const FfnWeights&, void* destination, const Pool&);
  void (*gated_ffn_int8_unpack[kDTypes])(const void* packed, const FfnMutableWeights&, const Pool&);

  int64_t (*product_peak[kDTypes])(int64_t iterations, const Pool&);  // see peak-inl.h
  int64_t (*int8_product_peak)(int64_t iterations, const Pool&);

  void (*patch_projection[kDTypes])(const PatchProjectionArgs&, const Pool&);
  int64_t (*matrix_packed_bytes[kDTypes])(int64_t outputs, int64_t depth);
  void (*matrix_pack[kDTypes])(const void* w, int64_t outputs, int64_t depth, void* destination, const Pool&);
  void (*matrix_unpack[kDTypes])(const void* packed, void* w, const Pool&);

  void (*token_embedding[kDTypes])(const TokenEmbeddingArgs&, const Pool&);
  void (*pooled_head[kDTypes])(const PooledHeadArgs&, const Pool&);

  void (*rep_attention[kDTypes])(const RepAttentionArgs&, const Pool&);
  int64_t (*rep_attention_packed_bytes[kDTypes])(const AttentionShape&);
  void (*rep_attention_pack[kDTypes])(const AttentionWeights&, void* destination, const Pool&);  // as for the FFN
  void (*rep_attention_unpack[kDTypes])(const void* packed, const AttentionMutableWeights&, const Pool&);
  int64_t (*rep_attention_int8_packed_bytes[kDTypes])(const AttentionShape&);
  void (*rep_attention_int8_pack[kDTypes])(const AttentionWeights&, void* destination, const Pool&);
  void (*rep_attention_int8_unpack[kDTypes])(const void* packed, const AttentionMutableWeights&, const Pool&);

  void (*fused_blocks[kDTypes])(const StackArgs&, const Pool&);
};

}  // namespace repavit
