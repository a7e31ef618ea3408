// What the bindings share: tensors without the dispatcher, packed weights, libtorch's threads (checks: bindings_check.h).
#pragma once

#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "bindings_check.h"
#include "cpu/arena.h"

// As in older_libraries.cpp: the wait of gcc 12 is the one of gcc 4.4 under a newer name.
#if defined(__gnu_linux__)
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif

namespace repavit_bindings {

class Reading;  // bindings_packed.h

// The tensor's elements in order, copied into `copies` where they are not so already.
inline const void* ordered_data(const Tensor& t, std::vector<Tensor>& copies) {
  if (t.is_contiguous()) return t.const_data_ptr();
  copies.push_back(torch::stable::contiguous(t));
  return copies.back().const_data_ptr();
}

inline const void* ordered_data(const MaybeTensor& t, std::vector<Tensor>& copies) {
  return t ? ordered_data(*t, copies) : nullptr;
}

// The same once shape and kind are right; null where there is no tensor.
inline const void* checked_data(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> shape,
                                const Tensor& x, std::vector<Tensor>& copies) {
  if (!t) return nullptr;
  check_shape(name, *t, shape);
  check_same_kind(name, *t, x);
  return ordered_data(*t, copies);
}

// Uninitialised and contiguous, straight from the allocator: the dispatcher would cost microseconds.
inline Tensor new_empty(const int64_t* sizes, int64_t dims, int32_t aoti_dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[static_cast<size_t>(i)] = stride;
    stride = size_product(stride, sizes[i] == 0 ? 1 : sizes[i]);
  }
  STD_TORCH_CHECK(stride != kNoSize, "result: no memory holds a tensor of size ",
                  text_of(sizes, static_cast<size_t>(dims)));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), aoti_dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline int32_t aoti_dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline int32_t aoti_dtype_of(DType dtype) {
  const int32_t dtypes[repavit::kDTypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                            aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  return dtypes[dtype];
}

// Memory for packed weights, in huge pages where it fills any. `bytes` is what a layout says, of the weights named.
inline Tensor new_packed(const char* names, int64_t bytes) {
  STD_TORCH_CHECK(bytes != kNoSize, names, ": too large to be packed");
  Tensor packed = new_empty(&bytes, 1, aoti_torch_dtype_uint8());
  repavit::advise_huge_pages(packed.mutable_data_ptr(), static_cast<size_t>(bytes));
  return packed;
}

// First bytes of packed weights, which the operator named `pack` made; raises for anything else. `bytes_of(header)` is what
// a layout of the header's sizes takes: a header may say anything, and is believed where the buffer is as long as that.
template <class Header, class BytesOf>
Header read_header(const Tensor& packed, const char (&magic)[8], const char* pack, const BytesOf& bytes_of) {
  Header header{};
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "packed: wanted a contiguous uint8 tensor on the CPU, as ", pack, " returns");
  check_memory("packed", packed);
  if (packed.numel() >= static_cast<int64_t>(sizeof(header))) {
    std::memcpy(&header, packed.const_data_ptr(), sizeof(header));
  }
  const bool ours = std::memcmp(header.magic, magic, sizeof(header.magic)) == 0;
  STD_TORCH_CHECK(ours && header.dtype >= 0 && header.dtype < repavit::kDTypes && header.bytes == packed.numel() &&
                      bytes_of(header) == packed.numel(),
                  "packed: this is not the result of ", pack, ", but ", packed.numel(), " bytes; pack the weights again");
  return header;
}

// What a range throws is thrown here again, by its words: on its way through the stable ABI it would lose them. (Not as a
// std::exception_ptr, of which gcc 11 and later make symbols that older systems lack.)
inline void run_on_torch_pool(int64_t count, repavit::Pool::Body body, void* context) {
  std::mutex mutex;
  std::string failure;
  bool failed = false, out_of_memory = false;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex);
      failed = true;
      out_of_memory = out_of_memory || dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
      failure = error.what();
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  if (failed) throw std::runtime_error(failure);
}

