// Simd<float> and Simd<double> on 16-byte GCC/Clang vectors: SSE2 on any x86-64, NEON on AArch64. See simd-inl.h.
#pragma once

namespace repavit {
namespace REPAVIT_ISA {

// What both element types share; Bits is the unsigned integer of the same width.
template <class E, class Bits>
struct PortableSimd {
  typedef E V __attribute__((vector_size(16)));
  typedef Bits U __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / static_cast<int>(sizeof(E));
  static constexpr Bits kSign = Bits{1} << (8 * sizeof(E) - 1);

  static REPAVIT_INLINE V zero() { return V{}; }
  static REPAVIT_INLINE V broadcast(E e) { return V{} + e; }

  static REPAVIT_INLINE V load(const E* p) { return load(p, kLanes); }
  static REPAVIT_INLINE V load(const E* p, int n) {
    V v{};
    __builtin_memcpy(&v, p, sizeof(E) * static_cast<size_t>(n));
    return v;
  }
  static REPAVIT_INLINE void store(E* p, V v) { store(p, v, kLanes); }
  static REPAVIT_INLINE void store(E* p, V v, int n) { __builtin_memcpy(p, &v, sizeof(E) * static_cast<size_t>(n)); }

  // Contracted to one instruction where the target has it (-ffp-contract=fast).
  static REPAVIT_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static REPAVIT_INLINE void accumulate(V& acc, V a, V b) { acc = fma(a, b, acc); }
  static REPAVIT_INLINE V fnma(V a, V b, V c) { return c - a * b; }
  static REPAVIT_INLINE V min(V a, V b) { return a < b ? a : b; }
  static REPAVIT_INLINE V max(V a, V b) { return a > b ? a : b; }
  static REPAVIT_INLINE V abs(V a) { return (V)((U)a & ~kSign); }
  static REPAVIT_INLINE V select_negative(V x, V a, V b) { return ((U)x & kSign) != U{} ? a : b; }

  static REPAVIT_INLINE void unzip_runs(V&, V&) {}  // a run is a vector

  static REPAVIT_INLINE V swap_pairs(V a) {
    V swapped = a;
    for (int i = 0; i < kLanes; ++i) swapped[i] = a[i ^ 1];
    return swapped;
  }

  static REPAVIT_INLINE E sum(V a) {
    E total = a[0];
    for (int i = 1; i < kLanes; ++i) total += a[i];
    return total;
  }
  static REPAVIT_INLINE E max(V a) {
    E most = a[0];
    for (int i = 1; i < kLanes; ++i) most = a[i] > most ? a[i] : most;
    return most;
  }

  template <class Op>
  static REPAVIT_INLINE V across(const V (&rows)[kLanes], const Op& op) {
    V result{};
    for (int i = 0; i < kLanes; ++i) {
      V column{};
      for (int r = 0; r < kLanes; ++r) column[r] = rows[r][i];
      result = i == 0 ? column : op(result, column);
    }
    return result;
  }
};

template <>
struct Simd<double> : PortableSimd<double, uint64_t> {};

template <>
struct Simd<float> : PortableSimd<float, uint32_t> {
  using Base = PortableSimd<float, uint32_t>;
  using Base::load, Base::store;
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint16_t H __attribute__((vector_size(8)));

  static REPAVIT_INLINE V load(const bf16* p) { return load(p, kLanes); }
  static REPAVIT_INLINE V load(const bf16* p, int n) { return (V)(load_halves(p, n) << 16); }
  static REPAVIT_INLINE void store(bf16* p, V v) { store(p, v, kLanes); }
  static REPAVIT_INLINE void store(bf16* p, V v, int n) {
    const U bits = (U)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits | 0x400000) >> 16;
    store_halves(p, v == v ? rounded : quiet, n);
  }

  static REPAVIT_INLINE V load_even(const bf16* p) { return (V)(load_pairs(p) << 16); }
  static REPAVIT_INLINE V load_odd(const bf16* p) { return (V)(load_pairs(p) & 0xffff0000); }

  static REPAVIT_INLINE V load(const fp16* p) { return load(p, kLanes); }
  static REPAVIT_INLINE V load(const fp16* p, int n) { return from_fp16(load_halves(p, n)); }
  static REPAVIT_INLINE void store(fp16* p, V v) { store(p, v, kLanes); }
  static REPAVIT_INLINE void store(fp16* p, V v, int n) { store_halves(p, to_fp16(v), n); }

  static REPAVIT_INLINE V round(V a) {
    return a + 12582912.0f - 12582912.0f;  // 1.5 * 2^23 leaves no room for fraction bits
  }

 private:
  static REPAVIT_INLINE U load_halves(const void* p, int n) {
    H h{};
    __builtin_memcpy(&h, p, sizeof(uint16_t) * static_cast<size_t>(n));
    return __builtin_convertvector(h, U);
  }
  static REPAVIT_INLINE U load_pairs(const void* p) {  // little-endian, as every target of this library is
    U u;
    __builtin_memcpy(&u, p, sizeof(u));
    return u;
  }
  static REPAVIT_INLINE void store_halves(void* p, U bits, int n) {
    const H h = __builtin_convertvector(bits, H);
    __builtin_memcpy(p, &h, sizeof(uint16_t) * static_cast<size_t>(n));
  }

  // Exponents are rebased by a multiplication with a power of two, which also normalises subnormals.
  static REPAVIT_INLINE V from_fp16(U h) {
    const U sign = (h & 0x8000) << 16, magnitude = (h & 0x7fff) << 13;
    const V scaled = (V)magnitude * 0x1p112f;
    const U special = magnitude | 0x7f800000;  // Inf and NaN keep their payload
    return (V)((magnitude >= 0x0f800000 ? special : (U)scaled) | sign);
  }
  static REPAVIT_INLINE U to_fp16(V v) {
    const U sign = ((U)v >> 16) & 0x8000, magnitude = (U)v & 0x7fffffff;
    const U odd = (magnitude >> 13) & 1;
    const U normal = (magnitude - 0x38000000 + 0xfff + odd) >> 13;
    const U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000;  // 0.5 has an ulp of 2^-24, fp16's smallest step
    U h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? U{} + 0x7c00 : h;
    h = magnitude > 0x7f800000 ? U{} + 0x7e00 : h;
    return h | sign;
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
