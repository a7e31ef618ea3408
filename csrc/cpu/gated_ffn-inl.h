// y = [core] (act(z W_gateᵀ + b_gate) (z W_upᵀ + b_up)) W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x]: how H is made; all else is in
// ffn_rows-inl.h.
//
// Columns of w_gate and w_up alternate within each panel, in runs of the narrowest vector. So a tile holds gates and what
// they multiply, and H is the first that is written.
#pragma once

#include "ffn_rows-inl.h"

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

// gated_ffn_<T>: see GatedFfnArgs.
template <class T>
void gated_ffn(const GatedFfnArgs& args, const Pool& pool) {
  ffn_call<T, FfnKind::kGated>(args, pool, [](const auto& plan, const Rows<T>& z, ptrdiff_t rows, Operand<T>* h) {
    const GatedFfnArgs& a = plan.args;
    const T *b_gate = static_cast<const T*>(a.b_gate), *b_up = static_cast<const T*>(a.b_up);
    const ptrdiff_t active = plan.layout.active, stride = plan.h_stride;
    const ptrdiff_t columns = (active + plan.layout.kHiddenColumns - 1) / plan.layout.kHiddenColumns * kPanelColumns;
    const auto product = [&](const auto& to_scratch) {
      gemm(&z, 1, rows, plan.panels, plan.layout.in_stride, columns, to_scratch);
    };
    switch (a.activation) {
      case kGeluErf: product(GatedToScratch<T, kGeluErf>{h, stride, b_gate, b_up, active}); break;
      case kGeluTanh: product(GatedToScratch<T, kGeluTanh>{h, stride, b_gate, b_up, active}); break;
      case kGeluQuick: product(GatedToScratch<T, kGeluQuick>{h, stride, b_gate, b_up, active}); break;
      default: product(GatedToScratch<T, kSilu>{h, stride, b_gate, b_up, active});
    }
    if (!a.inner_norm) return;
    for (ptrdiff_t r = 0; r < rows; ++r) layer_norm_row(h + r * stride, h + r * stride, active, a.inner_norm_eps);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
