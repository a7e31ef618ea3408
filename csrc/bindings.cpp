// Binding of partial_gelu_ffn and of the level in use. The bindings are the only files that see torch (stable ABI, one
// library for every torch >= 2.10): check, allocate, call.
//
// Schemas live in repavit_ops/library.py; these files implement them for the CPU. The Python layer validates first and
// gives better messages; the checks here are the last line of defence for callers of torch.ops.
#include "bindings_packed.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

using namespace repavit_bindings;

// ---- partial_gelu_ffn -----------------------------------------------------------------------------------------------

repavit::PackedFfnHeader header_of(const Tensor& packed) {
  const auto bytes_of = [](const repavit::PackedFfnHeader& h) {
    const bool flag = h.has_merged == 0 || h.has_merged == 1;
    const auto bytes = repavit::kernels().partial_gelu_ffn_packed_bytes[h.dtype];
    return flag ? bytes(h.channels, h.active, h.has_merged != 0) : kNoSize;
  };
  return read_header<repavit::PackedFfnHeader>(packed, repavit::kPackedFfnMagic, "partial_gelu_ffn_pack", bytes_of);
}

// Writes a packed copy of weights that were checked to `to`, which has room for it.
void write_packed(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_merged, void* to) {
  std::vector<Tensor> copies;
  const bool merged = w_merged.has_value() && w_merged->numel() > 0;  // of no channels there is nothing to pack
  const repavit::PartialGeluFfnWeights weights{w_in.size(1), w_in.size(0), ordered_data(w_in, copies),
                                               ordered_data(w_out, copies),
                                               merged ? ordered_data(w_merged, copies) : nullptr};
  repavit::kernels().partial_gelu_ffn_pack[dtype_of("w_in", w_in)](weights, to, torch_pool());
}

Tensor partial_gelu_ffn_pack(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_merged) {
  STD_TORCH_CHECK(w_in.dim() == 2, "w_in: got shape ", shape_of(w_in), ", wanted [m, C]");
  const DType dtype = check_input("w_in", w_in);
  const int64_t active = w_in.size(0), channels = w_in.size(1);
  check_shape("w_out", w_out, {channels, active});
  check_same_kind("w_out", w_out, w_in);
  if (w_merged) {
    check_shape("w_merged", *w_merged, {channels, channels});
    check_same_kind("w_merged", *w_merged, w_in);
  }

  const auto bytes = repavit::kernels().partial_gelu_ffn_packed_bytes[dtype];
  Tensor packed = new_packed("w_in, w_out, w_merged", bytes(channels, active, w_merged.has_value()));
  pack_into(packed, {&w_in, &w_out, pointer(w_merged)}, [&](void* to) { write_packed(w_in, w_out, w_merged, to); });
  return packed;
}

std::vector<Tensor> partial_gelu_ffn_unpack(const Tensor& packed) {
  const repavit::PackedFfnHeader header = header_of(packed);
  const int64_t c = header.channels, m = header.active, merged = header.has_merged ? c : 0;
  const int64_t shapes[3][2] = {{m, c}, {c, m}, {merged, merged}};
  std::vector<Tensor> weights;
  const int32_t dtype = aoti_dtype_of(static_cast<DType>(header.dtype));
  const Reading reading;
  for (const auto& shape : shapes) weights.push_back(new_empty(shape, 2, dtype));
  repavit::kernels().partial_gelu_ffn_unpack[header.dtype](
      packed.const_data_ptr(),
      {weights[0].mutable_data_ptr(), weights[1].mutable_data_ptr(), weights[2].mutable_data_ptr()}, torch_pool());
  return weights;
}

// Packed weights of this call: those given, once they hold these weights, else fresh ones.
Tensor packed_for(Reading& reading, const MaybeTensor& packed, const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                  const MaybeTensor& w_merged) {
  if (!packed) return partial_gelu_ffn_pack(w_in, w_out, w_merged);
  const repavit::PackedFfnHeader header = header_of(*packed);
  const bool merged = w_merged.has_value() && w_merged->numel() > 0;
  STD_TORCH_CHECK(header.dtype == dtype_of("x", x) && header.channels == w_in.size(1) &&
                      header.active == w_in.size(0) && (header.has_merged != 0) == merged,
                  "packed: holds C = ", header.channels, ", m = ", header.active,
                  header.has_merged ? ", w_merged" : ", no w_merged",
                  ", which is not what x, w_in and w_merged say; pack the weights again");
  return up_to_date(reading, *packed, {&w_in, &w_out, pointer(w_merged)},
                    [&](void* to) { write_packed(w_in, w_out, w_merged, to); });
}

}  // namespace

