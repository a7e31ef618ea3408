// Bindings of patch_projection, of token_embedding and of packing a matrix for the CPU (see bindings_common.h).
#include "bindings_packed.h"

namespace {

using namespace repavit_bindings;

repavit::PackedMatrixHeader header_of(const Tensor& packed) {
  const auto bytes_of = [](const repavit::PackedMatrixHeader& h) {
    return repavit::kernels().matrix_packed_bytes[h.dtype](h.outputs, h.depth);
  };
  return read_header<repavit::PackedMatrixHeader>(packed, repavit::kPackedMatrixMagic, "patch_projection_pack",
                                                  bytes_of);
}

// Writes a packed copy of a matrix that was checked to `to`, which has room for it.
void write_packed(const Tensor& weight, void* to) {
  std::vector<Tensor> copies;
  repavit::kernels().matrix_pack[dtype_of("weight", weight)](ordered_data(weight, copies), weight.size(0),
                                                             weight.size(1), to, torch_pool());
}

Tensor patch_projection_pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: got shape ", shape_of(weight), ", wanted [N, K]");
  const DType dtype = check_input("weight", weight);
  Tensor packed =
      new_packed("weight", repavit::kernels().matrix_packed_bytes[dtype](weight.size(0), weight.size(1)));
  pack_into(packed, {&weight}, [&](void* to) { write_packed(weight, to); });
  return packed;
}

std::vector<Tensor> patch_projection_unpack(const Tensor& packed) {
  const repavit::PackedMatrixHeader header = header_of(packed);
  const int64_t sizes[2] = {header.outputs, header.depth};
  const Reading reading;
  std::vector<Tensor> weights{new_empty(sizes, 2, aoti_dtype_of(static_cast<DType>(header.dtype)))};
  repavit::kernels().matrix_unpack[header.dtype](packed.const_data_ptr(), weights[0].mutable_data_ptr(), torch_pool());
  return weights;
}

// Packed weight of this call: the one given, once it holds this weight, else a fresh one.
Tensor packed_for(Reading& reading, const MaybeTensor& packed, const Tensor& weight) {
  if (!packed) return patch_projection_pack(weight);
  const repavit::PackedMatrixHeader header = header_of(*packed);
  STD_TORCH_CHECK(header.dtype == dtype_of("weight", weight) && header.outputs == weight.size(0) &&
                      header.depth == weight.size(1),
                  "packed: holds [", header.outputs, ", ", header.depth, "], which is not what weight ",
                  shape_of(weight), " says; pack the weight again");
  return up_to_date(reading, *packed, {&weight}, [&](void* to) { write_packed(weight, to); });
}

// Elements of [rows, columns], which may have dimensions of 1 in front, as parameters have; null where there is no tensor.
const void* checked_rows(const char* name, const MaybeTensor& t, int64_t rows, int64_t columns, const Tensor& x,
                         std::vector<Tensor>& copies) {
  if (!t || t->dim() <= 2) return checked_data(name, t, {rows, columns}, x, copies);
  const int64_t dims = t->dim();
  const bool fits = t->size(dims - 2) == rows && t->size(dims - 1) == columns &&
                    t->numel() == checked_product(name, "its elements", rows, columns);
  STD_TORCH_CHECK(fits, name, ": got shape ", shape_of(*t), ", wanted [", rows, ", ", columns, "]");
  check_same_kind(name, *t, x);
  return ordered_data(*t, copies);
}

// x itself where pixels (channels last: whole lines of a patch) are consecutive elements, else a contiguous copy.
Tensor with_whole_runs(const Tensor& x, bool channels_last) {
  const bool whole = channels_last ? (x.stride(3) == 1 || x.size(3) == 1) && x.stride(2) == x.size(3)
                                   : x.stride(3) == 1;
  return whole ? x : torch::stable::contiguous(x);
}

// One call's arguments but y, and what they point to.
struct Patches {
  repavit::PatchProjectionArgs args{};
  DType dtype;
  Tensor source, weights;
  std::vector<Tensor> copies;
  Reading reading;

