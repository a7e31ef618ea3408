// Binding of rep_attention and window_rep_attention for the CPU (see bindings_common.h).
//
// Besides the operators of the package, their middle part without weights, for benchmarks and tests: attention_core and
// window_attention_core, as repavit_ops/reference.py defines them.
#include <cmath>

#include "bindings_packed.h"

namespace repavit_bindings {

repavit::AttentionShape attention_shape(const Tensor& w_qkv, const Tensor& w_proj, int64_t heads,
                                        std::optional<int64_t> given_d_qk) {
  STD_TORCH_CHECK(w_qkv.dim() == 2 && w_proj.dim() == 2, "w_qkv, w_proj: got shapes ", shape_of(w_qkv), ", ",
                  shape_of(w_proj), ", wanted matrices");
  STD_TORCH_CHECK(heads >= 1 && heads <= INT32_MAX, "num_heads: got ", heads, ", wanted 1 to ", INT32_MAX);
  STD_TORCH_CHECK(w_proj.size(1) % heads == 0, "w_proj: got shape ", shape_of(w_proj),
                  ", wanted [C_out, num_heads * d_v] for num_heads = ", heads);
  const int64_t d_v = w_proj.size(1) / heads, rows = w_qkv.size(0);
  const int64_t d_qk = given_d_qk ? *given_d_qk : (rows - w_proj.size(1)) / heads / 2;
  const int64_t wanted = size_product(heads, size_sum(size_product(2, d_qk), d_v));
  STD_TORCH_CHECK(d_qk >= 1 && rows == wanted, "w_qkv: got shape ", shape_of(w_qkv),
                  ", wanted [num_heads * (2 * d_qk + d_v), C] for num_heads = ", heads, ", d_qk = ", d_qk,
                  ", d_v = ", d_v);
  return {w_qkv.size(1), w_proj.size(0), heads, d_qk, d_v};
}

}  // namespace repavit_bindings

namespace {

using namespace repavit_bindings;

// ---- Packed weights -------------------------------------------------------------------------------------------------

// The functions of the table for weights in floats, or of int8.
struct Packing {
  decltype(&repavit::Kernels::rep_attention_packed_bytes) packed_bytes;
  decltype(&repavit::Kernels::rep_attention_pack) pack;
  decltype(&repavit::Kernels::rep_attention_unpack) unpack;
  const char (&magic)[8];

