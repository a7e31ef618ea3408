// Rows converted as they are, or through LayerNorm, out = (x - mean) / sqrt(var + eps) [· weight + bias], in passes over
// a row that stays in L1. On their way into scratch rows get the core alone: the affine part is in the weights.
#pragma once

#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// visit(v, i, n): vector v holds elements [i, i + n) of the row, lanes from n on are zero.
template <class T, class Visit>
REPAVIT_INLINE void for_each_vector(const T* x, ptrdiff_t columns, const Visit& visit) {
  using S = SimdOf<T>;
  ptrdiff_t i = 0;
  for (; i + S::kLanes <= columns; i += S::kLanes) visit(S::load(x + i), i, S::kLanes);
  if (i < columns) visit(S::load(x + i, static_cast<int>(columns - i)), i, static_cast<int>(columns - i));
}

// The first n lanes; full vectors the fast way.
template <class S, class O>
REPAVIT_INLINE void store_some(O* out, typename S::V v, int n) {
  if (n == S::kLanes) {
    S::store(out, v);
  } else {
    S::store(out, v, n);
  }
}

// One row converted: x [columns] of T → out [columns] of O.
template <class T, class O>
void convert_row(const T* x, O* out, ptrdiff_t columns) {
  using S = SimdOf<T>;
  for_each_vector(x, columns, [&](typename S::V v, ptrdiff_t i, int n)
                                  __attribute__((always_inline)) { store_some<S>(out + i, v, n); });
}

// LayerNorm's core as it is.
template <class S>
struct NoAffine {
  REPAVIT_INLINE typename S::V operator()(typename S::V v, ptrdiff_t, int) const { return v; }
};

// weight and bias [columns] of T.
template <class T>
struct Affine {
  using S = SimdOf<T>;
  const T *weight, *bias;
  REPAVIT_INLINE typename S::V operator()(typename S::V v, ptrdiff_t i, int n) const {
    return n == S::kLanes ? S::fma(v, S::load(weight + i), S::load(bias + i))
                          : S::fma(v, S::load(weight + i, n), S::load(bias + i, n));
  }
};

// One row: x [columns] of T → out [columns] of O; they may be the same.
template <class T, class O, class Finish = NoAffine<SimdOf<T>>>
void layer_norm_row(const T* x, O* out, ptrdiff_t columns, double eps, const Finish& finish = {}) {
  using S = SimdOf<T>;
  using V = typename S::V;
  using E = Accumulator<T>;
  V total = S::zero();
  for_each_vector(x, columns, [&](V v, ptrdiff_t, int) __attribute__((always_inline)) { total += v; });
  const V mean = S::broadcast(S::sum(total) / static_cast<E>(columns));

  V squares = S::zero();
  for_each_vector(x, columns, [&](V v, ptrdiff_t, int n) __attribute__((always_inline)) {
    const V centred = v - mean;
    if (n == S::kLanes) {
      squares = S::fma(centred, centred, squares);
    } else {  // the missing lanes hold -mean: add them apart and leave them out
      E lanes[S::kLanes];
      S::store(lanes, centred);
      squares += S::load(lanes, n) * S::load(lanes, n);
    }
  });
  const E variance = S::sum(squares) / static_cast<E>(columns);
  const V scale = S::broadcast(E{1} / static_cast<E>(__builtin_sqrt(static_cast<double>(variance) + eps)));

  for_each_vector(x, columns, [&](V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_some<S>(out + i, finish((v - mean) * scale, i, n), n);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
