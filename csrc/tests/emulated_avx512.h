// AVX-512 on machines without it: `run.sh avx512` compiles isa_avx512.cpp and isa_avx512_bf16.cpp with this header before
// all else (-include). The intrinsics are SIMDe's, and those below that SIMDe 0.7.4 lacks, each by its definition in
// Intel's manual; vector arithmetic the compiler lowers by itself.
//
// Not as the processor does it: vdpbf16ps (its results and operands below the normal range are zeros; here they stay),
// and the order in which reduce_add adds.
#pragma once

#include <immintrin.h>  // before SIMDe, whose names are macros over these

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>

#include "emulated_vnni.h"

namespace emulated {

[[gnu::noinline]] inline __m512 maskz_loadu_ps(__mmask16 lanes, const float* p) {
  __v16sf r = {};
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) r[i] = p[i];
  }
  return r;
}

[[gnu::noinline]] inline void mask_storeu_ps(float* p, __mmask16 lanes, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) p[i] = v[i];
  }
}

[[gnu::noinline]] inline __m256i maskz_loadu_epi16(__mmask16 lanes, const void* p) {
  __v16hi r = {};
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) __builtin_memcpy(reinterpret_cast<char*>(&r) + 2 * i, static_cast<const char*>(p) + 2 * i, 2);
  }
  return (__m256i)r;
}

[[gnu::noinline]] inline void mask_storeu_epi16(void* p, __mmask16 lanes, __m256i v) {
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) __builtin_memcpy(static_cast<char*>(p) + 2 * i, reinterpret_cast<const char*>(&v) + 2 * i, 2);
  }
}

[[gnu::noinline]] inline __m512i cvtepu16_epi32(__m256i v) {
  __v16si r;
  for (int i = 0; i < 16; ++i) r[i] = ((__v16hu)v)[i];
  return (__m512i)r;
}

[[gnu::noinline]] inline __m256i cvtepi32_epi16(__m512i v) {
  __v16hu r;
  for (int i = 0; i < 16; ++i) r[i] = static_cast<uint16_t>(((__v16su)v)[i]);
  return (__m256i)r;
}

[[gnu::noinline]] inline __m512i cvtps_epi32(__m512 v) {
  __v16si r;
  for (int i = 0; i < 16; ++i) r[i] = _mm_cvtss_si32(_mm_set_ss(v[i]));
  return (__m512i)r;
}

[[gnu::noinline]] inline __m512 cvtph_ps(__m256i v) {
  __v16sf r;
  for (int i = 0; i < 16; ++i) r[i] = _cvtsh_ss(((__v16hu)v)[i]);
  return r;
}

template <int kRounding>
__m256i cvtps_ph(__m512 v) {
  __v16hu r;
  for (int i = 0; i < 16; ++i) r[i] = _cvtss_sh(v[i], kRounding);
  return (__m256i)r;
}

// To nearest even; subnormals become zeros, a NaN stays one.
[[gnu::noinline]] inline __m256bh cvtneps_pbh(__m512 v) {
  __v16hu r;
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = ((__v16su)v)[i];
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    r[i] = static_cast<uint16_t>((v[i] != v[i] ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return (__m256bh)r;
}

[[gnu::noinline]] inline float reduce_add_ps(__m512 v) {
  float sum = v[0];
  for (int i = 1; i < 16; ++i) sum += v[i];
  return sum;
}

[[gnu::noinline]] inline float reduce_max_ps(__m512 v) {
  for (int i = 1; i < 16; ++i) v[0] = v[0] > v[i] ? v[0] : v[i];
  return v[0];
}

// Blocks of four lanes: two of a, then two of b, chosen by two bits each.
template <int kBlocks>
__m512 shuffle_f32x4(__m512 a, __m512 b) {
  __v16sf r;
  for (int i = 0; i < 16; ++i) {
    const int from = 4 * (kBlocks >> 2 * (i / 4) & 3) + i % 4;
    r[i] = i < 8 ? a[from] : b[from];
  }
  return r;
}

// Lanes within blocks of four, the same in each.
template <int kLanes>
__m512 permute_ps(__m512 a) {
  __v16sf r;
  for (int i = 0; i < 16; ++i) r[i] = a[i / 4 * 4 + (kLanes >> 2 * (i % 4) & 3)];
  return r;
}

// Lanes as unsigned bytes, no more than 255, where the mask is set.
[[gnu::noinline]] inline void mask_cvtusepi32_storeu_epi8(void* p, __mmask16 lanes, __m512i v) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t lane = ((__v16su)v)[i];
    if (lanes >> i & 1) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(lane < 255 ? lane : 255);
  }
}

// What rounding leaves of x: x - whole, and 0 of an infinity.
[[gnu::noinline]] inline __m512 reduced(__m512 x, __m512 whole) {
  for (int i = 0; i < 16; ++i) x[i] = __builtin_isinf(x[i]) ? 0.0f : x[i] - whole[i];
  return x;
}

}  // namespace emulated

#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtps_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtneps_pbh
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_ps
#undef _mm512_mask_cvtusepi32_storeu_epi8
#undef _mm512_shuffle_f32x4
#undef _mm512_permute_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph<(rounding)>(v)
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_mask_cvtusepi32_storeu_epi8 emulated::mask_cvtusepi32_storeu_epi8
#define _mm512_shuffle_f32x4(a, b, blocks) emulated::shuffle_f32x4<(blocks)>((a), (b))
#define _mm512_permute_ps(a, lanes) emulated::permute_ps<(lanes)>(a)
#define _mm512_reduce_ps(x, rounding) emulated::reduced(x, _mm512_roundscale_ps(x, (rounding)))

// The products that the kernels write as instructions (simd-inl.h).
#define REPAVIT_PRODUCT(instruction, acc, a, b) emulated_##instruction(acc, a, b)
#define emulated_vfmadd231ps(acc, a, b) acc = _mm512_fmadd_ps(a, b, acc)
#define emulated_vdpbf16ps(acc, a, b) acc = _mm512_dpbf16_ps(acc, a, b)