  int64_t bytes(DType dtype, const repavit::AttentionShape& shape) const {
    const auto size = (repavit::kernels().*packed_bytes)[dtype];
    return size == nullptr ? kNoSize : size(shape);
  }
};
const Packing kFloats{&repavit::Kernels::rep_attention_packed_bytes, &repavit::Kernels::rep_attention_pack,
                      &repavit::Kernels::rep_attention_unpack, repavit::kPackedAttentionMagic};
const Packing kInt8{&repavit::Kernels::rep_attention_int8_packed_bytes, &repavit::Kernels::rep_attention_int8_pack,
                    &repavit::Kernels::rep_attention_int8_unpack, repavit::kPackedInt8AttentionMagic};
const Packing& packing(bool int8) { return int8 ? kInt8 : kFloats; }

repavit::PackedAttentionHeader header_of(bool int8, const Tensor& packed) {
  const auto bytes_of = [int8](const repavit::PackedAttentionHeader& h) {
    const repavit::AttentionShape shape{h.channels, h.channels_out, h.heads, h.d_qk, h.d_v};
    const bool sizes = h.heads >= 1 && h.d_qk >= 1;
    return sizes ? packing(int8).bytes(static_cast<DType>(h.dtype), shape) : kNoSize;
  };
  return read_header<repavit::PackedAttentionHeader>(packed, packing(int8).magic, "rep_attention_pack", bytes_of);
}

// Writes a packed copy of weights that were checked to `to`, which has room for it.
void write_packed(bool int8, const Tensor& w_qkv, const Tensor& w_proj, const repavit::AttentionShape& shape, void* to) {
  std::vector<Tensor> copies;
  const repavit::AttentionWeights weights{shape, ordered_data(w_qkv, copies), ordered_data(w_proj, copies)};
  (repavit::kernels().*packing(int8).pack)[dtype_of("w_qkv", w_qkv)](weights, to, torch_pool());
}

Tensor pack(bool int8, const Tensor& w_qkv, const Tensor& w_proj, const repavit::AttentionShape& shape) {
  const DType dtype = check_input("w_qkv", w_qkv);
  check_same_kind("w_proj", w_proj, w_qkv);
  check_int8(int8, dtype, {shape.channels, w_proj.size(1)});
  Tensor packed = new_packed("w_qkv, w_proj", packing(int8).bytes(dtype, shape));
  pack_into(packed, {&w_qkv, &w_proj}, [&](void* to) { write_packed(int8, w_qkv, w_proj, shape, to); });
  return packed;
}

Tensor rep_attention_pack(const Tensor& w_qkv, const Tensor& w_proj, int64_t num_heads, int64_t d_qk,
                          std::string quantize) {
  STD_TORCH_CHECK(d_qk >= 1, "d_qk: got ", d_qk, ", wanted at least 1");
  return pack(wants_int8(quantize), w_qkv, w_proj, attention_shape(w_qkv, w_proj, num_heads, d_qk));
}

std::vector<Tensor> rep_attention_unpack(const Tensor& packed) {
  const bool int8 = is_packed_as(packed, kInt8.magic);
  const repavit::PackedAttentionHeader h = header_of(int8, packed);
  const int64_t rows = size_product(h.heads, size_sum(size_product(2, h.d_qk), h.d_v));
  STD_TORCH_CHECK(rows != kNoSize, "packed: the heads that it says it holds have more rows than 64 bits count");
  const int64_t shapes[2][2] = {{rows, h.channels}, {h.channels_out, checked_product("packed", "its values", h.heads, h.d_v)}};
  std::vector<Tensor> weights;
  const Reading reading;
  for (const auto& shape : shapes) weights.push_back(new_empty(shape, 2, aoti_dtype_of(static_cast<DType>(h.dtype))));
  (repavit::kernels().*packing(int8).unpack)[h.dtype](
      packed.const_data_ptr(), {weights[0].mutable_data_ptr(), weights[1].mutable_data_ptr()}, torch_pool());
  return weights;
}

// Packed weights of this call: those given, once they hold these weights, else fresh ones.
Tensor packed_for(bool int8, Reading& reading, const MaybeTensor& packed, const Tensor& x, const Tensor& w_qkv,
                  const Tensor& w_proj, const repavit::AttentionShape& shape) {
  if (!packed) return pack(int8, w_qkv, w_proj, shape);
  check_packed_kind(int8, is_packed_as(*packed, kInt8.magic));
  const repavit::PackedAttentionHeader h = header_of(int8, *packed);
  STD_TORCH_CHECK(h.dtype == dtype_of("x", x) && h.channels == shape.channels && h.channels_out == shape.channels_out &&
                      h.heads == shape.heads && h.d_qk == shape.d_qk && h.d_v == shape.d_v,
                  "packed: holds C = ", h.channels, ", num_heads = ", h.heads, ", d_qk = ", h.d_qk, ", d_v = ", h.d_v,
                  ", C_out = ", h.channels_out,
                  ", which is not what x, w_qkv and w_proj say; pack the weights again");
  return up_to_date(reading, *packed, {&w_qkv, &w_proj}, [&](void* to) { write_packed(int8, w_qkv, w_proj, shape, to); });
}

// ---- The operators --------------------------------------------------------------------------------------------------

void check_optional(const char* name, const MaybeTensor& t, const Tensor& x, int64_t size) {
  if (!t) return;
  check_shape(name, *t, {size});
  check_same_kind(name, *t, x);
}

}  // namespace

