// The only file that sees torch (stable ABI, one library for every torch >= 2.10): check, allocate, call.
//
// Schemas live in repavit_ops/library.py; this file implements them for the CPU. The Python layer validates first and
// gives better messages; the checks here are the last line of defence for callers of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/dispatch.h"

namespace {

using repavit::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- What every operator shares -------------------------------------------------------------------------------------

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  std::string text;
  for (const int64_t size : wanted) {
    same = same && t.size(i) == size;
    text += (i++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, name, ": got shape ", shape_of(t), ", wanted [", text, "]");
}

void check_same_kind(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": is not on the CPU, but x is; move one with .to(...)");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": got ", torch::headeronly::toString(t.scalar_type()),
                  ", but x is ", torch::headeronly::toString(x.scalar_type()), "; cast one with .to(...)");
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return repavit::kFloat32;
    case ScalarType::BFloat16:
      return repavit::kBFloat16;
    case ScalarType::Half:
      return repavit::kFloat16;
    case ScalarType::Double:
      return repavit::kFloat64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, ": got ", torch::headeronly::toString(t.scalar_type()),
                  ", wanted float32, bfloat16, float16 or float64");
}

// The tensor's elements in order, copied into `copies` where they are not so already.
const void* ordered_data(const Tensor& t, std::vector<Tensor>& copies) {
  if (t.is_contiguous()) return t.const_data_ptr();
  copies.push_back(torch::stable::contiguous(t));
  return copies.back().const_data_ptr();
}

const void* ordered_data(const MaybeTensor& t, std::vector<Tensor>& copies) {
  return t ? ordered_data(*t, copies) : nullptr;
}

// Uninitialised and contiguous, straight from the allocator: the dispatcher would cost microseconds.
Tensor new_empty(const int64_t* sizes, int64_t dims, int32_t aoti_dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[static_cast<size_t>(i)] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), aoti_dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int32_t aoti_dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

void run_on_torch_pool(int64_t count, repavit::Pool::Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

repavit::Pool torch_pool() { return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_pool}; }

// The tensor as rows of its last dimension at one distance from each other: itself where it has that form (contiguous,
// or a slice of channels), else a contiguous copy.
struct RowView {
  Tensor owner;
  int64_t rows = 1;
  int64_t stride = 0;

  explicit RowView(const Tensor& t) : owner(t) {
    const int64_t last = t.dim() - 1;
    for (int64_t i = 0; i < last; ++i) rows *= t.size(i);
    stride = t.size(last);
    if (t.is_contiguous() || rows == 0) return;
    bool uniform = t.size(last) <= 1 || t.stride(last) == 1;
    int64_t inner = 0;  // rows below the dimension at hand
    for (int64_t i = last - 1; i >= 0 && uniform; --i) {
      if (t.size(i) == 1) continue;
      if (inner == 0) {
        stride = t.stride(i);
        inner = 1;
      }
      uniform = t.stride(i) == stride * inner;
      inner *= t.size(i);
    }
    if (uniform) return;
    owner = torch::stable::contiguous(t);
    stride = t.size(last);
  }
};

// ---- partial_gelu_ffn -----------------------------------------------------------------------------------------------

repavit::PackedFfnHeader read_header(const Tensor& packed) {
  repavit::PackedFfnHeader header{};
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "packed: wanted a contiguous uint8 tensor on the CPU, as partial_gelu_ffn_pack returns");
  if (packed.numel() >= static_cast<int64_t>(sizeof(header))) {
    std::memcpy(&header, packed.const_data_ptr(), sizeof(header));
  }
  const bool ours = std::memcmp(header.magic, repavit::kPackedFfnMagic, sizeof(header.magic)) == 0;
  STD_TORCH_CHECK(ours && header.bytes == packed.numel() && header.dtype >= 0 && header.dtype < repavit::kDTypes,
                  "packed: this is not the result of partial_gelu_ffn_pack; pack the weights again");
  return header;
}

Tensor partial_gelu_ffn_pack(const Tensor& w_in, const Tensor& w_out, const MaybeTensor& w_merged) {
  STD_TORCH_CHECK(w_in.dim() == 2, "w_in: got shape ", shape_of(w_in), ", wanted [m, C]");
  const int64_t active = w_in.size(0), channels = w_in.size(1);
  check_shape("w_out", w_out, {channels, active});
  check_same_kind("w_out", w_out, w_in);
  if (w_merged) {
    check_shape("w_merged", *w_merged, {channels, channels});
    check_same_kind("w_merged", *w_merged, w_in);
  }
  const DType dtype = dtype_of("w_in", w_in);

  const repavit::Kernels& kernels = repavit::kernels();
  const int64_t bytes = kernels.partial_gelu_ffn_packed_bytes[dtype](channels, active, w_merged.has_value());
  Tensor packed = new_empty(&bytes, 1, aoti_torch_dtype_uint8());
  repavit::advise_huge_pages(packed.mutable_data_ptr(), static_cast<size_t>(bytes));
  std::vector<Tensor> copies;
  const repavit::PartialGeluFfnWeights weights{channels, active, ordered_data(w_in, copies),
                                               ordered_data(w_out, copies), ordered_data(w_merged, copies)};
  kernels.partial_gelu_ffn_pack[dtype](weights, packed.mutable_data_ptr(), torch_pool());
  return packed;
}

