// Rows of floats as whole numbers from 0 to 255: what the left operands of int8 products are made of.
//
// Each row has a scale of its own, from its own numbers, so what comes of a token does not depend on those beside it.
//   symmetric   x = scale (q - 128), scale = max |x| / 127          tokens, and what attention returns
//   from below  x = scale q + lowest, scale = (max x - lowest) / 255   activations, whose lowest value is known
// A row of zeros, or of numbers below all use (1e-30), has scale 0. A row that holds a NaN or an infinity has scale NaN: so
// has all that comes of it, and nothing beside it.
#pragma once

#include "dot_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr int kInt8Zero = 128;  // q of 0, in symmetric rows
// Below every form of GELU: their minima are -0.16997 (erf), -0.17004 (tanh) and -0.16361 (quick).
constexpr float kLowestGelu = -0.171f;
constexpr float kTinyRange = 1e-30f;

// Whole numbers in lanes of floats to memory.
template <class O>
REPAVIT_INLINE void store_whole(O* out, Simd<float>::V v, int n) {
#if REPAVIT_ISA_LEVEL >= 2
  const __m512i whole = _mm512_cvtps_epi32(v);
  const __mmask16 lanes = Simd<float>::first(n);
  static_assert(sizeof(O) == 1, "products of 512 bits take bytes");
  _mm512_mask_cvtusepi32_storeu_epi8(out, lanes, _mm512_max_epi32(whole, _mm512_setzero_si512()));
#elif REPAVIT_ISA_LEVEL == 1
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i packed = sizeof(O) == 1 ? _mm_packus_epi16(halves, halves) : halves;
  if (n == 8 && sizeof(O) == 2) return _mm_storeu_si128((__m128i*)out, packed);
  if (n == 8) return _mm_storel_epi64((__m128i*)out, packed);
  O lanes[16 / sizeof(O)];
  _mm_storeu_si128((__m128i*)lanes, packed);
  __builtin_memcpy(out, lanes, sizeof(O) * static_cast<size_t>(n));
#else
  for (int i = 0; i < n; ++i) out[i] = static_cast<O>(v[i]);
#endif
}

// q = round(x factor + shift) for a row, and zeros behind it up to a whole group of k.
template <class O>
REPAVIT_INLINE void quantize(const float* x, ptrdiff_t columns, float factor, float shift, O* out) {
  using S = Simd<float>;
  const S::V by = S::broadcast(factor), from = S::broadcast(shift);
  for_each_vector(x, columns, [&](S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_whole(out + i, S::round(v * by) + from, n);
  });
  for (ptrdiff_t k = columns; k % kInterleave<int8_t> != 0; ++k) out[k] = 0;
}

// What a row of no use is: its numbers do not matter, its scale says it all.
template <class O>
float unquantized(O* out, ptrdiff_t columns, bool finite) {
  for (ptrdiff_t k = 0; k < columns || k % kInterleave<int8_t> != 0; ++k) out[k] = kInt8Zero;
  return finite ? 0.0f : __builtin_nanf("");
}

// Greatest value of a row, or greatest magnitude, and whether all are finite. No columns: 0.
template <bool kMagnitude>
float greatest(const float* x, ptrdiff_t columns, bool* finite) {
  using S = Simd<float>;
  if (columns == 0) return *finite = true, 0.0f;
  S::V most = S::broadcast(kMagnitude ? 0.0f : x[0]), zeros = S::zero();
  for_each_vector(x, columns, [&](S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    zeros = S::fma(v, S::zero(), zeros);  // NaN of a NaN or an infinity
    if (kMagnitude) {
      most = S::max(most, S::abs(v));
    } else if (n == S::kLanes) {
      most = S::max(most, v);
    } else {
      for (int lane = 0; lane < n; ++lane) most = S::max(most, S::broadcast(x[i + lane]));
    }
  });
  const float sum = S::sum(zeros);
  *finite = sum == sum;
  return S::max(most);
}

// Symmetric; returns the scale.
template <class O>
float quantize_symmetric(const float* x, ptrdiff_t columns, O* out) {
  bool finite;
  const float most = greatest<true>(x, columns, &finite);
  if (!finite || most < kTinyRange) return unquantized(out, columns, finite);
  quantize(x, columns, 127.0f / most, static_cast<float>(kInt8Zero), out);
  return most / 127.0f;
}

// From `lowest`, below which no value is; returns the scale.
template <class O>
float quantize_from(const float* x, ptrdiff_t columns, float lowest, O* out) {
  using S = Simd<float>;
  bool finite;
  const float range = greatest<false>(x, columns, &finite) - lowest;
  if (!finite || !(range <= __FLT_MAX__)) return unquantized(out, columns, false);
  const S::V by = S::broadcast(255.0f / range), from = S::broadcast(lowest);
  for_each_vector(x, columns, [&](S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_whole(out + i, S::round((v - from) * by), n);
  });
  for (ptrdiff_t k = columns; k % kInterleave<int8_t> != 0; ++k) out[k] = 0;
  return range / 255.0f;
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