// The table for a call whose weights are of int8 or not.
inline const repavit::Kernels& kernels_for(bool int8) { return int8 ? repavit::int8_kernels() : repavit::kernels(); }

inline repavit::Pool torch_pool() { return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_pool}; }

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

// ---- Arguments of one operator, all but x, y and their sizes: what a call of its own and a stack of blocks share. They
// check every tensor against x and bring the packed copy up to date; `copies` keeps alive what the result points to.

// bindings_ffn.cpp
struct FfnWeightTensors {  // and biases: of a plain FFN w_in and b_in stand where a gated one has w_gate and b_gate
  const Tensor& w_in;
  const MaybeTensor& b_in;
  const Tensor* w_up;  // null: a plain FFN
  const MaybeTensor& b_up;
  const Tensor& w_out;
  const MaybeTensor &w_merged, &bias, &packed;
  bool int8 = false;
};
repavit::PartialGeluFfnArgs partial_gelu_ffn_args(const Tensor& x, const FfnWeightTensors& weights, const NormArgs& norm,
                                                  bool residual, repavit::Activation gelu, Reading& reading,
                                                  std::vector<Tensor>& copies);
repavit::GatedFfnArgs gated_ffn_args(const Tensor& x, const FfnWeightTensors& weights, const NormArgs& norm,
                                     std::optional<double> inner_norm_eps, bool residual, repavit::Activation activation,
                                     Reading& reading, std::vector<Tensor>& copies);

// bindings_attention.cpp. Head widths from both weights; without a d_qk it is what the rows of w_qkv leave.
repavit::AttentionShape attention_shape(const Tensor& w_qkv, const Tensor& w_proj, int64_t heads,
                                        std::optional<int64_t> d_qk);
inline int64_t padding_elements(const repavit::AttentionShape& shape) {  // k | v of a padded token
  return size_product(shape.heads, size_sum(shape.d_qk, shape.d_v));
}
repavit::RepAttentionArgs block_args(const Tensor& x, const Tensor& w_qkv, const MaybeTensor& b_qkv,
                                     const Tensor& w_proj, const MaybeTensor& b_proj, const MaybeTensor& packed,
                                     const repavit::AttentionShape& shape, const NormArgs& norm, bool residual, bool int8,
                                     Reading& reading, std::vector<Tensor>& copies);
// What may join an attention that has no windows; an eps of none: no such norm.
struct AttentionExtras {
  const MaybeTensor &attn_bias, &rotary_cos, &rotary_sin, &q_norm, &k_norm;
  std::optional<double> qk_norm_eps;
  repavit::Norm qk_norm;
  bool interleaved;
  std::optional<double> inner_norm_eps;
};
void set_rotary(const MaybeTensor& cos, const MaybeTensor& sin, const Tensor& x, std::vector<Tensor>& copies,
                repavit::RepAttentionArgs& args);
void set_extras(const AttentionExtras& extras, const Tensor& x, std::vector<Tensor>& copies,
                repavit::RepAttentionArgs& args);
repavit::WindowGrid window_grid(const Tensor& x, int64_t num_heads, const std::vector<int64_t>& window,
                                const std::vector<int64_t>& shift, bool roll_first, const Tensor& rel_bias,
                                std::vector<Tensor>& copies);

// ---- Whole operators, as a call of its own and fused_blocks make them.

// bindings_patch_projection.cpp
Tensor patch_projection(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                        std::vector<int64_t> patch, bool channels_last, std::optional<double> norm_eps);
Tensor token_embedding(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                       const MaybeTensor& prefix, const MaybeTensor& position, const MaybeTensor& norm_weight,
                       const MaybeTensor& norm_bias, const std::vector<int64_t>& patch, bool as_map,
                       std::optional<double> norm_eps);

// bindings_pooled_head.cpp
Tensor pooled_head(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& norm_weight,
                   const MaybeTensor& norm_bias, int64_t first, int64_t count, std::optional<double> norm_eps);

}  // namespace repavit_bindings
