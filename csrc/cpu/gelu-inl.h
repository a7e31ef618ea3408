// GELU on registers: x Φ(x) by erf within 1e-7 · max(1, |x|) of the truth, the tanh approximation, and QuickGELU; and SiLU.
//
// As the formula has it: NaN gives NaN, -0 gives -0, +Inf gives +Inf, -Inf gives NaN (-Inf · 0). PyTorch's CPU kernels
// agree in fp64, in tanh and in x * sigmoid(1.702 * x); their vectorised erf turns +Inf into NaN too, which no caller can want.
#pragma once

#include "exp-inl.h"
#include "kernels.h"
#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class E>
struct Gelu;

#if REPAVIT_ISA_LEVEL >= 2

// R(a) = a (1 - Φ(a)) in 16 intervals of width 25/64 centred at multiples of it: column i is the minimax polynomial of
// degree 5 about i * 25/64, lowest power first. Interval 0 has no constant term (gelu(0) is 0 and small x keep their
// relative accuracy); interval 15, beyond 5.66, is zero.
alignas(64) constexpr float kGeluTail[6][16] = {
    {0.0f, 1.359520257e-1f, 1.697873026e-1f, 1.413558125e-1f, 9.232050925e-2f, 4.961404949e-2f, 2.237221971e-2f,
     8.544757962e-3f, 2.778203227e-3f, 7.711879443e-4f, 1.830852852e-4f, 3.721600297e-5f, 6.482003755e-6f,
     9.678535662e-7f, 1.239318408e-7f, 0.0f},
    {4.999999702e-1f, 2.036475986e-1f, -1.237379387e-2f, -1.146563739e-1f, -1.248164773e-1f, -9.028583020e-2f,
     -5.043306574e-2f, -2.282880992e-2f, -8.555527776e-3f, -2.685032086e-3f, -7.104271790e-4f, -1.591592445e-4f,
     -3.028016909e-5f, -4.902316959e-6f, -6.764334444e-7f, 0.0f},
    {-3.989389539e-1f, -3.414319754e-1f, -2.042932510e-1f, -6.291843206e-2f, 2.597267181e-2f, 5.374443531e-2f,
     4.469809309e-2f, 2.599320933e-2f, 1.173525769e-2f, 4.279190674e-3f, 1.285098726e-3f, 3.214163589e-4f,
     6.742421101e-5f, 1.191916454e-5f, 1.781654191e-6f, 0.0f},
    {-9.120142204e-5f, 9.258269519e-2f, 1.297634095e-1f, 1.030019224e-1f, 4.777406901e-2f, 3.574583679e-3f,
     -1.492601447e-2f, -1.503999904e-2f, -9.076156653e-3f, -4.046773072e-3f, -1.421025023e-3f, -4.044885281e-4f,
     -9.481814777e-5f, -1.848384636e-5f, -3.016011988e-6f, 0.0f},
    {6.753674895e-2f, 4.520464689e-2f, 1.396841835e-3f, -3.079117090e-2f, -3.472294658e-2f, -2.011924051e-2f,
     -4.671687260e-3f, 2.906642156e-3f, 3.877106123e-3f, 2.421464305e-3f, 1.059282920e-3f, 3.564069630e-4f,
     9.586875967e-5f, 2.103950283e-5f, 3.813706371e-6f, 0.0f},
    {-5.326550920e-3f, -1.944331825e-2f, -2.211707830e-2f, -9.367558174e-3f, 4.314510152e-3f, 8.986028843e-3f,
     6.110175047e-3f, 1.832335722e-3f, -4.445848172e-4f, -8.348420961e-4f, -5.244078930e-4f, -2.198933798e-4f,
     -6.951372052e-5f, -1.736341073e-5f, -3.510057468e-6f, 0.0f},
};

// gelu(x) = max(x, 0) - R(|x|). The values that this gets wrong are put right by vfixupimm, by class of x:
// NaN → NaN, ±0 → x, -Inf → NaN, +Inf → +Inf, all else stays (4 bits each, in the order of the instruction's table).
REPAVIT_INLINE __m512 gelu_erf(__m512 x) {
  using S = Simd<float>;
  constexpr float kWidth = 25.0f / 64.0f;
  constexpr int kSpecials = 0x00530122;
  const __m512 a = S::min(S::abs(x), S::broadcast(15 * kWidth));
  const __m512 magic = S::broadcast(12582912.0f);  // 1.5 * 2^23: the low bits of the sum are the interval
  const __m512 shifted = S::fma(a, S::broadcast(1.0f / kWidth), magic);
  const __m512 d = S::fnma(shifted - magic, S::broadcast(kWidth), a);
  __m512 r = S::lookup(_mm512_load_ps(kGeluTail[5]), shifted);
  REPAVIT_UNROLL
  for (int i = 4; i >= 0; --i) r = S::fma(r, d, S::lookup(_mm512_load_ps(kGeluTail[i]), shifted));
  const __m512 y = S::max(x, S::zero()) - r;
  return _mm512_fixupimm_ps(y, x, _mm512_set1_epi32(kSpecials), 0);
}

