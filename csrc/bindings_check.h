// Checks of a binding's arguments, in the words of the Python layer: what came and what was wanted.
//
// Whatever passes them may be read: shapes and dtypes agree, the memory behind a tensor holds all of it, and sizes were
// multiplied only where the product has a size (cpu/checked.h).
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/checked.h"
#include "cpu/dispatch.h"
#include "stable_abi.h"

namespace repavit_bindings {

using repavit::DType;
using repavit::kNoSize;
using repavit::size_product;
using repavit::size_sum;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string text_of(const int64_t* numbers, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "[") + std::to_string(numbers[i]);
  return count == 0 ? "[]" : text + "]";
}

inline std::string shape_of(const Tensor& t) { return text_of(t.sizes().data(), static_cast<size_t>(t.dim())); }

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  int64_t i = 0;
  for (const int64_t size : wanted) same = same && t.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": got shape ", shape_of(t), ", wanted ", text_of(wanted.begin(), wanted.size()));
}

// A storage that was freed or shrunk behind a tensor (untyped_storage().resize_) leaves its shape as it was.
inline void check_memory(const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t held = 0, last = t.storage_offset();  // element that stands last
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  for (int64_t i = 0; i < t.dim(); ++i) last = size_sum(last, size_product(t.size(i) - 1, t.stride(i)));
  const int64_t wanted = size_product(size_sum(last, 1), static_cast<int64_t>(t.element_size()));
  STD_TORCH_CHECK(wanted != kNoSize && wanted <= held, name, ": its storage holds ", held, " bytes, its shape ",
                  shape_of(t), " needs ", wanted, "; it was freed or shrunk by resize_: fill it again first");
}

inline DType dtype_of(const char* name, const Tensor& t) {
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

// The tensor that the others are held against.
inline DType check_input(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": is not on the CPU; move it with .to('cpu')");
  check_memory(name, t);
  return dtype_of(name, t);
}

// Another tensor beside x.
inline void check_same_kind(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": is not on the CPU, but x is; move one with .to(...)");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": got ", torch::headeronly::toString(t.scalar_type()),
                  ", but x is ", torch::headeronly::toString(x.scalar_type()), "; cast one with .to(...)");
  check_memory(name, t);
}

inline void check_norm(const char* name, std::optional<double> eps) {
  STD_TORCH_CHECK(!eps || *eps >= 0.0, name, ": got ", *eps, ", wanted None (no norm) or a number >= 0 such as 1e-6");
}

// A norm as an operator is told it: which it would be, and its eps if there is one.
struct NormArgs {
  repavit::Norm kind;
  std::optional<double> eps;

  repavit::Norm norm() const { return eps ? kind : repavit::kNoNorm; }
  double value() const { return eps.value_or(0.0); }
};

inline NormArgs norm_args(std::optional<double> eps, const std::string& norm) {
  STD_TORCH_CHECK(norm == "layer" || norm == "rms", "norm: got '", norm, "', wanted 'layer' (LayerNorm) or 'rms' (RMSNorm)");
  return {norm == "rms" ? repavit::kRmsNorm : repavit::kLayerNorm, eps};
}

// Whether weights are to be quantized to int8: what `quantize` says, for x of a dtype that has such a form.
inline bool wants_int8(const std::string& quantize) {
  STD_TORCH_CHECK(quantize == "none" || quantize == "int8", "quantize: got '", quantize, "', wanted 'none' or 'int8'");
  return quantize == "int8";
}
inline void check_int8(bool int8, DType dtype, std::initializer_list<int64_t> depths) {
  if (!int8) return;
  STD_TORCH_CHECK(dtype != repavit::kFloat64,
                  "quantize: 'int8' is for float32, bfloat16 and float16, got float64; convert with .float()");
  for (const int64_t depth : depths) {
    STD_TORCH_CHECK(depth <= repavit::kInt8Depth, "quantize: got weights of ", depth, " inputs, wanted at most ",
                    repavit::kInt8Depth, ", whose sums int32 holds; leave these in floats");
  }
}

// The product of some sizes, for an argument that wants one; `what` says of what.
template <class... Sizes>
int64_t checked_product(const char* name, const char* what, Sizes... sizes) {
  const int64_t product = size_product(sizes...);
  const int64_t factors[] = {sizes...};
  STD_TORCH_CHECK(product != kNoSize, name, ": ", what, ", of sizes ", text_of(factors, sizeof...(sizes)),
                  ", are no number of 64 bits");
  return product;
}

}  // namespace repavit_bindings
