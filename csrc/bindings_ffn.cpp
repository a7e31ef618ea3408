// Binding of partial_gelu_ffn and gated_ffn for the CPU (see bindings_common.h).
#include "bindings_packed.h"

namespace {

using namespace repavit_bindings;

// What the two operators do not share: names for messages, and their functions in the table of kernels.
struct FfnOperator {
  bool gated, int8;
  const char *w_in, *b_in, *weights, *pack_name;
  const char (&magic)[8];
  decltype(&repavit::Kernels::gated_ffn_packed_bytes) packed_bytes;
  decltype(&repavit::Kernels::gated_ffn_pack) pack;
  decltype(&repavit::Kernels::gated_ffn_unpack) unpack;

  int64_t bytes(DType dtype, int64_t channels, int64_t active, bool merged) const {
    const auto size = (repavit::kernels().*packed_bytes)[dtype];
    return size == nullptr ? kNoSize : size(channels, active, merged);
  }
};

const FfnOperator kPlain{false, false, "w_in", "b_in", "w_in, w_out, w_merged", "partial_gelu_ffn_pack", repavit::kPackedFfnMagic,
                         &repavit::Kernels::partial_gelu_ffn_packed_bytes, &repavit::Kernels::partial_gelu_ffn_pack,
                         &repavit::Kernels::partial_gelu_ffn_unpack};
const FfnOperator kPlainInt8{false, true, "w_in", "b_in", "w_in, w_out, w_merged", "partial_gelu_ffn_pack",
                        repavit::kPackedInt8FfnMagic, &repavit::Kernels::partial_gelu_ffn_int8_packed_bytes,
                        &repavit::Kernels::partial_gelu_ffn_int8_pack, &repavit::Kernels::partial_gelu_ffn_int8_unpack};
const FfnOperator kGated{true, false, "w_gate", "b_gate", "w_gate, w_up, w_out, w_merged", "gated_ffn_pack",
                         repavit::kPackedGatedFfnMagic, &repavit::Kernels::gated_ffn_packed_bytes,
                         &repavit::Kernels::gated_ffn_pack, &repavit::Kernels::gated_ffn_unpack};
const FfnOperator kGatedInt8{true, true, "w_gate", "b_gate", "w_gate, w_up, w_out, w_merged", "gated_ffn_pack",
                             repavit::kPackedInt8GatedFfnMagic, &repavit::Kernels::gated_ffn_int8_packed_bytes,
                             &repavit::Kernels::gated_ffn_int8_pack, &repavit::Kernels::gated_ffn_int8_unpack};

const FfnOperator& operator_for(bool gated, bool int8) {
  return gated ? (int8 ? kGatedInt8 : kGated) : (int8 ? kPlainInt8 : kPlain);
}

// ---- Packed weights -------------------------------------------------------------------------------------------------

repavit::PackedFfnHeader header_of(const FfnOperator& ffn, const Tensor& packed) {
  const auto bytes_of = [&ffn](const repavit::PackedFfnHeader& h) {
    const bool flag = h.has_merged == 0 || h.has_merged == 1;
    return flag ? ffn.bytes(static_cast<DType>(h.dtype), h.channels, h.active, h.has_merged != 0) : kNoSize;
  };
  return read_header<repavit::PackedFfnHeader>(packed, ffn.magic, ffn.pack_name, bytes_of);
}

// The matrices of an FFN, w_up null where it is not gated.
struct Matrices {
  const Tensor& w_in;
  const Tensor* w_up;
  const Tensor& w_out;
  const MaybeTensor& w_merged;

