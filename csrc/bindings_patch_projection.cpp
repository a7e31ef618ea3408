// Binding of patch_projection and of packing a matrix for the CPU (see bindings_common.h).
#include "bindings_common.h"

namespace {

using namespace repavit_bindings;

repavit::PackedMatrixHeader header_of(const Tensor& packed) {
  return read_header<repavit::PackedMatrixHeader>(packed, repavit::kPackedMatrixMagic, "patch_projection_pack");
}

Tensor patch_projection_pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: got shape ", shape_of(weight), ", wanted [N, K]");
  const DType dtype = dtype_of("weight", weight);
  const repavit::Kernels& kernels = repavit::kernels();
  const int64_t bytes = kernels.matrix_packed_bytes[dtype](weight.size(0), weight.size(1));
  Tensor packed = new_packed(bytes);
  std::vector<Tensor> copies;
  kernels.matrix_pack[dtype](ordered_data(weight, copies), weight.size(0), weight.size(1), packed.mutable_data_ptr(),
                             torch_pool());
  return packed;
}

std::vector<Tensor> patch_projection_unpack(const Tensor& packed) {
  const repavit::PackedMatrixHeader header = header_of(packed);
  const int64_t sizes[2] = {header.outputs, header.depth};
  std::vector<Tensor> weights{new_empty(sizes, 2, aoti_dtype_of(static_cast<DType>(header.dtype)))};
  repavit::kernels().matrix_unpack[header.dtype](packed.const_data_ptr(), weights[0].mutable_data_ptr(), torch_pool());
  return weights;
}

// Packed weight of this call: the one given, if it is of this weight, else a fresh one.
Tensor packed_for(const MaybeTensor& packed, const Tensor& weight) {
  if (!packed) return patch_projection_pack(weight);
  const repavit::PackedMatrixHeader header = header_of(*packed);
  STD_TORCH_CHECK(header.dtype == dtype_of("weight", weight) && header.outputs == weight.size(0) &&
                      header.depth == weight.size(1),
                  "packed: holds [", header.outputs, ", ", header.depth, "], which is not what weight ",
                  shape_of(weight), " says; pack the weight again");
  return *packed;
}

// x itself where pixels (channels last: whole lines of a patch) are consecutive elements, else a contiguous copy.
Tensor with_whole_runs(const Tensor& x, bool channels_last) {
  const bool whole = channels_last ? (x.stride(3) == 1 || x.size(3) == 1) && x.stride(2) == x.size(3)
                                   : x.stride(3) == 1;
  return whole ? x : torch::stable::contiguous(x);
}

Tensor patch_projection(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::vector<int64_t> patch, bool channels_last, std::optional<double> norm_eps) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 2, "x, weight: got shapes ", shape_of(x), ", ", shape_of(weight),
                  ", wanted four dimensions and [N, K]");
  STD_TORCH_CHECK(patch.size() == 2 && patch[0] >= 1 && patch[1] >= 1, "patch: wanted two numbers >= 1");
  const int down = channels_last ? 1 : 2, across = down + 1, channel = channels_last ? 3 : 1;
  const int64_t channels = x.size(channel);
  STD_TORCH_CHECK(weight.size(1) == channels * patch[0] * patch[1], "weight: got shape ", shape_of(weight),
                  ", wanted [N, K = ", channels * patch[0] * patch[1], "] for x of ", channels, " channels");
  check_same_kind("weight", weight, x);
  if (bias) {
    check_shape("bias", *bias, {weight.size(0)});
    check_same_kind("bias", *bias, x);
  }
  const int64_t sizes[4] = {x.size(0), x.size(down) / patch[0], x.size(across) / patch[1], weight.size(0)};
  Tensor y = new_empty(sizes, 4, aoti_dtype_of(x));
  if (y.numel() == 0) return y;

  const Tensor source = with_whole_runs(x, channels_last), weights = packed_for(packed, weight);
  std::vector<Tensor> copies;
  repavit::PatchProjectionArgs args{};
  args.batch = sizes[0];
  args.grid[0] = sizes[1];
  args.grid[1] = sizes[2];
  args.planes = channels_last ? 1 : channels;
  args.lines = patch[0];
  args.run = patch[1] * (channels_last ? channels : 1);
  args.outputs = sizes[3];
  args.x = source.const_data_ptr();
  const int64_t line = source.stride(down), column = source.stride(across);
  const int64_t strides[5] = {source.stride(0), line * patch[0], column * patch[1],
                              channels_last ? 0 : source.stride(1), line};
  for (int i = 0; i < 5; ++i) args.strides[i] = strides[i];
  args.packed = weights.const_data_ptr();
  args.bias = ordered_data(bias, copies);
  args.y = y.mutable_data_ptr();
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  repavit::kernels().patch_projection[dtype_of("x", x)](args, torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("patch_projection", TORCH_BOX(&patch_projection));
  m.impl("patch_projection_pack", TORCH_BOX(&patch_projection_pack));
  m.impl("patch_projection_unpack", TORCH_BOX(&patch_projection_unpack));
}
