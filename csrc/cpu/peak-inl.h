// The machine's own limit for products of a dtype: what the microkernel issues, on registers alone. For benchmarks.
#pragma once

#include "dot-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

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
    const typename D::Factor left = D::left(element, 0), right = D::right(memory, 0);
    for (int64_t thread = begin; thread < end; ++thread) {
      typename S::V acc[kChains];
      REPAVIT_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = S::zero();
      for (int64_t round = 0; round < rounds; ++round) {
        REPAVIT_UNROLL
        for (int i = 0; i < kChains; ++i) D::accumulate(acc[i], left, right);
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

}  // namespace REPAVIT_ISA
}  // namespace repavit