  int64_t channels() const { return w_in.size(1); }
  int64_t active() const { return w_in.size(0); }
};

// Writes a packed copy of weights that were checked to `to`, which has room for it.
void write_packed(const FfnOperator& ffn, const Matrices& w, void* to) {
  std::vector<Tensor> copies;
  const bool merged = w.w_merged.has_value() && w.w_merged->numel() > 0;  // of no channels there is nothing to pack
  const repavit::FfnWeights weights{w.channels(), w.active(), ordered_data(w.w_in, copies),
                                    w.w_up != nullptr ? ordered_data(*w.w_up, copies) : nullptr,
                                    ordered_data(w.w_out, copies), merged ? ordered_data(w.w_merged, copies) : nullptr};
  (repavit::kernels().*ffn.pack)[dtype_of(ffn.w_in, w.w_in)](weights, to, torch_pool());
}

Tensor pack(const FfnOperator& ffn, const Matrices& w) {
  STD_TORCH_CHECK(w.w_in.dim() == 2, ffn.w_in, ": got shape ", shape_of(w.w_in), ", wanted [m, C]");
  const DType dtype = check_input(ffn.w_in, w.w_in);
  const int64_t active = w.active(), channels = w.channels();
  check_int8(ffn.int8, dtype, {channels, active});
  if (w.w_up != nullptr) {
    check_shape("w_up", *w.w_up, {active, channels});
    check_same_kind("w_up", *w.w_up, w.w_in);
  }
  check_shape("w_out", w.w_out, {channels, active});
  check_same_kind("w_out", w.w_out, w.w_in);
  if (w.w_merged) {
    check_shape("w_merged", *w.w_merged, {channels, channels});
    check_same_kind("w_merged", *w.w_merged, w.w_in);
  }
  Tensor packed = new_packed(ffn.weights, ffn.bytes(dtype, channels, active, w.w_merged.has_value()));
  pack_into(packed, {&w.w_in, w.w_up, &w.w_out, pointer(w.w_merged)}, [&](void* to) { write_packed(ffn, w, to); });
  return packed;
}

Tensor partial_gelu_ffn_pack(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_merged, std::string quantize) {
  return pack(operator_for(false, wants_int8(quantize)), {w_in, nullptr, w_out, w_merged});
}

Tensor gated_ffn_pack(const Tensor& w_gate, const Tensor& w_up, const Tensor& w_out, const MaybeTensor& w_merged,
                      std::string quantize) {
  return pack(operator_for(true, wants_int8(quantize)), {w_gate, &w_up, w_out, w_merged});
}

std::vector<Tensor> unpack(const FfnOperator& ffn, const Tensor& packed) {
  const repavit::PackedFfnHeader header = header_of(ffn, packed);
  const int64_t c = header.channels, m = header.active, up = ffn.gated ? m : 0, merged = header.has_merged ? c : 0;
  const int64_t shapes[4][2] = {{m, c}, {up, c}, {c, m}, {merged, merged}};
  std::vector<Tensor> weights;
  const int32_t dtype = aoti_dtype_of(static_cast<DType>(header.dtype));
  const Reading reading;
  for (const auto& shape : shapes) weights.push_back(new_empty(shape, 2, dtype));
  (repavit::kernels().*ffn.unpack)[header.dtype](
      packed.const_data_ptr(), {weights[0].mutable_data_ptr(), weights[1].mutable_data_ptr(),
                                weights[2].mutable_data_ptr(), weights[3].mutable_data_ptr()}, torch_pool());
  if (!ffn.gated) weights.erase(weights.begin() + 1);
  return weights;
}

std::vector<Tensor> partial_gelu_ffn_unpack(const Tensor& packed) {
  return unpack(operator_for(false, is_packed_as(packed, kPlainInt8.magic)), packed);
}
std::vector<Tensor> gated_ffn_unpack(const Tensor& packed) {
  return unpack(operator_for(true, is_packed_as(packed, kGatedInt8.magic)), packed);
}

// Packed weights of this call: those given, once they hold these weights, else fresh ones.
Tensor packed_for(const FfnOperator& ffn, Reading& reading, const MaybeTensor& packed, const Tensor& x, const Matrices& w) {
  if (!packed) return pack(ffn, w);
  check_packed_kind(ffn.int8, is_packed_as(*packed, operator_for(ffn.gated, true).magic));
  const repavit::PackedFfnHeader header = header_of(ffn, *packed);
  const bool merged = w.w_merged.has_value() && w.w_merged->numel() > 0;
  STD_TORCH_CHECK(header.dtype == dtype_of("x", x) && header.channels == w.channels() && header.active == w.active() &&
                      (header.has_merged != 0) == merged,
                  "packed: holds C = ", header.channels, ", m = ", header.active,
                  header.has_merged ? ", w_merged" : ", no w_merged", ", which is not what x, ", ffn.w_in,
                  " and w_merged say; pack the weights again");
  return up_to_date(reading, *packed, {&w.w_in, w.w_up, &w.w_out, pointer(w.w_merged)},
                    [&](void* to) { write_packed(ffn, w, to); });
}

// ---- The operators --------------------------------------------------------------------------------------------------

const void* optional_data(const char* name, const MaybeTensor& t, int64_t size, const Tensor& x,
                          std::vector<Tensor>& copies) {
  return checked_data(name, t, {size}, x, copies);
}

// Checks all that both have and fills it in.
void fill(const FfnOperator& ffn, const Tensor& x, const FfnWeightTensors& w, const NormArgs& norm, bool residual,
          repavit::Activation activation, Reading& reading, std::vector<Tensor>& copies, repavit::FfnArgs& args) {
  STD_TORCH_CHECK(x.dim() >= 1 && w.w_in.dim() == 2, "x, ", ffn.w_in, ": got shapes ", shape_of(x), ", ",
                  shape_of(w.w_in), ", wanted [..., C] and [m, C]");
  const int64_t active = w.w_in.size(0), channels = w.w_in.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == channels, "x: got shape ", shape_of(x), ", wanted [..., ", channels, "]");
  check_input("x", x);  // names x, before another tensor of the same dtype is blamed
  check_norm("norm_eps", norm.eps);
  check_shape("w_out", w.w_out, {channels, active});
  check_same_kind(ffn.w_in, w.w_in, x);
  check_same_kind("w_out", w.w_out, x);
  if (w.w_up != nullptr) {
    check_shape("w_up", *w.w_up, {active, channels});
    check_same_kind("w_up", *w.w_up, x);
  }
  if (w.w_merged) {
    check_shape("w_merged", *w.w_merged, {channels, channels});
    check_same_kind("w_merged", *w.w_merged, x);
  }
  args.int8 = w.int8;
  check_int8(w.int8, dtype_of("x", x), {channels, active});
  args.bias = optional_data("bias", w.bias, channels, x, copies);
  copies.push_back(packed_for(ffn, reading, w.packed, x, {w.w_in, w.w_up, w.w_out, w.w_merged}));
  args.packed = copies.back().const_data_ptr();
  args.channels = channels;
  args.active = active;
  args.has_merged = w.w_merged.has_value();
  args.norm_eps = norm.value();
  args.norm = norm.norm();
  args.residual = residual;
  args.activation = activation;
}

}  // namespace