namespace repavit_bindings {

repavit::RepAttentionArgs block_args(const Tensor& x, const Tensor& w_qkv, const MaybeTensor& b_qkv,
                                     const Tensor& w_proj, const MaybeTensor& b_proj, const MaybeTensor& packed,
                                     const repavit::AttentionShape& shape, const NormArgs& norm, bool residual, bool int8,
                                     Reading& reading, std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(x.size(x.dim() - 1) == shape.channels, "x: got shape ", shape_of(x), ", wanted [..., ",
                  shape.channels, "]");
  check_input("x", x);  // names x, before another tensor of the same dtype is blamed
  check_norm("norm_eps", norm.eps);
  check_same_kind("w_qkv", w_qkv, x);
  check_same_kind("w_proj", w_proj, x);
  check_optional("b_qkv", b_qkv, x, w_qkv.size(0));
  check_optional("b_proj", b_proj, x, shape.channels_out);
  STD_TORCH_CHECK(!residual || shape.channels == shape.channels_out, "residual: x has ", shape.channels,
                  " channels but w_proj gives ", shape.channels_out, "; they must agree");
  repavit::RepAttentionArgs args{};
  args.shape = shape;
  args.int8 = int8;
  check_int8(int8, dtype_of("x", x), {shape.channels, w_proj.size(1)});
  copies.push_back(packed_for(int8, reading, packed, x, w_qkv, w_proj, shape));
  args.packed = copies.back().const_data_ptr();
  args.b_qkv = ordered_data(b_qkv, copies);
  args.b_proj = ordered_data(b_proj, copies);
  args.norm_eps = norm.value();
  args.norm = norm.norm();
  args.residual = residual;
  return args;
}

repavit::WindowGrid window_grid(const Tensor& x, int64_t num_heads, const std::vector<int64_t>& window,
                                const std::vector<int64_t>& shift, bool roll_first, const Tensor& rel_bias,
                                std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(x.dim() == 4, "x: got shape ", shape_of(x), ", wanted [B, H, W, C]");
  STD_TORCH_CHECK(window.size() == 2 && shift.size() == 2, "window, shift: wanted two numbers each");
  repavit::WindowGrid grid{};
  for (size_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(window[i] >= 1 && 0 <= shift[i] && shift[i] < window[i], "window, shift: got ", window[i], " and ",
                    shift[i], ", wanted 0 <= shift < window");
    grid.map[i] = x.size(static_cast<int64_t>(i) + 1);
    grid.window[i] = window[i];
    grid.shift[i] = shift[i];
  }
  const int64_t tokens = checked_product("window", "its tokens", window[0], window[1]);
  const std::initializer_list<int64_t> table = {num_heads, tokens, tokens};
  STD_TORCH_CHECK(rel_bias.dim() == 3 && rel_bias.size(0) == num_heads && rel_bias.size(1) == tokens &&
                      rel_bias.size(2) == tokens,
                  "rel_bias: got shape ", shape_of(rel_bias), ", wanted ", text_of(table.begin(), 3),
                  " for num_heads = ", num_heads, " and window ", text_of(window.data(), 2));
  check_same_kind("rel_bias", rel_bias, x);
  grid.bias = ordered_data(rel_bias, copies);
  grid.roll_first = roll_first;
  return grid;
}

}  // namespace repavit_bindings

namespace {

// Weights without channels and heads without values take no memory and may be of any size; q, k and v of them do. Up to
// here no stride or size of scratch is beyond 64 bits; far below it the allocator says what it has not.
void check_scratch(const repavit::RepAttentionArgs& args, int64_t rows) {
  constexpr int64_t kMost = int64_t{1} << 48;  // elements
  const repavit::AttentionShape& shape = args.shape;
  const int64_t width = size_product(shape.heads, size_sum(size_product(2, shape.d_qk), shape.d_v));
  const int64_t window = args.windows == nullptr ? 0 : size_product(args.windows->window[0], args.windows->window[1]);
  const int64_t elements = size_product(size_sum(rows, window), width);
  STD_TORCH_CHECK(elements != kNoSize && elements <= kMost, "w_qkv: q, k and v of ", rows, " tokens, ", width,
                  " numbers each, are more than any memory holds");
}

// Runs args (all but x, y and their sizes filled in) on tokens x [B, ..., columns] → [B, ..., columns_out].
Tensor run(repavit::RepAttentionArgs& args, const Tensor& x, int64_t columns_out) {
  const auto kernel = kernels_for(args.int8).rep_attention[check_input("x", x)];
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns_out;
  Tensor y = new_empty(sizes.data(), x.dim(), aoti_dtype_of(x));
  if (y.numel() == 0) return y;
  const RowView rows(x);
  check_scratch(args, rows.rows);
  args.batch = x.size(0);
  args.tokens = rows.rows / args.batch;
  args.x = rows.owner.const_data_ptr();
  args.x_stride = rows.stride;
  args.y = y.mutable_data_ptr();
  kernel(args, torch_pool());
  return y;
}

}  // namespace

