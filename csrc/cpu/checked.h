// Sizes that are checked before they are multiplied or added: products of 64 bits wrap, and a wrapped size passes every
// later check.
//
// static: these are seen by per-ISA files too, whose inline functions must not be shared by the linker (simd-inl.h).
#pragma once

#include <stdint.h>

namespace repavit {

// Stands for a size that is negative or that an int64_t does not hold. What is computed from it is it again, and it equals
// no size of a tensor: a chain of sizes needs one check, at its end.
constexpr int64_t kNoSize = -1;

static inline int64_t size_product(int64_t a, int64_t b) {
  int64_t product = 0;
  return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) ? kNoSize : product;
}

static inline int64_t size_sum(int64_t a, int64_t b) {
  int64_t sum = 0;
  return a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum) ? kNoSize : sum;
}

// ceil(a / b), b > 0.
static inline int64_t size_quotient(int64_t a, int64_t b) { return a < 0 ? kNoSize : a / b + (a % b != 0); }

template <class... More>
static inline int64_t size_product(int64_t a, int64_t b, More... more) {
  return size_product(size_product(a, b), more...);
}

}  // namespace repavit