namespace repavit_bindings {

repavit::PartialGeluFfnArgs partial_gelu_ffn_args(const Tensor& x, const FfnWeightTensors& w, const NormArgs& norm,
                                                  bool residual, repavit::Activation gelu, Reading& reading,
                                                  std::vector<Tensor>& copies) {
  repavit::PartialGeluFfnArgs args{};
  fill(operator_for(false, w.int8), x, w, norm, residual, gelu, reading, copies, args);
  args.b_in = optional_data("b_in", w.b_in, args.active, x, copies);
  return args;
}

repavit::GatedFfnArgs gated_ffn_args(const Tensor& x, const FfnWeightTensors& w, const NormArgs& norm,
                                     std::optional<double> inner_norm_eps, bool residual, repavit::Activation activation,
                                     Reading& reading, std::vector<Tensor>& copies) {
  check_norm("inner_norm_eps", inner_norm_eps);
  repavit::GatedFfnArgs args{};
  fill(operator_for(true, w.int8), x, w, norm, residual, activation, reading, copies, args);
  args.b_gate = optional_data("b_gate", w.b_in, args.active, x, copies);
  args.b_up = optional_data("b_up", w.b_up, args.active, x, copies);
  args.inner_norm_eps = inner_norm_eps.value_or(0.0);
  args.inner_norm = inner_norm_eps.has_value();
  return args;
}

}  // namespace repavit_bindings