std::vector<Tensor> partial_gelu_ffn_unpack(const Tensor& packed) {
  const repavit::PackedFfnHeader header = read_header(packed);
  const int32_t dtypes[repavit::kDTypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                            aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  const int64_t c = header.channels, m = header.active, merged = header.has_merged ? c : 0;
  const int64_t shapes[3][2] = {{m, c}, {c, m}, {merged, merged}};
  std::vector<Tensor> weights;
  for (const auto& shape : shapes) weights.push_back(new_empty(shape, 2, dtypes[header.dtype]));
  repavit::kernels().partial_gelu_ffn_unpack[header.dtype](
      packed.const_data_ptr(),
      {weights[0].mutable_data_ptr(), weights[1].mutable_data_ptr(), weights[2].mutable_data_ptr()}, torch_pool());
  return weights;
}

// Packed weights of this call: those given, if they are of these weights, else fresh ones.
Tensor packed_for(const MaybeTensor& packed, const Tensor& x, const Tensor& w_in, const Tensor& w_out,
                  const MaybeTensor& w_merged) {
  if (!packed) return partial_gelu_ffn_pack(w_in, w_out, w_merged);
  const repavit::PackedFfnHeader header = read_header(*packed);
  STD_TORCH_CHECK(header.dtype == dtype_of("x", x) && header.channels == w_in.size(1) &&
                      header.active == w_in.size(0) && (header.has_merged != 0) == w_merged.has_value(),
                  "packed: holds C = ", header.channels, ", m = ", header.active,
                  header.has_merged ? ", w_merged" : ", no w_merged",
                  ", which is not what x, w_in and w_merged say; pack the weights again");
  return *packed;
}

Tensor partial_gelu_ffn(const Tensor& x, const Tensor& w_in, const MaybeTensor& b_in, const Tensor& w_out,
                        const MaybeTensor& w_merged, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::optional<double> norm_eps, bool residual, std::string approximate) {
  STD_TORCH_CHECK(x.dim() >= 1 && w_in.dim() == 2, "x, w_in: got shapes ", shape_of(x), ", ", shape_of(w_in),
                  ", wanted [..., C] and [m, C]");
  const int64_t active = w_in.size(0), channels = w_in.size(1);
  const DType dtype = dtype_of("x", x);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == channels, "x: got shape ", shape_of(x), ", wanted [..., ", channels, "]");
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
  STD_TORCH_CHECK(approximate == "none" || approximate == "tanh", "approximate: got '", approximate,
                  "', wanted 'none' or 'tanh'");
  const auto kernel = repavit::kernels().partial_gelu_ffn[dtype];
  STD_TORCH_CHECK(kernel != nullptr, "x: the C++ kernel partial_gelu_ffn has no ",
                  torch::headeronly::toString(x.scalar_type()), " yet; use float32 or backend='reference'");

  Tensor y = new_empty(x.sizes().data(), x.dim(), aoti_dtype_of(x));
  if (x.numel() == 0) return y;
  const RowView rows(x);
  const Tensor weights = packed_for(packed, x, w_in, w_out, w_merged);
  std::vector<Tensor> copies;
  repavit::PartialGeluFfnArgs args{};
  args.rows = rows.rows;
  args.channels = channels;
  args.active = active;
  args.x = rows.owner.const_data_ptr();
  args.x_stride = rows.stride;
  args.packed = weights.const_data_ptr();
  args.b_in = ordered_data(b_in, copies);
  args.bias = ordered_data(bias, copies);
  args.y = y.mutable_data_ptr();
  args.norm_eps = norm_eps.value_or(0.0);
  args.normalize = norm_eps.has_value();
  args.residual = residual;
  args.tanh_gelu = approximate == "tanh";
  kernel(args, torch_pool());
  return y;
}

int64_t cpu_isa() { return repavit::isa_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("partial_gelu_ffn", TORCH_BOX(&partial_gelu_ffn));
  m.impl("partial_gelu_ffn_pack", TORCH_BOX(&partial_gelu_ffn_pack));
  m.impl("partial_gelu_ffn_unpack", TORCH_BOX(&partial_gelu_ffn_unpack));
}

// Takes no tensor, so no device chooses it: this key also serves calls without one.
STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