namespace repavit_bindings {

repavit::PartialGeluFfnArgs ffn_args(const Tensor& x, const Tensor& w_in, const MaybeTensor& b_in, const Tensor& w_out,
                                     const MaybeTensor& w_merged, const MaybeTensor& bias, const MaybeTensor& packed,
                                     std::optional<double> norm_eps, bool residual, repavit::GeluForm gelu,
                                     Reading& reading, std::vector<Tensor>& copies) {
  STD_TORCH_CHECK(x.dim() >= 1 && w_in.dim() == 2, "x, w_in: got shapes ", shape_of(x), ", ", shape_of(w_in),
                  ", wanted [..., C] and [m, C]");
  const int64_t active = w_in.size(0), channels = w_in.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == channels, "x: got shape ", shape_of(x), ", wanted [..., ", channels, "]");
  check_input("x", x);  // names x, before another tensor of the same dtype is blamed
  check_norm(norm_eps);
  check_shape("w_out", w_out, {channels, active});
  check_same_kind("w_in", w_in, x);
  check_same_kind("w_out", w_out, x);
  const auto check_optional = [&](const char* name, const MaybeTensor& t, std::initializer_list<int64_t> shape) {
    if (!t) return;
    check_shape(name, *t, shape);
    check_same_kind(name, *t, x);
  };
  check_optional("b_in", b_in, {active});
  check_optional("w_merged", w_merged, {channels, channels});
  check_optional("bias", bias, {channels});
  copies.push_back(packed_for(reading, packed, x, w_in, w_out, w_merged));
  repavit::PartialGeluFfnArgs args{};
  args.channels = channels;
  args.active = active;
  args.has_merged = w_merged.has_value();
  args.packed = copies.back().const_data_ptr();
  args.b_in = ordered_data(b_in, copies);
  args.bias = ordered_data(bias, copies);
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  args.residual = residual;
  args.gelu = gelu;
  return args;
}

}  // namespace repavit_bindings

namespace {

repavit::GeluForm gelu_form(const std::string& approximate) {
  if (approximate == "none") return repavit::kGeluErf;
  if (approximate == "tanh") return repavit::kGeluTanh;
  STD_TORCH_CHECK(approximate == "quick", "approximate: got '", approximate, "', wanted 'none', 'tanh' or 'quick'");
  return repavit::kGeluQuick;
}

Tensor partial_gelu_ffn(const Tensor& x, const Tensor& w_in, const MaybeTensor& b_in, const Tensor& w_out,
                        const MaybeTensor& w_merged, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::optional<double> norm_eps, bool residual, std::string approximate) {
  std::vector<Tensor> copies;
  Reading reading;
  repavit::PartialGeluFfnArgs args = ffn_args(x, w_in, b_in, w_out, w_merged, bias, packed, norm_eps, residual,
                                              gelu_form(approximate), reading, copies);
  Tensor y = new_empty(x.sizes().data(), x.dim(), aoti_dtype_of(x));
  if (x.numel() == 0) return y;
  const RowView rows(x);
  args.rows = rows.rows;
  args.x = rows.owner.const_data_ptr();
  args.x_stride = rows.stride;
  args.y = y.mutable_data_ptr();
  repavit::kernels().partial_gelu_ffn[dtype_of("x", x)](args, torch_pool());
  return y;
}

// Runs products in registers on all threads; returns the operations done. The caller takes the time.
int64_t product_peak(const Tensor& like, int64_t iterations) {
  constexpr int64_t kMost = int64_t{1} << 32;  // a minute or so; nothing interrupts it
  STD_TORCH_CHECK(0 <= iterations && iterations <= kMost, "iterations: got ", iterations, ", wanted 0 to ", kMost);
  return repavit::kernels().product_peak[check_input("like", like)](iterations, torch_pool());
}

int64_t cpu_isa() { return repavit::isa_level(); }

int64_t scratch_bytes() { return static_cast<int64_t>(repavit::arena_bytes()); }

void release_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("partial_gelu_ffn", TORCH_BOX(&partial_gelu_ffn));
  m.impl("partial_gelu_ffn_pack", TORCH_BOX(&partial_gelu_ffn_pack));
  m.impl("partial_gelu_ffn_unpack", TORCH_BOX(&partial_gelu_ffn_unpack));
  m.impl("product_peak", TORCH_BOX(&product_peak));
}

// These take no tensor, so no device chooses them: this key also serves calls without one.
STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("scratch_bytes", TORCH_BOX(&scratch_bytes));
  m.impl("release_freed_memory", TORCH_BOX(&release_freed_memory));
}
