// How products of whole numbers enter int32_t sums: two more of Dot<T> (dot-inl.h), both exact.
//
//   panels        left       how
//   int8_t  [4]   uint8_t    vpdpbusd, of 512 bits (AVX512-VNNI) or 256 (AVX-VNNI): four k at once
//   int16_t [2]   int16_t    vpmaddwd and vpaddd: two k at once, from panels widened on their way into L1
//
// vpmaddubsw would be a third quicker than the second, but adds two products in 16 bits, which 255 · 127 · 2 leaves.
#pragma once

#include "dispatch.h"
#include "dot-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// One group of k, four bytes of them, spread over all lanes.
REPAVIT_INLINE Simd<int32_t>::V broadcast_group(const void* a) {
  int32_t group;
  __builtin_memcpy(&group, a, sizeof(group));
  return Simd<int32_t>::broadcast(group);
}

template <class T, class O>
struct GroupDot {
  using Operand = O;
  using Factor = Simd<int32_t>::V;
  static constexpr int kParts = 1;
  static REPAVIT_INLINE Factor left(const O* a, int) { return broadcast_group(a); }
  static REPAVIT_INLINE Factor right(const T* b, int) {
    Factor v;
    __builtin_memcpy(&v, b, sizeof(v));
    return v;
  }
};

#if REPAVIT_BYTE_PRODUCTS

template <>
struct Dot<int8_t> : GroupDot<int8_t, uint8_t> {
  static REPAVIT_INLINE void accumulate(Factor& acc, Factor a, Factor b) {
#if REPAVIT_ISA_LEVEL >= 2
    REPAVIT_PRODUCT(vpdpbusd, acc, a, b);
#else
    REPAVIT_VEX_PRODUCT(vpdpbusd, acc, a, b);
#endif
  }
};

#endif

#if REPAVIT_ISA_LEVEL <= 1

template <>
struct Dot<int16_t> : GroupDot<int16_t, int16_t> {
  static REPAVIT_INLINE void accumulate(Factor& acc, Factor a, Factor b) {
#if REPAVIT_ISA_LEVEL == 1
    const Factor product = (Factor)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product));  // in acc's register: gcc 12 would add to the other and move
#elif defined(__SSE2__)
    typedef int16_t H __attribute__((vector_size(16)));
    acc += (Factor)__builtin_ia32_pmaddwd128((H)a, (H)b);
#else
    acc += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
};

#endif

// Whether tokens of T may meet weights of int8: not those of double.
template <class T>
constexpr bool kHasInt8 = sizeof(Accumulator<T>) == sizeof(float);

// Whether rows meet panels of int8_t as they are (left operands: uint8_t), else widened ones (int16_t). Levels from
// AVX-512 on are asked for int8 only where they have the instruction (dispatch.h).
inline bool int8_meets_panels() {
#if REPAVIT_ISA_LEVEL >= 2
  return true;
#elif REPAVIT_BYTE_PRODUCTS
  return has_avx_vnni();
#else
  return false;
#endif
}

// use(O{}) for the left operands' type; only what this level can need is compiled.
template <class Use>
REPAVIT_INLINE void with_int8_operand(const Use& use) {
#if REPAVIT_ISA_LEVEL >= 2
  use(uint8_t{});
#elif REPAVIT_BYTE_PRODUCTS
  if (int8_meets_panels()) return use(uint8_t{});
  use(int16_t{});
#else
  use(int16_t{});
#endif
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
