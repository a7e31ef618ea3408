// Rows of one sequence wherever its tokens stand in memory: this is how windows are partitioned, padded and rolled
// without a copy of the map.
#pragma once

#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr ptrdiff_t kPaddedToken = -1;

// Row i is data + tokens[i] * stride (tokens null: data + i * stride); a padded token's row is `padding`, for results
// null: nothing is stored.
template <class E>
struct TokenRows {
  E* data;
  ptrdiff_t stride;
  const ptrdiff_t* tokens = nullptr;
  E* padding = nullptr;

  REPAVIT_INLINE E* operator[](ptrdiff_t i) const {
    if (tokens == nullptr) return data + i * stride;
    return tokens[i] == kPaddedToken ? padding : data + tokens[i] * stride;
  }
  // The same from row i on.
  REPAVIT_INLINE TokenRows from(ptrdiff_t i) const {
    if (tokens == nullptr) return {data + i * stride, stride, nullptr, padding};
    return {data, stride, tokens + i, padding};
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