  Patches(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
          const std::vector<int64_t>& patch, bool channels_last)
      : dtype(check_input("x", x)) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 2, "x, weight: got shapes ", shape_of(x), ", ", shape_of(weight),
                    ", wanted four dimensions and [N, K]");
    STD_TORCH_CHECK(patch.size() == 2 && patch[0] >= 1 && patch[1] >= 1, "patch: got ",
                    text_of(patch.data(), patch.size()), ", wanted two numbers >= 1");
    const int down = channels_last ? 1 : 2, across = down + 1, channel = channels_last ? 3 : 1;
    const int64_t channels = x.size(channel);
    const int64_t depth = checked_product("patch", "its elements", channels, patch[0], patch[1]);
    STD_TORCH_CHECK(weight.size(1) == depth, "weight: got shape ", shape_of(weight), ", wanted [N, K = ", depth,
                    "] for x of ", channels, " channels and patch ", text_of(patch.data(), 2));
    check_same_kind("weight", weight, x);
    args.bias = checked_data("bias", bias, {weight.size(0)}, x, copies);
    args.batch = x.size(0);
    args.grid[0] = x.size(down) / patch[0];
    args.grid[1] = x.size(across) / patch[1];
    args.planes = channels_last ? 1 : channels;
    args.lines = patch[0];
    args.run = patch[1] * (channels_last ? channels : 1);
    args.outputs = weight.size(0);
    if (results() == 0) return;
    source = with_whole_runs(x, channels_last), weights = packed_for(reading, packed, weight);
    const int64_t line = source.stride(down), column = source.stride(across);
    const int64_t strides[5] = {source.stride(0), line * patch[0], column * patch[1],
                                channels_last ? 0 : source.stride(1), line};
    for (int i = 0; i < 5; ++i) args.strides[i] = strides[i];
    args.x = source.const_data_ptr();
    args.packed = weights.const_data_ptr();
  }

  int64_t patches_each() const { return checked_product("x", "its patches", args.grid[0], args.grid[1]); }
  int64_t results() const {
    return checked_product("x, weight", "their patches and outputs", args.batch, args.grid[0], args.grid[1], args.outputs);
  }
};

}  // namespace

namespace repavit_bindings {

Tensor patch_projection(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::vector<int64_t> patch, bool channels_last, std::optional<double> norm_eps) {
  check_norm("norm_eps", norm_eps);
  Patches patches(x, weight, bias, packed, patch, channels_last);
  repavit::PatchProjectionArgs& args = patches.args;
  const int64_t sizes[4] = {args.batch, args.grid[0], args.grid[1], args.outputs};
  Tensor y = new_empty(sizes, 4, aoti_dtype_of(x));
  if (patches.results() == 0) return y;
  args.y = y.mutable_data_ptr();
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  repavit::kernels().patch_projection[patches.dtype](args, torch_pool());
  return y;
}

Tensor token_embedding(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                       const MaybeTensor& prefix, const MaybeTensor& position, const MaybeTensor& norm_weight,
                       const MaybeTensor& norm_bias, const std::vector<int64_t>& patch, bool as_map,
                       std::optional<double> norm_eps) {
  const Tensor matrix = weight.dim() > 2 ? torch::stable::flatten(weight, 1, -1) : weight;
  Patches patches(x, matrix, bias, packed, patch, false);
  check_norm("norm_eps", norm_eps);
  const int64_t channels = patches.args.outputs, rows = patches.patches_each();
  STD_TORCH_CHECK(rows > 0 && channels > 0, "x, patch: got shape ", shape_of(x), ", which holds no patch of ", patch[0],
                  "x", patch[1]);
  STD_TORCH_CHECK(!(as_map && prefix), "prefix: a map has no rows in front of its patches; ask for tokens");
  repavit::TokenEmbeddingArgs args{patches.args, 0, nullptr, nullptr, nullptr, nullptr, 0.0, false};
  if (prefix) {
    args.prefix = prefix->dim() >= 2 ? prefix->size(prefix->dim() - 2) : 0;
    args.prefix_rows = checked_rows("prefix", prefix, args.prefix, channels, x, patches.copies);
  }
  args.position = checked_rows("position", position, size_sum(args.prefix, rows), channels, x, patches.copies);
  args.norm_weight = checked_data("norm_weight", norm_weight, {channels}, x, patches.copies);
  args.norm_bias = checked_data("norm_bias", norm_bias, {channels}, x, patches.copies);
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  STD_TORCH_CHECK(!args.normalize || (norm_weight && norm_bias), "norm_weight, norm_bias: both are wanted for a norm");
  const int64_t map[4] = {patches.args.batch, patches.args.grid[0], patches.args.grid[1], channels};
  const int64_t tokens[3] = {patches.args.batch, size_sum(args.prefix, rows), channels};
  Tensor y = as_map ? new_empty(map, 4, aoti_dtype_of(x)) : new_empty(tokens, 3, aoti_dtype_of(x));
  args.patches.y = y.mutable_data_ptr();
  repavit::kernels().token_embedding[patches.dtype](args, torch_pool());
  return y;
}

}  // namespace repavit_bindings

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("patch_projection", TORCH_BOX(&patch_projection));
  m.impl("patch_projection_pack", TORCH_BOX(&patch_projection_pack));
  m.impl("patch_projection_unpack", TORCH_BOX(&patch_projection_unpack));
}