namespace {

// In the order of repavit::Activation; "none", "tanh" and "quick" are the names that partial_gelu_ffn has for the first.
repavit::Activation gelu_form(const std::string& approximate) {
  if (approximate == "none") return repavit::kGeluErf;
  if (approximate == "tanh") return repavit::kGeluTanh;
  STD_TORCH_CHECK(approximate == "quick", "approximate: got '", approximate, "', wanted 'none', 'tanh' or 'quick'");
  return repavit::kGeluQuick;
}

repavit::Activation activation_form(const std::string& activation) {
  if (activation == "gelu") return repavit::kGeluErf;
  if (activation == "gelu_tanh") return repavit::kGeluTanh;
  if (activation == "gelu_quick") return repavit::kGeluQuick;
  STD_TORCH_CHECK(activation == "silu", "activation: got '", activation,
                  "', wanted 'silu', 'gelu', 'gelu_tanh' or 'gelu_quick'");
  return repavit::kSilu;
}

// Runs args (all but x, y and their sizes filled in) on x.
template <class Args, class Kernel>
Tensor run(Args& args, const Tensor& x, const Kernel& kernels) {
  Tensor y = new_empty(x.sizes().data(), x.dim(), aoti_dtype_of(x));
  if (x.numel() == 0) return y;
  const RowView rows(x);
  args.rows = rows.rows;
  args.x = rows.owner.const_data_ptr();
  args.x_stride = rows.stride;
  args.y = y.mutable_data_ptr();
  kernels[dtype_of("x", x)](args, torch_pool());
  return y;
}

Tensor partial_gelu_ffn(const Tensor& x, const Tensor& w_in, const MaybeTensor& b_in, const Tensor& w_out,
                        const MaybeTensor& w_merged, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::optional<double> norm_eps, bool residual, std::string approximate, std::string norm,
                        std::string quantize) {
  std::vector<Tensor> copies;
  Reading reading;
  const bool int8 = wants_int8(quantize);
  repavit::PartialGeluFfnArgs args =
      partial_gelu_ffn_args(x, {w_in, b_in, nullptr, std::nullopt, w_out, w_merged, bias, packed, int8},
                            norm_args(norm_eps, norm), residual, gelu_form(approximate), reading, copies);
  return run(args, x, kernels_for(int8).partial_gelu_ffn);
}

Tensor gated_ffn(const Tensor& x, const Tensor& w_gate, const MaybeTensor& b_gate, const Tensor& w_up,
                 const MaybeTensor& b_up, const Tensor& w_out, const MaybeTensor& w_merged, const MaybeTensor& bias,
                 const MaybeTensor& packed, std::string activation, std::optional<double> norm_eps,
                 std::optional<double> inner_norm_eps, bool residual, std::string norm, std::string quantize) {
  std::vector<Tensor> copies;
  Reading reading;
  const bool int8 = wants_int8(quantize);
  repavit::GatedFfnArgs args =
      gated_ffn_args(x, {w_gate, b_gate, &w_up, b_up, w_out, w_merged, bias, packed, int8}, norm_args(norm_eps, norm),
                     inner_norm_eps, residual, activation_form(activation), reading, copies);
  return run(args, x, kernels_for(int8).gated_ffn);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("partial_gelu_ffn", TORCH_BOX(&partial_gelu_ffn));
  m.impl("partial_gelu_ffn_pack", TORCH_BOX(&partial_gelu_ffn_pack));
  m.impl("partial_gelu_ffn_unpack", TORCH_BOX(&partial_gelu_ffn_unpack));
  m.impl("gated_ffn", TORCH_BOX(&gated_ffn));
  m.impl("gated_ffn_pack", TORCH_BOX(&gated_ffn_pack));
  m.impl("gated_ffn_unpack", TORCH_BOX(&gated_ffn_unpack));
}
