// y = gelu(z W_inᵀ + b_in) W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x]: how H is made; all else is in ffn_rows-inl.h.
#pragma once

#include "ffn_rows_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Store to H: gelu(acc + b_in). H has whole panels of columns, so a full vector is always written.
template <class T, Activation kForm>
struct GeluToScratch {
  using S = SimdOf<T>;
  using V = typename S::V;
  Operand<T>* h;
  ptrdiff_t stride;
  const T* bias;  // [columns] or null

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    Operand<T>* const out = h + row * stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      V v = acc[i];
      if (bias != nullptr) v += load_bias(bias, col + i * S::kLanes, valid - i * S::kLanes);
      S::store(out + i * S::kLanes, activate<Accumulator<T>, kForm>(v));
    }
  }
};
template <class T, Activation kForm>
constexpr bool kFromMemory<GeluToScratch<T, kForm>> = true;

template <class T>
void partial_gelu_ffn_int8(const PartialGeluFfnArgs& args, const Pool& pool) {
  const auto prepare = [&](auto& s) { s.template set_bias<T>(0, args.b_in, static_cast<ptrdiff_t>(args.active)); };
  int8_ffn_call<T, FfnKind::kPlain>(args, pool, prepare, [](const auto& plan, const auto& z, ptrdiff_t rows, auto& s) {
    const auto product = [&](const auto& to_scratch) {
      gemm_int8(&z, 1, rows, plan.panels, plan.layout.in_stride, plan.layout.active, to_scratch);
    };
    switch (plan.args.activation) {
      case kGeluTanh: return product(GeluToScratch<float, kGeluTanh>{s.h, plan.float_stride, s.biases[0]});
      case kGeluQuick: return product(GeluToScratch<float, kGeluQuick>{s.h, plan.float_stride, s.biases[0]});
      default: return product(GeluToScratch<float, kGeluErf>{s.h, plan.float_stride, s.biases[0]});
    }
  });
}

// partial_gelu_ffn_<T>: see PartialGeluFfnArgs.
template <class T>
void partial_gelu_ffn(const PartialGeluFfnArgs& args, const Pool& pool) {
  if constexpr (kHasInt8<T>) {
    if (args.int8) return partial_gelu_ffn_int8<T>(args, pool);
  }
  ffn_call<T, FfnKind::kPlain>(args, pool, [](const auto& plan, const Rows<T>& z, ptrdiff_t rows, Operand<T>* h,
                                              PanelRange panels) {
    const auto& layout = plan.layout;
    const ptrdiff_t first = panels.first * kPanelColumns;
    const ptrdiff_t columns = least(layout.active, panels.last * kPanelColumns) - first;
    const T* b_in = static_cast<const T*>(plan.args.b_in);
    if (b_in != nullptr) b_in += first;
    h += first;
    const auto product = [&](const auto& to_scratch) {
      gemm(&z, 1, rows, plan.panels + panels.first * layout.in_stride, layout.in_stride, columns, to_scratch);
    };
    switch (plan.args.activation) {
      case kGeluTanh: return product(GeluToScratch<T, kGeluTanh>{h, plan.h_stride, b_in});
      case kGeluQuick: return product(GeluToScratch<T, kGeluQuick>{h, plan.h_stride, b_in});
      default: return product(GeluToScratch<T, kGeluErf>{h, plan.h_stride, b_in});
    }
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
