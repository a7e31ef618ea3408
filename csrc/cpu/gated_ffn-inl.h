// y = [core] (act(z W_gateᵀ + b_gate) (z W_upᵀ + b_up)) W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x]: how H is made; all else is in
// ffn_rows-inl.h.
//
// Columns of w_gate and w_up alternate within each panel, in runs of the narrowest vector. So a tile holds gates and what
// they multiply, and H is the first that is written.
#pragma once

#include "ffn_rows_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Store to H: act(gate + b_gate) (up + b_up). Tiles are always whole here, and so are the vectors of H.
template <class T, Activation kForm>
struct GatedToScratch {
  using S = SimdOf<T>;
  using V = typename S::V;
  Operand<T>* h;
  ptrdiff_t stride;
  const T *b_gate, *b_up;  // [hidden] or null
  ptrdiff_t hidden;        // m

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int) const {
    REPAVIT_UNROLL
    for (int i = 0; i < N; i += 2) {
      V gate = acc[i], up = acc[i + 1];
      S::unzip_runs(gate, up);
      const ptrdiff_t at = (col + i * S::kLanes) / 2;
      const ptrdiff_t left = hidden - at;
      const int n = left < S::kLanes ? static_cast<int>(left) : S::kLanes;
      if (b_gate != nullptr) gate += load_bias(b_gate, at, n);
      if (b_up != nullptr) up += load_bias(b_up, at, n);
      S::store(h + row * stride + at, activate<Accumulator<T>, kForm>(gate) * up);
    }
  }
};
template <class T, Activation kForm>
constexpr bool kWholeTiles<GatedToScratch<T, kForm>> = true;
template <class T, Activation kForm>
constexpr bool kFromMemory<GatedToScratch<T, kForm>> = true;

// H of `rows` through its norm.
template <class E>
void inner_norm(const GatedFfnArgs& args, ptrdiff_t rows, E* h, ptrdiff_t stride) {
  const ptrdiff_t active = static_cast<ptrdiff_t>(args.active);
  for (ptrdiff_t r = 0; args.inner_norm && r < rows; ++r) {
    layer_norm_row(h + r * stride, h + r * stride, active, args.inner_norm_eps);
  }
}

// Columns of the first product, gates and what they multiply.
template <class Layout>
ptrdiff_t gated_columns(const Layout& layout) {
  return (layout.active + layout.kHiddenColumns - 1) / layout.kHiddenColumns * kPanelColumns;
}

template <class T>
void gated_ffn_int8(const GatedFfnArgs& args, const Pool& pool) {
  const auto prepare = [&](auto& s) {
    s.template set_bias<T>(0, args.b_gate, static_cast<ptrdiff_t>(args.active));
    s.template set_bias<T>(1, args.b_up, static_cast<ptrdiff_t>(args.active));
  };
  int8_ffn_call<T, FfnKind::kGated>(args, pool, prepare, [](const auto& plan, const auto& z, ptrdiff_t rows, auto& s) {
    const ptrdiff_t active = plan.layout.active, stride = plan.float_stride;
    const auto product = [&](const auto& to_scratch) {
      gemm_int8(&z, 1, rows, plan.panels, plan.layout.in_stride, gated_columns(plan.layout), to_scratch);
    };
    switch (plan.args.activation) {
      case kGeluErf: product(GatedToScratch<float, kGeluErf>{s.h, stride, s.biases[0], s.biases[1], active}); break;
      case kGeluTanh: product(GatedToScratch<float, kGeluTanh>{s.h, stride, s.biases[0], s.biases[1], active}); break;
      case kGeluQuick: product(GatedToScratch<float, kGeluQuick>{s.h, stride, s.biases[0], s.biases[1], active}); break;
      default: product(GatedToScratch<float, kSilu>{s.h, stride, s.biases[0], s.biases[1], active});
    }
    inner_norm(plan.args, rows, s.h, stride);
  });
}

// gated_ffn_<T>: see GatedFfnArgs.
template <class T>
void gated_ffn(const GatedFfnArgs& args, const Pool& pool) {
  if constexpr (kHasInt8<T>) {
    if (args.int8) return gated_ffn_int8<T>(args, pool);
  }
  ffn_call<T, FfnKind::kGated>(args, pool, [](const auto& plan, const Rows<T>& z, ptrdiff_t rows, Operand<T>* h,
                                              PanelRange panels) {
    const GatedFfnArgs& a = plan.args;
    const auto& layout = plan.layout;
    const ptrdiff_t first = panels.first * layout.kHiddenColumns, columns = (panels.last - panels.first) * kPanelColumns;
    const T *b_gate = static_cast<const T*>(a.b_gate), *b_up = static_cast<const T*>(a.b_up);
    if (b_gate != nullptr) b_gate += first;
    if (b_up != nullptr) b_up += first;
    h += first;
    const ptrdiff_t active = layout.active - first, stride = plan.h_stride;
    const auto product = [&](const auto& to_scratch) {
      gemm(&z, 1, rows, plan.panels + panels.first * layout.in_stride, layout.in_stride, columns, to_scratch);
    };
    switch (a.activation) {
      case kGeluErf: product(GatedToScratch<T, kGeluErf>{h, stride, b_gate, b_up, active}); break;
      case kGeluTanh: product(GatedToScratch<T, kGeluTanh>{h, stride, b_gate, b_up, active}); break;
      case kGeluQuick: product(GatedToScratch<T, kGeluQuick>{h, stride, b_gate, b_up, active}); break;
      default: product(GatedToScratch<T, kSilu>{h, stride, b_gate, b_up, active});
    }
    inner_norm(a, rows, h, stride);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
