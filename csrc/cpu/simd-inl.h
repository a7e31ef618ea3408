// Thin vector abstraction: Simd<float> at every level, Simd<double> at the portable one.
//
// Compiled once per ISA into namespace repavit::REPAVIT_ISA, which the including .cpp names. Per-ISA files include no
// header with inline functions of its own besides intrinsics: one compiled with -mavx512f could be the copy that the
// linker keeps for everybody.
//
// Simd<E> holds: V (a vector of kLanes E), and static functions
//   zero() broadcast(e)                      load(p) store(p, v)          p: E*, and for float bf16* and fp16*
//   load(p, n) store(p, v, n)                the first n lanes only, 0 <= n <= kLanes; others are zero / untouched
//   load_even(p) load_odd(p)                 elements 0, 2, 4, ... or 1, 3, 5, ... of 2 * kLanes bf16
//   fma(a, b, c) = a*b + c                   fnma(a, b, c) = c - a*b
//   accumulate(acc, a, b)                    acc += a*b in acc's own register (for the GEMM: gcc 12 otherwise overwrites
//                                            a, moves and spills the accumulators, a third of the speed)
//   min(a, b) max(a, b)                      b where either is NaN
//   abs(a)                                   sign cleared, NaN stays NaN
//   select_negative(x, a, b)                 a in lanes whose sign bit is set in x (-0 included), else b
//   round(a)                                 nearest integer, ties to even, |a| < 2^22
//   sum(a) max(a)                            over the lanes
//   across(rows, op)                         lane r: op(a, b) over all lanes of rows[r], in an order that is each row's alike
//   swap_pairs(a)                            lanes 1 0 3 2 ...
//   unzip_runs(a, b)                         of a, b = a0 b0 a1 b1 ..., in runs of kGateRun lanes: a = a0 a1 ..., b = b0 b1 ...
// V is a GCC vector, so + - * / and comparisons work as they are. Conversions to bf16 and fp16 round to nearest even
// and keep NaN; arithmetic is always in E.
#pragma once

#include "kernels.h"

#if !defined(REPAVIT_ISA) || !defined(REPAVIT_ISA_LEVEL)
#error "define REPAVIT_ISA (a namespace) and REPAVIT_ISA_LEVEL (an IsaLevel) before this header"
#endif

#define REPAVIT_INLINE inline __attribute__((always_inline))
#define REPAVIT_UNROLL _Pragma("GCC unroll 32")
#define REPAVIT_NO_UNROLL _Pragma("GCC unroll 1")
// acc += a * b, or a pair of such products, in acc's own register.
#if !defined(REPAVIT_PRODUCT)  // csrc/tests/emulated_avx512.h has it in C++, for compilers that may not emit these
#define REPAVIT_PRODUCT(instruction, acc, a, b) __asm__(#instruction " %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))
#endif

// Whether this level is compiled with products of bytes as one instruction. AVX-VNNI's encoding is known to assemblers from
// binutils 2.36 on: those of gcc 12, whatever the compiler itself is told.
#if REPAVIT_ISA_LEVEL >= 2 || defined(REPAVIT_VEX_PRODUCT)
#define REPAVIT_BYTE_PRODUCTS 1
#elif REPAVIT_ISA_LEVEL == 1 && ((defined(__clang_major__) && __clang_major__ >= 12) || __GNUC__ >= 12)
#define REPAVIT_BYTE_PRODUCTS 1
#else
#define REPAVIT_BYTE_PRODUCTS 0
#endif

// The same in the encoding of AVX2, for an instruction that AVX-512 has too.
#if !defined(REPAVIT_VEX_PRODUCT)  // csrc/tests/emulated_vnni.h has it in C++
#define REPAVIT_VEX_PRODUCT(instruction, acc, a, b) __asm__("%{vex%} " #instruction " %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b))
#endif

namespace repavit {
namespace REPAVIT_ISA {

template <class E>
struct Simd;

// What T is accumulated in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <>
struct AccumulatorOf<int8_t> {
  using type = int32_t;
};
template <>
struct AccumulatorOf<int16_t> {
  using type = int32_t;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;
template <class T>
using SimdOf = Simd<Accumulator<T>>;

}  // namespace REPAVIT_ISA
}  // namespace repavit

#if REPAVIT_ISA_LEVEL >= 2
#include "simd_avx512-inl.h"
#elif REPAVIT_ISA_LEVEL == 1
#include "simd_avx2-inl.h"
#else
#include "simd_portable-inl.h"
#endif

namespace repavit {
namespace REPAVIT_ISA {

// Sums of whole numbers, as many lanes as floats have: zero, broadcast, load, store, and the nearest floats.
template <>
struct Simd<int32_t> {
  using F = Simd<float>;
  typedef int32_t V __attribute__((vector_size(sizeof(F::V))));
  static constexpr int kLanes = F::kLanes;

  static REPAVIT_INLINE V zero() { return V{}; }
  static REPAVIT_INLINE V broadcast(int32_t e) { return V{} + e; }
  static REPAVIT_INLINE V load(const int32_t* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static REPAVIT_INLINE void store(int32_t* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static REPAVIT_INLINE F::V to_float(V v) { return __builtin_convertvector(v, F::V); }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
