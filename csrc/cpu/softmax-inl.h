// Softmax of score rows in two vector passes: the greatest score, then exponentials and their sum.
//
// Scores are whole vectors of accumulators whose padding is -Inf; any finite number is a score like another. Exponentials
// are stored as the left operand of P V wants them and stay unnormalised: 1 / sum belongs to that product's epilogue. As
// PyTorch has it: a NaN or +Inf score makes the row NaN, and a row wholly -Inf attends to nothing.
#pragma once

#include "exp-inl.h"
#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr double kLog2EExact = 1.4426950408889634074;

// What the scores of keys that do not exist become.
template <class E>
constexpr E kMasked = -static_cast<E>(__builtin_inf());

// 2^x for x <= 0, on an accumulator. -Inf gives 0, NaN stays NaN, below -126 it is 0: subnormal weights would weigh
// nothing and cost an assist per product on some cores. kDegree 5 is good to 8.3e-8, 3 to 8.6e-5.
template <class E, int kDegree>
struct Exp2;

#if REPAVIT_ISA_LEVEL >= 2

// 2^x = 2^floor(x) · P(x - floor(x)): vreduceps and vscalefps know the special values.
template <int kDegree>
struct Exp2<float, kDegree> {
  static_assert(kDegree == 3 || kDegree == 5, "two sets of coefficients, minimax on [0, 1]");
  static REPAVIT_INLINE __m512 of(__m512 x) {
    using S = Simd<float>;
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p;
    if constexpr (kDegree == 3) {
      p = S::fma(S::broadcast(7.706705338e-2f), f, S::broadcast(2.276449788e-1f));
      p = S::fma(p, f, S::broadcast(6.951167892e-1f));
    } else {
      p = S::fma(S::broadcast(1.867130249e-3f), f, S::broadcast(9.017029944e-3f));
      p = S::fma(p, f, S::broadcast(5.579991337e-2f));
      p = S::fma(p, f, S::broadcast(2.401644501e-1f));
      p = S::fma(p, f, S::broadcast(6.931513118e-1f));
    }
    p = S::fma(p, f, S::broadcast(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, S::broadcast(-126.0f), _CMP_NLT_UQ), p, x);
  }
};

#else

template <int kDegree>
struct Exp2<float, kDegree> {
  using S = Simd<float>;
  static REPAVIT_INLINE S::V of(S::V x) {
    return exp2_within(S::max(S::broadcast(-127.0f), x));  // in this order a NaN stays
  }
};

#endif

#if REPAVIT_ISA_LEVEL == 0

template <int kDegree>
struct Exp2<double, kDegree> {
  static REPAVIT_INLINE Simd<double>::V of(Simd<double>::V x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp2(x[i]);
    return x;
  }
};

#endif

constexpr int kSoftmaxUnroll = REPAVIT_ISA_LEVEL >= 2 ? 4 : 2;  // vectors that a loop has sums of

// The greatest of `vectors` vectors of scores, still spread over the lanes; NaN or not where one of them is NaN.
template <class E>
REPAVIT_INLINE typename Simd<E>::V greatest(const E* scores, int vectors) {
  using S = Simd<E>;
  typename S::V most[kSoftmaxUnroll];
  REPAVIT_UNROLL
  for (int u = 0; u < kSoftmaxUnroll; ++u) most[u] = S::broadcast(kMasked<E>);
  int i = 0;
  for (; i + kSoftmaxUnroll <= vectors; i += kSoftmaxUnroll) {
    REPAVIT_UNROLL
    for (int u = 0; u < kSoftmaxUnroll; ++u) most[u] = S::max(S::load(scores + (i + u) * S::kLanes), most[u]);
  }
  for (; i < vectors; ++i) most[0] = S::max(S::load(scores + i * S::kLanes), most[0]);
  REPAVIT_UNROLL
  for (int u = 1; u < kSoftmaxUnroll; ++u) most[0] = S::max(most[0], most[u]);
  return most[0];
}

// One number of each of kLanes rows, whose vectors follow each other.
template <class E, class Op>
REPAVIT_INLINE typename Simd<E>::V across_rows(const E* vectors, const Op& op) {
  using S = Simd<E>;
  typename S::V rows[S::kLanes];
  REPAVIT_UNROLL
  for (int r = 0; r < S::kLanes; ++r) rows[r] = S::load(vectors + r * S::kLanes);
  return S::across(rows, op);
}

// Whether most · factor may be subtracted instead of most. Its rounding changes all weights of a row alike: of a product as
// small as this by 2^-14 of them, which their sum takes out again. That of a mask's least number would be infinite.
constexpr int kLeastProduct = -1024, kMostProduct = 1024;
template <class E>
REPAVIT_INLINE bool may_subtract_product(E product) {
  return E{kLeastProduct} <= product && product <= E{kMostProduct};
}

// weights = 2^((scores - most) · factor) of one row; returns their sum, still spread over the lanes. In place where P is E.
// kFused: as scores · factor - most · factor, in one instruction.
template <bool kFused, class P, class E>
REPAVIT_INLINE typename Simd<E>::V exponentials(const E* scores, P* weights, int vectors, E factor, E most) {
  using S = Simd<E>;
  using V = typename S::V;
  constexpr int kDegree = sizeof(P) == 2 ? 3 : 5;  // a 16-bit weight keeps 8 bits
  const V scale = S::broadcast(factor), shift = S::broadcast(kFused ? -(most * factor) : most);
  V total[kSoftmaxUnroll];
  REPAVIT_UNROLL
  for (int u = 0; u < kSoftmaxUnroll; ++u) total[u] = S::zero();
  const auto one = [&](int i, V& sum) __attribute__((always_inline)) {
    const V score = S::load(scores + i * S::kLanes);
    const V p = Exp2<E, kDegree>::of(kFused ? S::fma(score, scale, shift) : (score - shift) * scale);
    sum += p;
    S::store(weights + i * S::kLanes, p);
  };
  int i = 0;
  for (; i + kSoftmaxUnroll <= vectors; i += kSoftmaxUnroll) {
    REPAVIT_UNROLL
    for (int u = 0; u < kSoftmaxUnroll; ++u) one(i + u, total[u]);
  }
  for (; i < vectors; ++i) one(i, total[0]);
  REPAVIT_UNROLL
  for (int u = 1; u < kSoftmaxUnroll; ++u) total[0] += total[u];
  return total[0];
}

template <class P, class E>
__attribute__((noinline)) void exponentials_apart(const E* scores, P* weights, int vectors, E factor, E most, E* lane_sums) {
  Simd<E>::store(lane_sums, exponentials<false>(scores, weights, vectors, factor, most));
}

// Rows of scores `stride` apart, of weights `weight_stride`: exponentials of each, the sums of its lanes to lane_sums. Not
// inlined, nor what few rows want: the constants take nearly all registers of AVX2.
template <class P, class E>
__attribute__((noinline)) void exponentials_of_rows(ptrdiff_t rows, const E* scores, ptrdiff_t stride, P* weights,
                                                    ptrdiff_t weight_stride, int vectors, E factor, const E* most,
                                                    E* lane_sums) {
  for (; rows > 0; --rows, scores += stride, weights += weight_stride, ++most, lane_sums += Simd<E>::kLanes) {
    if (may_subtract_product(*most * factor)) {
      Simd<E>::store(lane_sums, exponentials<true>(scores, weights, vectors, factor, *most));
    } else {
      exponentials_apart(scores, weights, vectors, factor, *most, lane_sums);
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
