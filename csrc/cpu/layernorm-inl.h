// Rows converted as they are, or through LayerNorm, out = (x - mean) / sqrt(var + eps) [· weight + bias], or RMSNorm,
// out = x / sqrt(mean(x²) + eps), in passes over a row that stays in L1. On their way into scratch rows get the core alone: the affine part is in the weights.
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

// Of a row, how many elements float lanes sum before they are added up in double. Vectors of 8 or 16 lanes round no more
// than PyTorch's over a whole row; the portable level has 4, whose sums would be twice or four times as long.
constexpr ptrdiff_t kSummedInLanes = REPAVIT_ISA_LEVEL > 0 ? PTRDIFF_MAX : 64;

// visit(part, columns of the part): a row in parts that are summed in lanes.
template <class T, class Visit>
REPAVIT_INLINE void for_each_part(const T* x, ptrdiff_t columns, const Visit& visit) {
  if constexpr (kSummedInLanes == PTRDIFF_MAX) {
    visit(x, columns);
  } else {
    for (ptrdiff_t i = 0; i < columns; i += kSummedInLanes) {
      visit(x + i, columns - i < kSummedInLanes ? columns - i : kSummedInLanes);
    }
  }
}

// Mean and variance of one row, neither of which is ever a difference of large numbers.
//
// 1. The first element goes off before anything is summed: what is left of an offset is exact (Sterbenz), of a constant
//    row nothing. That alone would not do, since the first element may be an outlier.
// 2. `centre`, the mean so found and rounded, is therefore only where deviations are taken from; `offset`, their own mean,
//    is what it lacks. It is small, so neither it nor the variance Σd²/n - offset² loses digits to it.
template <class T>
struct RowStatistics {
  using S = SimdOf<T>;
  using V = typename S::V;
  using E = Accumulator<T>;
  V centre;
  double offset, variance;  // few numbers: what is rounded here, or overflows, would be so for the whole row

  RowStatistics(const T* x, ptrdiff_t columns) {
    const V first = columns > 0 ? S::broadcast(first_of(x)) : S::zero();
    const double share = 1.0 / static_cast<double>(columns);
    double total = 0.0;
    for_each_part(x, columns, [&](const T* part, ptrdiff_t length) __attribute__((always_inline)) {
      V lanes = S::zero();
      for_each_vector(part, length, [&](V v, ptrdiff_t, int n)
                                        __attribute__((always_inline)) { lanes += difference(v, first, n); });
      total += S::sum(lanes);
    });
    centre = first + S::broadcast(static_cast<E>(total * share));

    double sum = 0.0, squares = 0.0;
    for_each_part(x, columns, [&](const T* part, ptrdiff_t length) __attribute__((always_inline)) {
      V lanes = S::zero(), squared = S::zero();
      for_each_vector(part, length, [&](V v, ptrdiff_t, int n) __attribute__((always_inline)) {
        const V d = difference(v, centre, n);
        lanes += d;
        squared = S::fma(d, d, squared);
      });
      sum += S::sum(lanes);
      squares += S::sum(squared);
    });
    offset = sum * share;
    variance = squares * share - offset * offset;
    if (variance < 0.0) variance = 0.0;  // a NaN stays one
  }

 private:
  static E first_of(const T* x) {
    E lanes[S::kLanes];
    S::store(lanes, S::load(x, 1));
    return lanes[0];
  }
  // a - b in the first n lanes, zero in the rest.
  static REPAVIT_INLINE V difference(V a, V b, int n) {
    if (n == S::kLanes) return a - b;
    E lanes[S::kLanes];
    S::store(lanes, a - b);
    return S::load(lanes, n);
  }
};

// A row whose sums in lanes left the range of floats, once more in double; one that is not finite gives NaN here too.
template <class T, class O, class Finish>
__attribute__((noinline)) void layer_norm_row_in_double(const T* x, O* out, ptrdiff_t columns, double eps,
                                                        const Finish& finish) {
  using S = SimdOf<T>;
  const auto element = [x](ptrdiff_t i) {
    Accumulator<T> lanes[S::kLanes];
    S::store(lanes, S::load(x + i, 1));
    return static_cast<double>(lanes[0]);
  };
  double mean = 0.0, squares = 0.0;
  for (ptrdiff_t i = 0; i < columns; ++i) mean += element(i);
  mean /= static_cast<double>(columns);
  for (ptrdiff_t i = 0; i < columns; ++i) squares += (element(i) - mean) * (element(i) - mean);
  const double factor = 1.0 / __builtin_sqrt(squares / static_cast<double>(columns) + eps);
  for (ptrdiff_t i = 0; i < columns; ++i) {
    const auto core = S::broadcast(static_cast<Accumulator<T>>((element(i) - mean) * factor));
    store_some<S>(out + i, finish(core, i, 1), 1);
  }
}

// One row: x [columns] of T → out [columns] of O; they may be the same.
template <class T, class O, class Finish = NoAffine<SimdOf<T>>>
void layer_norm_row(const T* x, O* out, ptrdiff_t columns, double eps, const Finish& finish = {}) {
  using S = SimdOf<T>;
  using V = typename S::V;
  using E = Accumulator<T>;
  const RowStatistics<T> row(x, columns);
  if (!(row.variance <= __DBL_MAX__ / 4)) return layer_norm_row_in_double<T, O>(x, out, columns, eps, finish);
  const double factor = 1.0 / __builtin_sqrt(row.variance + eps);
  const V scale = S::broadcast(static_cast<E>(factor)), shift = S::broadcast(static_cast<E>(-row.offset * factor));
  for_each_vector(x, columns, [&](V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_some<S>(out + i, finish(S::fma(v - row.centre, scale, shift), i, n), n);
  });
}

// Mean of the squares of a row; in double where floats would not hold it.
template <class T>
double mean_square(const T* x, ptrdiff_t columns) {
  using S = SimdOf<T>;
  using V = typename S::V;
  double squares = 0.0;
  for_each_part(x, columns, [&](const T* part, ptrdiff_t length) __attribute__((always_inline)) {
    V lanes = S::zero();
    for_each_vector(part, length, [&](V v, ptrdiff_t, int) __attribute__((always_inline)) { lanes = S::fma(v, v, lanes); });
    squares += S::sum(lanes);
  });
  if (!(squares <= __DBL_MAX__)) {
    squares = 0.0;
    for (ptrdiff_t i = 0; i < columns; ++i) {
      Accumulator<T> lanes[S::kLanes];
      S::store(lanes, S::load(x + i, 1));
      squares += static_cast<double>(lanes[0]) * static_cast<double>(lanes[0]);
    }
  }
  return squares / static_cast<double>(columns);
}

// One row through RMSNorm's core, as layer_norm_row.
template <class T, class O, class Finish = NoAffine<SimdOf<T>>>
void rms_norm_row(const T* x, O* out, ptrdiff_t columns, double eps, const Finish& finish = {}) {
  using S = SimdOf<T>;
  const auto factor = S::broadcast(static_cast<Accumulator<T>>(1.0 / __builtin_sqrt(mean_square(x, columns) + eps)));
  for_each_vector(x, columns, [&](typename S::V v, ptrdiff_t i, int n)
                                  __attribute__((always_inline)) { store_some<S>(out + i, finish(v * factor, i, n), n); });
}

// One row through the norm in front of a sub-block.
template <class T, class O>
void norm_row(const T* x, O* out, ptrdiff_t columns, Norm norm, double eps) {
  if (norm == kLayerNorm) return layer_norm_row(x, out, columns, eps);
  if (norm == kRmsNorm) return rms_norm_row(x, out, columns, eps);
  convert_row(x, out, columns);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
