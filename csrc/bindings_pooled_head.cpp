// Binding of pooled_head for the CPU (see bindings_common.h).
#include "bindings_common.h"

namespace repavit_bindings {

Tensor pooled_head(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                   const MaybeTensor& norm_bias, int64_t first, int64_t count, std::optional<double> norm_eps) {
  STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "x: got shape ", shape_of(x), ", wanted [B, T, C] or [B, H, W, C]");
  const DType dtype = check_input("x", x);
  check_norm("norm_eps", norm_eps);
  repavit::PooledHeadArgs args{};
  args.batch = x.size(0);
  args.channels = x.size(x.dim() - 1);
  args.tokens = x.dim() == 3 ? x.size(1) : checked_product("x", "its tokens", x.size(1), x.size(2));
  const bool begins = 0 <= first && first < args.tokens;
  args.first = first;
  args.count = begins && count == 0 ? args.tokens - first : count;
  STD_TORCH_CHECK(begins && 1 <= args.count && args.count <= args.tokens - first,
                  "first, count: got ", first, " and ", count, " for ", args.tokens,
                  " tokens, wanted a range of them (count 0: the rest)");
  STD_TORCH_CHECK(weight || !bias, "bias: is given without a weight");
  args.outputs = weight && weight->dim() == 2 ? weight->size(0) : args.channels;
  std::vector<Tensor> copies;
  args.x = ordered_data(x, copies);
  args.weight = checked_data("weight", weight, {args.outputs, args.channels}, x, copies);
  if (weight && args.weight == nullptr) args.weight = &args;  // of no elements: never read, but there
  args.bias = checked_data("bias", bias, {args.outputs}, x, copies);
  args.norm_weight = checked_data("norm_weight", norm_weight, {args.channels}, x, copies);
  args.norm_bias = checked_data("norm_bias", norm_bias, {args.channels}, x, copies);
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  STD_TORCH_CHECK(!args.normalize || (norm_weight && norm_bias), "norm_weight, norm_bias: both are wanted for a norm");
  const int64_t sizes[2] = {args.batch, args.outputs};
  Tensor y = new_empty(sizes, 2, aoti_dtype_of(x));
  if (y.numel() == 0) return y;
  args.y = y.mutable_data_ptr();
  repavit::kernels().pooled_head[dtype](args, torch_pool());
  return y;
}

}  // namespace repavit_bindings
