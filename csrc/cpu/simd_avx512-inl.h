// Simd<float> on AVX-512 F, BW, VL, DQ: 16 lanes, tails by mask registers. Included by simd-inl.h alone.
#pragma once

#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 sees _mm512_undefined_ps() in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace repavit {
namespace REPAVIT_ISA {

template <>
struct Simd<float> {
  using V = __m512;
  static constexpr int kLanes = 16;

  static REPAVIT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static REPAVIT_INLINE V zero() { return _mm512_setzero_ps(); }
  static REPAVIT_INLINE V broadcast(float e) { return _mm512_set1_ps(e); }

  static REPAVIT_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static REPAVIT_INLINE V load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static REPAVIT_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static REPAVIT_INLINE void store(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static REPAVIT_INLINE V load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static REPAVIT_INLINE V load(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static REPAVIT_INLINE void store(bf16* p, V v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
  static REPAVIT_INLINE void store(bf16* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(v)); }

  static REPAVIT_INLINE V load_even(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static REPAVIT_INLINE V load_odd(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-0x10000)));
  }

  static REPAVIT_INLINE V load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static REPAVIT_INLINE V load(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static REPAVIT_INLINE void store(fp16* p, V v) { _mm256_storeu_si256((__m256i*)p, to_fp16(v)); }
  static REPAVIT_INLINE void store(fp16* p, V v, int n) { _mm256_mask_storeu_epi16(p, first(n), to_fp16(v)); }

  static REPAVIT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static REPAVIT_INLINE void accumulate(V& acc, V a, V b) { REPAVIT_PRODUCT(vfmadd231ps, acc, a, b); }
  static REPAVIT_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  static REPAVIT_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  static REPAVIT_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static REPAVIT_INLINE V abs(V a) { return _mm512_abs_ps(a); }
  static REPAVIT_INLINE V select_negative(V x, V a, V b) {
    return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a);
  }
  static REPAVIT_INLINE V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // Of runs of four lanes a0 b0 a1 b1 …, over two vectors: all a, all b.
  static REPAVIT_INLINE void unzip_runs(V& a, V& b) {
    const V first = a;
    a = _mm512_shuffle_f32x4(first, b, 0x88);
    b = _mm512_shuffle_f32x4(first, b, 0xdd);
  }

  static REPAVIT_INLINE V swap_pairs(V a) { return _mm512_permute_ps(a, 0xb1); }

  static REPAVIT_INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }
  static REPAVIT_INLINE float max(V a) { return _mm512_reduce_max_ps(a); }

  template <class Op>
  static REPAVIT_INLINE V across(const V (&rows)[kLanes], const Op& op) {
    const auto pd = [](V v) __attribute__((always_inline)) { return _mm512_castps_pd(v); };
    const auto two = [&](int i) __attribute__((always_inline)) {
      return op(_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i], rows[i + 1]));
    };
    const auto four = [&](int i) __attribute__((always_inline)) {
      const __m512d a = pd(two(i)), b = pd(two(i + 2));
      return op(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    };
    const auto join = [&](V a, V b) __attribute__((always_inline)) {
      return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return join(join(four(0), four(4)), join(four(8), four(12)));
  }

  // Lane i of the result is table[index[i] & 15].
  static REPAVIT_INLINE V lookup(V table, V index_bits) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(index_bits), table);
  }

 private:
  static REPAVIT_INLINE V from_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static REPAVIT_INLINE __m256i to_bf16(V v) {
#if REPAVIT_ISA_LEVEL >= 3
    return (__m256i)_mm512_cvtneps_pbh(v);  // flushes subnormal results to zero, as vdpbf16ps does
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
  static REPAVIT_INLINE __m256i to_fp16(V v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
