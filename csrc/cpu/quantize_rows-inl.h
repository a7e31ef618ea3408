// Rows of floats as whole numbers from 0 to 255: what the left operands of int8 products are made of.
//
// x = scale q + offset, from the least number of a row (offset) to the greatest in 255 steps. Each row has its own, from its
// own numbers, so what comes of a token does not depend on those beside it. A row of one number, or whose numbers are
// nearer than all use (1e-30), has scale 0. A row that holds a NaN or an infinity, or that spans more than floats do, has
// scale NaN: so has all that comes of it, and nothing beside it.
#pragma once

#include "dot_int8-inl.h"
#include "layernorm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr float kTinyRange = 1e-30f;

// Lanes of floats to the nearest whole numbers, ties to even, in memory.
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
  v = Simd<float>::round(v);
  for (int i = 0; i < n; ++i) out[i] = static_cast<O>(v[i]);
#endif
}

// What a row of numbers stands for beside them.
struct RowScale {
  float scale, offset;
};

// The least and the greatest number of a row of at least one, and whether all are finite.
struct RowRange {
  float least, greatest;
  bool finite;

  RowRange(const float* x, ptrdiff_t columns) {
    using S = Simd<float>;
    S::V low = S::broadcast(x[0]), high = low, zeros = S::zero();
    for_each_vector(x, columns, [&](S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
      zeros = S::fma(v, S::zero(), zeros);  // NaN of a NaN or an infinity
      if (n == S::kLanes) {
        low = S::min(low, v);
        high = S::max(high, v);
      } else {
        for (int lane = 0; lane < n; ++lane) {
          low = S::min(low, S::broadcast(x[i + lane]));
          high = S::max(high, S::broadcast(x[i + lane]));
        }
      }
    });
    const float sum = S::sum(zeros);
    finite = sum == sum;
    least = -S::max(-low);
    greatest = S::max(high);
  }
};

// One row: x [columns] → out, with zeros behind it up to a whole group of k.
template <class O>
RowScale quantize_row(const float* x, ptrdiff_t columns, O* out) {
  using S = Simd<float>;
  const ptrdiff_t whole = (columns + kInterleave<int8_t> - 1) / kInterleave<int8_t> * kInterleave<int8_t>;
  if (columns == 0) return {0.0f, 0.0f};
  const RowRange row(x, columns);
  const float range = row.greatest - row.least;
  if (!row.finite || !(range <= __FLT_MAX__) || range < kTinyRange) {
    for (ptrdiff_t k = 0; k < whole; ++k) out[k] = 0;
    const bool constant = row.finite && range < kTinyRange;
    return {constant ? 0.0f : __builtin_nanf(""), constant ? row.least : 0.0f};
  }
  const S::V by = S::broadcast(255.0f / range), from = S::broadcast(row.least);
  for_each_vector(x, columns, [&](S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_whole(out + i, (v - from) * by, n);
  });
  for (ptrdiff_t k = columns; k < whole; ++k) out[k] = 0;
  return {range / 255.0f, row.least};
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
