// Exponential of base 2 in fp32: relative error below 1e-7, no table, no division.
#pragma once

#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x, exactly 1 at 0. Below -127 it is 0 (no subnormals), -Inf included; above 128 it is +Inf. A NaN gives 2^-127:
// whoever must show it multiplies by the argument.
REPAVIT_INLINE Simd<float>::V exp2(Simd<float>::V x) {
  using S = Simd<float>;
  const S::V clamped = S::min(S::max(x, S::broadcast(-127.0f)), S::broadcast(128.0f));
  const S::V n = S::round(clamped), f = clamped - n;
  S::V p = S::broadcast(1.326472615e-3f);  // (2^f - 1) / f on [-1/2, 1/2], minimax
  p = S::fma(p, f, S::broadcast(9.671512991e-3f));
  p = S::fma(p, f, S::broadcast(5.550733581e-2f));
  p = S::fma(p, f, S::broadcast(2.402224243e-1f));
  p = S::fma(p, f, S::broadcast(6.931470037e-1f));
  p = S::fma(p, f, S::broadcast(1.0f));
  return p * S::exp2_integer(n);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
