// Exponential of base 2 in fp32: relative error below 1e-7, no table, no division.
#pragma once

#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x for x from -127 to 128: exactly 1 at 0, 0 and +Inf at the ends. A NaN stays.
REPAVIT_INLINE Simd<float>::V exp2_within(Simd<float>::V x) {
  using S = Simd<float>;
  using V = S::V;
  // 1.5 * 2^23 leaves no room for fractions, and the last bits of the sum are the exponent of 2^n as floats have it.
  const V magic = S::broadcast(12582912.0f + 127.0f);
  const V shifted = x + magic, f = x - (shifted - magic);
  const V power = (V)((Simd<int32_t>::V)shifted << 23);
  V p = S::broadcast(1.326472615e-3f);  // (2^f - 1) / f on [-1/2, 1/2], minimax
  p = S::fma(p, f, S::broadcast(9.671512991e-3f));
  p = S::fma(p, f, S::broadcast(5.550733581e-2f));
  p = S::fma(p, f, S::broadcast(2.402224243e-1f));
  p = S::fma(p, f, S::broadcast(6.931470037e-1f));
  p = S::fma(p, f, S::broadcast(1.0f));
  return p * power;
}

// 2^x: below -127 it is 0 (no subnormals), -Inf included; above 128 it is +Inf.
REPAVIT_INLINE Simd<float>::V exp2(Simd<float>::V x) {
  using S = Simd<float>;
  return exp2_within(S::min(S::broadcast(128.0f), S::max(S::broadcast(-127.0f), x)));  // in this order a NaN stays
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
