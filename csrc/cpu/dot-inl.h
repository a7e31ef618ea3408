// How products of each dtype enter the accumulators: what the left operand is stored as, and one group of k.
//
// Dot<T>, for panels of T, holds
//   Operand                    element type of the left operand: scratch is kept in it, inputs are converted to it
//   kParts                     products per group of kInterleave<T> consecutive k
//   Factor                     a vector of either side
//   left(a, part)              the group at a, spread over all lanes
//   right(b, part)             kLanes columns of the group at b
//   accumulate(acc, l, r)      acc += l * r
//
//   dtype        left     how
//   float        float    FMA
//   double       double   FMA (portable level only)
//   fp16         float    panels converted on load, FMA
//   bf16         float    panels split into even and odd k by a shift and a mask, two FMA
//   bf16, BF16   bf16     vdpbf16ps: both k at once, sums in fp32
#pragma once

#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class T>
struct Dot;
template <class T>
using Operand = typename Dot<T>::Operand;

template <class A, class B>
struct IsSame {
  static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
  static constexpr bool value = true;
};

template <bool kFirst, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

// A number as a type, for lambdas to take.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class E, class T>
struct PlainDot {
  using S = Simd<E>;
  using Operand = E;
  using Factor = typename S::V;
  static constexpr int kParts = 1;
  static REPAVIT_INLINE Factor left(const E* a, int) { return S::broadcast(*a); }
  static REPAVIT_INLINE Factor right(const T* b, int) { return S::load(b); }
  static REPAVIT_INLINE void accumulate(Factor& acc, Factor a, Factor b) { S::accumulate(acc, a, b); }
};

template <>
struct Dot<float> : PlainDot<float, float> {};
template <>
struct Dot<fp16> : PlainDot<float, fp16> {};
#if REPAVIT_ISA_LEVEL == 0
template <>
struct Dot<double> : PlainDot<double, double> {};
#endif

#if REPAVIT_ISA_LEVEL >= 3

template <>
struct Dot<bf16> {
  using Operand = bf16;
  using Factor = __m512bh;
  static constexpr int kParts = 1;
  static REPAVIT_INLINE Factor left(const bf16* a, int) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return (Factor)_mm512_set1_epi32(pair);
  }
  static REPAVIT_INLINE Factor right(const bf16* b, int) { return (Factor)_mm512_loadu_si512(b); }
  static REPAVIT_INLINE void accumulate(__m512& acc, Factor a, Factor b) { REPAVIT_PRODUCT(vdpbf16ps, acc, a, b); }
};

#else

template <>
struct Dot<bf16> : PlainDot<float, bf16> {
  static constexpr int kParts = 2;
  static REPAVIT_INLINE Factor left(const float* a, int part) { return S::broadcast(a[part]); }
  static REPAVIT_INLINE Factor right(const bf16* b, int part) { return part == 0 ? S::load_even(b) : S::load_odd(b); }
};

#endif

}  // namespace REPAVIT_ISA
}  // namespace repavit
