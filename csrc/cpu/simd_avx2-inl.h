// Simd<float> on AVX2, FMA and F16C: 8 lanes, tails by vmaskmov (fp32) or a small copy (16-bit). See simd-inl.h.
#pragma once

#include <immintrin.h>

namespace repavit {
namespace REPAVIT_ISA {

template <>
struct Simd<float> {
  using V = __m256;
  static constexpr int kLanes = 8;

  static REPAVIT_INLINE V zero() { return _mm256_setzero_ps(); }
  static REPAVIT_INLINE V broadcast(float e) { return _mm256_set1_ps(e); }

  static REPAVIT_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static REPAVIT_INLINE V load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static REPAVIT_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static REPAVIT_INLINE void store(float* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }

  static REPAVIT_INLINE V load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static REPAVIT_INLINE V load(const bf16* p, int n) { return from_bf16(load_halves(p, n)); }
  static REPAVIT_INLINE void store(bf16* p, V v) { _mm_storeu_si128((__m128i*)p, to_bf16(v)); }
  static REPAVIT_INLINE void store(bf16* p, V v, int n) { store_halves(p, to_bf16(v), n); }

  static REPAVIT_INLINE V load_even(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
  }
  static REPAVIT_INLINE V load_odd(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(-0x10000)));
  }

  static REPAVIT_INLINE V load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static REPAVIT_INLINE V load(const fp16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  static REPAVIT_INLINE void store(fp16* p, V v) { _mm_storeu_si128((__m128i*)p, to_fp16(v)); }
  static REPAVIT_INLINE void store(fp16* p, V v, int n) { store_halves(p, to_fp16(v), n); }

  static REPAVIT_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static REPAVIT_INLINE void accumulate(V& acc, V a, V b) { REPAVIT_PRODUCT(vfmadd231ps, acc, a, b); }
  static REPAVIT_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  static REPAVIT_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  static REPAVIT_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static REPAVIT_INLINE V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static REPAVIT_INLINE V select_negative(V x, V a, V b) { return _mm256_blendv_ps(b, a, x); }
  static REPAVIT_INLINE V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // Of runs of four lanes a0 b0 a1 b1, over two vectors: all a, all b.
  static REPAVIT_INLINE void unzip_runs(V& a, V& b) {
    const V first = a;
    a = _mm256_permute2f128_ps(first, b, 0x20);
    b = _mm256_permute2f128_ps(first, b, 0x31);
  }

  static REPAVIT_INLINE V swap_pairs(V a) { return _mm256_permute_ps(a, 0xb1); }

  static REPAVIT_INLINE float sum(V a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static REPAVIT_INLINE float max(V a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  template <class Op>
  static REPAVIT_INLINE V across(const V (&rows)[kLanes], const Op& op) {
    const auto pd = [](V v) __attribute__((always_inline)) { return _mm256_castps_pd(v); };
    const auto two = [&](int i) __attribute__((always_inline)) {
      return op(_mm256_unpacklo_ps(rows[i], rows[i + 1]), _mm256_unpackhi_ps(rows[i], rows[i + 1]));
    };
    const auto four = [&](int i) __attribute__((always_inline)) {
      const __m256d a = pd(two(i)), b = pd(two(i + 2));
      return op(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    };
    const V low = four(0), high = four(4);
    return op(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

 private:
  static REPAVIT_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static REPAVIT_INLINE __m128i load_halves(const void* p, int n) {
    uint16_t lanes[8] = {};
    __builtin_memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(n));
    return _mm_loadu_si128((const __m128i*)lanes);
  }
  static REPAVIT_INLINE void store_halves(void* p, __m128i v, int n) {
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i*)lanes, v);
    __builtin_memcpy(p, lanes, sizeof(uint16_t) * static_cast<size_t>(n));
  }
  static REPAVIT_INLINE V from_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static REPAVIT_INLINE __m128i to_bf16(V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static REPAVIT_INLINE __m128i to_fp16(V v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
