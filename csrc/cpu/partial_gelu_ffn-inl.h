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

  // A tile goes to scratch with its bias first, and from there through GELU: the constants have the registers then that the
  // sums had. Scratch of narrow numbers would round the sums in between, so there each row goes through GELU at once.
  static constexpr bool kByTiles = IsSame<Operand<T>, Accumulator<T>>::value;

  template <int kRows, int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[kRows][N], int valid) const {
    Operand<T>* out = h + row * stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      const V b = bias_at(col, i, valid);
      REPAVIT_UNROLL
      for (int r = 0; r < kRows; ++r) S::store(out + r * stride + i * S::kLanes, acc[r][i] + b);
    }
    __asm__ volatile("" : : : "memory");  // or the compiler would keep them
    REPAVIT_NO_UNROLL
    for (int r = 0; r < kRows; ++r, out += stride) {
      REPAVIT_UNROLL
      for (int i = 0; i < N; ++i) store_activated(out + i * S::kLanes, S::load(out + i * S::kLanes));
    }
  }

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    Operand<T>* const out = h + row * stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) store_activated(out + i * S::kLanes, acc[i] + bias_at(col, i, valid));
  }

 private:
  REPAVIT_INLINE V bias_at(ptrdiff_t col, int i, int valid) const {
    return bias != nullptr ? load_bias(bias, col + i * S::kLanes, valid - i * S::kLanes) : S::zero();
  }
  static REPAVIT_INLINE void store_activated(Operand<T>* out, V v) { S::store(out, activate<Accumulator<T>, kForm>(v)); }
};

template <class T, Activation kForm>
constexpr bool kTakesTiles<GeluToScratch<T, kForm>> = GeluToScratch<T, kForm>::kByTiles;

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
  ffn_call<T, FfnKind::kPlain>(args, pool, [](const auto& plan, const Rows<T>& z, ptrdiff_t rows, Operand<T>* h) {
    const T* b_in = static_cast<const T*>(plan.args.b_in);
    const auto product = [&](const auto& to_scratch) {
      gemm(&z, 1, rows, plan.panels, plan.layout.in_stride, plan.layout.active, to_scratch);
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