#else

// gelu(x) = x Φ(x) with 1 - Φ(a) = exp(-a²/2) t P(t), t = 1 / (1 + 0.275 a), for a = |x|: the form of Abramowitz and
// Stegun 7.1.26 with one more term, fitted for a least error of a (1 - Φ(a)): 1e-8.
REPAVIT_INLINE Simd<float>::V gelu_erf(Simd<float>::V x) {
  using S = Simd<float>;
  using V = S::V;
  const V a = S::abs(x);
  const V t = S::broadcast(1.0f) / S::fma(a, S::broadcast(0.275f), S::broadcast(1.0f));
  V p = S::broadcast(-1.134432554e-1f);
  p = S::fma(p, t, S::broadcast(4.463739991e-1f));
  p = S::fma(p, t, S::broadcast(-3.221117556e-1f));
  p = S::fma(p, t, S::broadcast(3.269695342e-1f));
  p = S::fma(p, t, S::broadcast(4.482090473e-2f));
  p = S::fma(p, t, S::broadcast(1.173906624e-1f));
  const V exponent = S::max(S::broadcast(-127.0f), x * x * S::broadcast(-0.5f * kLog2E));  // never above 0
  const V tail = exp2_within(exponent) * p * t;
  return x * S::select_negative(x, tail, S::broadcast(1.0f) - tail);
}

#endif

template <>
struct Gelu<float> {
  using V = Simd<float>::V;
  static REPAVIT_INLINE V erf(V x) { return gelu_erf(x); }

  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/π) (x + 0.044715 x³)
  static REPAVIT_INLINE V tanh(V x) {
    using S = Simd<float>;
    constexpr float kScale = -2.0f * 0.7978845608f * kLog2E;
    const V inner = S::fma(x * x, S::broadcast(0.044715f * kScale), S::broadcast(kScale));
    return x / (S::broadcast(1.0f) + exp2(x * inner));
  }

  // x sigmoid(1.702 x) = x / (1 + exp(-1.702 x))
  static REPAVIT_INLINE V quick(V x) {
    using S = Simd<float>;
    return x / (S::broadcast(1.0f) + exp2(x * S::broadcast(-1.702f * kLog2E)));
  }

  // x sigmoid(x)
  static REPAVIT_INLINE V silu(V x) {
    using S = Simd<float>;
    return x / (S::broadcast(1.0f) + exp2(x * S::broadcast(-kLog2E)));
  }
};

#if REPAVIT_ISA_LEVEL == 0

// For gradient checks and truth, not for speed: libm lane by lane.
template <>
struct Gelu<double> {
  using V = Simd<double>::V;
  static REPAVIT_INLINE V erf(V x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] *= 0.5 * (1.0 + __builtin_erf(x[i] * 0.70710678118654752440));
    return x;
  }
  static REPAVIT_INLINE V tanh(V x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) {
      const double u = 0.79788456080286535588 * (x[i] + 0.044715 * x[i] * x[i] * x[i]);
      x[i] *= 0.5 * (1.0 + __builtin_tanh(u));
    }
    return x;
  }
  static REPAVIT_INLINE V quick(V x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] /= 1.0 + __builtin_exp(-1.702 * x[i]);
    return x;
  }
  static REPAVIT_INLINE V silu(V x) {
    for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] /= 1.0 + __builtin_exp(-x[i]);
    return x;
  }
};

#endif

// The activation that a kernel was compiled for.
template <class E, Activation kForm>
REPAVIT_INLINE typename Simd<E>::V activate(typename Simd<E>::V x) {
  if constexpr (kForm == kGeluTanh) return Gelu<E>::tanh(x);
  else if constexpr (kForm == kGeluQuick) return Gelu<E>::quick(x);
  else if constexpr (kForm == kSilu) return Gelu<E>::silu(x);
  else return Gelu<E>::erf(x);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