namespace repavit_bindings {

namespace {

// attn_bias broadcast to [B, h, T, T]: strides of 0 where it has one element, the last 0 or 1.
void set_attn_bias(const MaybeTensor& attn_bias, const Tensor& x, std::vector<Tensor>& copies,
                   repavit::RepAttentionArgs& args) {
  if (!attn_bias) return;
  check_same_kind("attn_bias", *attn_bias, x);
  const int64_t wanted[4] = {x.size(0), args.shape.heads, x.size(1), x.size(1)};
  Tensor bias = *attn_bias;
  const int64_t missing = 4 - bias.dim();
  bool fits = missing >= 0;
  for (int64_t i = 0; i < bias.dim() && fits; ++i) {
    fits = bias.size(i) == 1 || bias.size(i) == wanted[missing + i];
  }
  STD_TORCH_CHECK(fits, "attn_bias: got shape ", shape_of(bias), ", wanted one that broadcasts to [B, h, T, T] = [",
                  wanted[0], ", ", wanted[1], ", ", wanted[2], ", ", wanted[3], "]");
  const int64_t last = bias.dim() - 1;
  if (last >= 0 && bias.size(last) > 1 && bias.stride(last) > 1) {
    copies.push_back(torch::stable::contiguous(bias));
    bias = copies.back();
  }
  for (int64_t i = 0; i < bias.dim(); ++i) {
    args.attn_bias_strides[missing + i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  args.attn_bias = bias.const_data_ptr();
}

// The numbers of a table of 16-bit floats as floats.
Tensor widened(const Tensor& table) {
  const Tensor from = torch::stable::contiguous(table);
  const std::vector<int64_t> sizes(from.sizes().begin(), from.sizes().end());
  Tensor to = new_empty(sizes.data(), from.dim(), aoti_torch_dtype_float32());
  const auto* bits = static_cast<const uint16_t*>(from.const_data_ptr());
  auto* out = static_cast<float*>(to.mutable_data_ptr());
  const bool brain = from.scalar_type() == ScalarType::BFloat16;
  for (int64_t i = 0; i < from.numel(); ++i) {
    // Both are shifted to where a float has its fraction; fp16's exponent is then rebased by a multiplication.
    const uint32_t sign = static_cast<uint32_t>(bits[i] & 0x8000) << 16, rest = bits[i] & 0x7fff;
    const uint32_t wide = rest << (brain ? 16 : 13);
    float magnitude;
    std::memcpy(&magnitude, &wide, sizeof(magnitude));
    if (!brain) magnitude = rest >= 0x7c00 ? (rest > 0x7c00 ? NAN : INFINITY) : magnitude * 0x1p112f;
    out[i] = sign != 0 ? -magnitude : magnitude;
  }
  return to;
}

// A rotary table [tokens, width] or [.., h, tokens, width] broadcast to [B, h, tokens, width]; its strides but the last.
const void* rotary_table(const char* name, const Tensor& given, const Tensor& x, const int64_t (&wanted)[4],
                         std::vector<Tensor>& copies, int64_t (&strides)[3]) {
  const bool wide = given.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double;
  STD_TORCH_CHECK(given.is_cpu() && (wide || given.scalar_type() == x.scalar_type()), name, ": got ",
                  torch::headeronly::toString(given.scalar_type()), ", wanted float32 or the dtype of x, on the CPU");
  check_memory(name, given);
  Tensor table = given;
  const int64_t missing = 4 - table.dim();
  bool fits = missing >= 0 && missing <= 2;
  for (int64_t i = 0; i < table.dim() && fits; ++i) {
    const bool broadcasts = missing + i < 2 && table.size(i) == 1;
    fits = broadcasts || table.size(i) == wanted[missing + i];
  }
  STD_TORCH_CHECK(fits, name, ": got shape ", shape_of(given), ", wanted one that broadcasts to [B, h, tokens, width] = [",
                  wanted[0], ", ", wanted[1], ", ", wanted[2], ", ", wanted[3], "]");
  const bool narrow = table.element_size() == 2;
  if (narrow || (table.size(table.dim() - 1) > 1 && table.stride(table.dim() - 1) != 1)) {
    copies.push_back(narrow ? widened(table) : torch::stable::contiguous(table));
    table = copies.back();
  }
  for (int64_t i = 0; i + 1 < table.dim(); ++i) strides[missing + i] = table.size(i) == 1 ? 0 : table.stride(i);
  return table.const_data_ptr();
}

}  // namespace

void set_rotary(const MaybeTensor& rotary_cos, const MaybeTensor& rotary_sin, const Tensor& x, std::vector<Tensor>& copies,
                repavit::RepAttentionArgs& args) {
  STD_TORCH_CHECK(rotary_cos.has_value() == rotary_sin.has_value(), rotary_cos ? "rotary_sin" : "rotary_cos",
                  ": is missing beside the other table; both or none are wanted");
  if (!rotary_cos) return;
  const Tensor& cos = *rotary_cos;
  STD_TORCH_CHECK(cos.dim() >= 2, "rotary_cos: got shape ", shape_of(cos), ", wanted [.., tokens, width]");
  repavit::QueryKeyArgs& qk = args.qk;
  qk.tokens = cos.size(cos.dim() - 2);
  qk.width = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(qk.tokens <= x.size(1), "rotary_cos: is for ", qk.tokens, " tokens, x has ", x.size(1));
  STD_TORCH_CHECK(qk.width % 2 == 0 && qk.width <= args.shape.d_qk, "rotary_cos: turns ", qk.width,
                  " channels of a head, wanted an even number up to d_qk = ", args.shape.d_qk);
  const int64_t wanted[4] = {x.size(0), args.shape.heads, qk.tokens, qk.width};
  qk.cos = rotary_table("rotary_cos", cos, x, wanted, copies, qk.cos_strides);
  qk.sin = rotary_table("rotary_sin", *rotary_sin, x, wanted, copies, qk.sin_strides);
  if (qk.tokens == 0 || qk.width == 0) qk.cos = nullptr;
}

void set_extras(const AttentionExtras& e, const Tensor& x, std::vector<Tensor>& copies, repavit::RepAttentionArgs& args) {
  set_attn_bias(e.attn_bias, x, copies, args);
  args.qk.interleaved = e.interleaved;
  set_rotary(e.rotary_cos, e.rotary_sin, x, copies, args);
  check_norm("inner_norm_eps", e.inner_norm_eps);
  args.inner_norm_eps = e.inner_norm_eps.value_or(0.0);
  args.inner_norm = e.inner_norm_eps.has_value();
  check_norm("qk_norm_eps", e.qk_norm_eps);
  const bool normed = e.qk_norm_eps.has_value();
  STD_TORCH_CHECK(e.q_norm.has_value() == normed && e.k_norm.has_value() == normed,
                  "q_norm, k_norm, qk_norm_eps: all or none are wanted");
  if (!normed) return;
  args.qk.norm = e.qk_norm;
  args.qk.norm_eps = *e.qk_norm_eps;
  args.qk.q_norm = checked_data("q_norm", e.q_norm, {2, args.shape.d_qk}, x, copies);
  args.qk.k_norm = checked_data("k_norm", e.k_norm, {2, args.shape.d_qk}, x, copies);
}

}  // namespace repavit_bindings

namespace {

bool is_interleaved(const std::string& layout) {
  STD_TORCH_CHECK(layout == "half" || layout == "interleaved", "rotary_layout: got '", layout,
                  "', wanted 'half' or 'interleaved'");
  return layout == "interleaved";
}

Tensor rep_attention(const Tensor& x, const Tensor& w_qkv, const MaybeTensor& b_qkv, const Tensor& w_proj,
                     const MaybeTensor& b_proj, const MaybeTensor& attn_bias, const MaybeTensor& rotary_cos,
                     const MaybeTensor& rotary_sin, const MaybeTensor& q_norm, const MaybeTensor& k_norm,
                     const MaybeTensor& packed, int64_t num_heads, double scale, int64_t d_qk,
                     std::optional<double> norm_eps, bool residual, std::string norm,
                     std::optional<double> qk_norm_eps, std::string qk_norm, std::string rotary_layout,
                     std::optional<double> inner_norm_eps, std::string quantize) {
  STD_TORCH_CHECK(x.dim() == 3, "x: got shape ", shape_of(x), ", wanted [B, T, C]");
  STD_TORCH_CHECK(d_qk >= 1, "d_qk: got ", d_qk, ", wanted at least 1");
  const repavit::AttentionShape shape = attention_shape(w_qkv, w_proj, num_heads, d_qk);
  std::vector<Tensor> copies;
  Reading reading;
  repavit::RepAttentionArgs args =
      block_args(x, w_qkv, b_qkv, w_proj, b_proj, packed, shape, norm_args(norm_eps, norm), residual, wants_int8(quantize),
                 reading, copies);
  args.scale = scale;
  set_extras({attn_bias, rotary_cos, rotary_sin, q_norm, k_norm, qk_norm_eps, norm_args({}, qk_norm).kind,
              is_interleaved(rotary_layout), inner_norm_eps}, x, copies, args);
  return run(args, x, shape.channels_out);
}

Tensor window_rep_attention(const Tensor& x, const Tensor& w_qkv, const MaybeTensor& b_qkv, const Tensor& w_proj,
                            const MaybeTensor& b_proj, const Tensor& rel_bias, const MaybeTensor& pad_kv,
                            const MaybeTensor& packed, int64_t num_heads, double scale, std::vector<int64_t> window,
                            std::vector<int64_t> shift, std::optional<double> norm_eps, bool residual,
                            bool roll_first, std::string norm, std::string quantize) {
  const repavit::AttentionShape shape = attention_shape(w_qkv, w_proj, num_heads, std::nullopt);
  std::vector<Tensor> copies;
  repavit::WindowGrid grid = window_grid(x, num_heads, window, shift, roll_first, rel_bias, copies);
  Reading reading;
  repavit::RepAttentionArgs args =
      block_args(x, w_qkv, b_qkv, w_proj, b_proj, packed, shape, norm_args(norm_eps, norm), residual, wants_int8(quantize),
                 reading, copies);
  check_optional("pad_kv", pad_kv, x, padding_elements(shape));
  grid.padding = ordered_data(pad_kv, copies);
  args.windows = &grid;
  args.scale = scale;
  return run(args, x, shape.channels_out);
}

// ---- Without weights ------------------------------------------------------------------------------------------------

repavit::RepAttentionArgs core_args(const Tensor& qkv, int64_t heads, int64_t d_qk, double scale) {
  const int64_t width = qkv.dim() > 0 ? qkv.size(qkv.dim() - 1) : 0;
  const int64_t keys = size_product(2, heads, d_qk);
  STD_TORCH_CHECK(heads >= 1 && heads <= INT32_MAX && d_qk >= 1 && keys != kNoSize && width % heads == 0 && width >= keys,
                  "qkv: got shape ", shape_of(qkv), ", wanted [..., num_heads * (2 * d_qk + d_v)] for num_heads = ",
                  heads, ", d_qk = ", d_qk);
  repavit::RepAttentionArgs args{};
  args.shape = {width, 0, heads, d_qk, width / heads - 2 * d_qk};
  args.scale = scale;
  return args;
}

Tensor attention_core(const Tensor& qkv, const MaybeTensor& bias, int64_t num_heads, int64_t d_qk, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 3, "qkv: got shape ", shape_of(qkv), ", wanted [B, T, q | k | v]");
  repavit::RepAttentionArgs args = core_args(qkv, num_heads, d_qk, scale);
  std::vector<Tensor> copies;
  set_attn_bias(bias, qkv, copies, args);
  return run(args, qkv, num_heads * args.shape.d_v);
}

Tensor window_attention_core(const Tensor& qkv, const Tensor& rel_bias, const MaybeTensor& padding, int64_t num_heads,
                             int64_t d_qk, double scale, std::vector<int64_t> window, std::vector<int64_t> shift,
                             bool roll_first) {
  std::vector<Tensor> copies;
  repavit::WindowGrid grid = window_grid(qkv, num_heads, window, shift, roll_first, rel_bias, copies);
  repavit::RepAttentionArgs args = core_args(qkv, num_heads, d_qk, scale);
  check_optional("padding", padding, qkv, qkv.size(3));
  if (const void* row = ordered_data(padding, copies)) {  // its q is never used
    const size_t q_bytes = static_cast<size_t>(num_heads * d_qk * qkv.element_size());
    grid.padding = static_cast<const char*>(row) + q_bytes;
  }
  args.windows = &grid;
  return run(args, qkv, num_heads * args.shape.d_v);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("rep_attention", TORCH_BOX(&rep_attention));
  m.impl("window_rep_attention", TORCH_BOX(&window_rep_attention));
  m.impl("rep_attention_pack", TORCH_BOX(&rep_attention_pack));
  m.impl("rep_attention_unpack", TORCH_BOX(&rep_attention_unpack));
  m.impl("attention_core", TORCH_BOX(&attention_core));
  m.impl("window_attention_core", TORCH_BOX(&window_attention_core));
}
