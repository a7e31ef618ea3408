// The machine's own limit for products of a dtype: what the microkernel issues, on registers alone. For benchmarks.
#pragma once

#include "dot_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// What the compiler does not know to be zero, or the same in every round: it would leave the sum alone of a product of two
// instructions.
template <class Factor>
REPAVIT_INLINE Factor unknown(Factor f) {
#if defined(__x86_64__) && REPAVIT_ISA_LEVEL <= 1
  __asm__ volatile("" : "+x"(f));
#endif
  return f;
}

// product_peak_<T>: `iterations` rounds of independent products on every thread of the pool; returns how many operations
// (multiplications and additions) that was.
template <class T>
int64_t product_peak(int64_t iterations, const Pool& pool) {
  using S = SimdOf<T>;
  using D = Dot<T>;
  constexpr int kChains = REPAVIT_ISA_LEVEL >= 2 ? 24 : 12;  // latency times rate, and what the registers hold
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const int64_t rounds = *static_cast<const int64_t*>(raw);
    alignas(64) T memory[kPanelColumns * kInterleave<T>] = {};
    Operand<T> element[kInterleave<T>] = {};
    const typename D::Factor left = unknown(D::left(element, 0)), right = D::right(opaque(&memory[0]), 0);
    for (int64_t thread = begin; thread < end; ++thread) {
      typename S::V acc[kChains];
      REPAVIT_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = S::zero();
      for (int64_t round = 0; round < rounds; ++round) {
        REPAVIT_UNROLL
        for (int i = 0; i < kChains; ++i) D::accumulate(acc[i], left, unknown(right));
      }
      typename S::V sum = S::zero();
      REPAVIT_UNROLL
      for (int i = 0; i < kChains; ++i) sum += acc[i];
      __asm__ volatile("" : : "m"(sum));
    }
  };
  pool.run(pool.threads, body, &iterations);
  return iterations * pool.threads * kChains * S::kLanes * kInterleave<T> / D::kParts * 2;
}

#if REPAVIT_ISA_LEVEL >= 4

// The same of the tile unit: products of whole tiles, whatever is in them, into four.
template <class T>
int64_t unit_product_peak(int64_t iterations, const Pool& pool) {
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    shape_unit(kBlockRows);
    for (int64_t left = (end - begin) * *static_cast<const int64_t*>(raw); left > 0; --left) {
      TileUnit::multiply<T, 0, 4, 6>();
      TileUnit::multiply<T, 1, 4, 7>();
      TileUnit::multiply<T, 2, 5, 6>();
      TileUnit::multiply<T, 3, 5, 7>();
    }
    TileUnit::release();
  };
  iterations = iterations / 16 + 1;  // a round of theirs is as long as some twenty of the others
  pool.run(pool.threads, body, &iterations);
  return iterations * pool.threads * 4 * kUnitRows * kUnitRows * kUnitBytes / static_cast<int64_t>(sizeof(T)) * 2;
}
template <>
inline int64_t product_peak<bf16>(int64_t iterations, const Pool& pool) {
  return unit_product_peak<bf16>(iterations, pool);
}
template <>
inline int64_t product_peak<int8_t>(int64_t iterations, const Pool& pool) {
  return unit_product_peak<int8_t>(iterations, pool);
}

#endif

// The same of products of whole numbers, as this processor multiplies them.
inline int64_t int8_product_peak(int64_t iterations, const Pool& pool) {
  int64_t operations = 0;
  with_int8_operand([&](auto operand) {
    using Panel = typename Choose<sizeof(operand) == 1, int8_t, int16_t>::Type;
    operations = product_peak<Panel>(iterations, pool);
  });
  return operations;
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
