// The epilogue of a product that is the operator's result: bias and shortcut in the accumulator's precision, one store.
#pragma once

#include "gemm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Store to y: acc [+ bias] [+ x], the columns that exist.
template <class T>
struct BiasResidual {
  using S = SimdOf<T>;
  using V = typename S::V;
  T* y;
  ptrdiff_t y_stride;
  const T* bias;      // [columns] or null
  const T* residual;  // same rows and columns as y, or null
  ptrdiff_t residual_stride;

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    T* out = y + row * y_stride + col;
    const T* shortcut = residual + row * residual_stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      V v = acc[i];
      const int at = i * S::kLanes, n = valid - at;
      if (n >= S::kLanes) {
        if (bias != nullptr) v += S::load(bias + col + at);
        if (residual != nullptr) v += S::load(shortcut + at);
        S::store(out + at, v);
      } else if (n > 0) {
        if (bias != nullptr) v += S::load(bias + col + at, n);
        if (residual != nullptr) v += S::load(shortcut + at, n);
        S::store(out + at, v, n);
      }
    }
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
