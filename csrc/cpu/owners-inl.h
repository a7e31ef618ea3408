// How many threads share a piece of work, and which rows each of them owns.
#pragma once

#include "scratch-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Threads that a fork over `operations` pays for: about a million each. As a double, since their number may be beyond all
// integers where the sizes that it comes from are not.
inline ptrdiff_t useful_threads(double operations, int threads) {
  const double useful = 1.0 + operations * 0x1p-20;
  return useful < threads ? static_cast<ptrdiff_t>(useful) : threads;
}

// Blocks of rows of each of `images`, so that `owners` have equally many of equal height, and few have more than one.
template <class E>
ptrdiff_t row_blocks(ptrdiff_t rows, ptrdiff_t images, ptrdiff_t owners) {
  ptrdiff_t divisor = owners;
  for (ptrdiff_t rest = images; rest != 0;) {
    const ptrdiff_t next = divisor % rest;
    divisor = rest;
    rest = next;
  }
  return least(owners / divisor, (rows + kInterleave<E> - 1) / kInterleave<E>);
}

// First row of a block; those that are interleaved in V, as keys, have one owner.
template <class E>
ptrdiff_t row_begin(ptrdiff_t rows, ptrdiff_t blocks, ptrdiff_t block) {
  return block == blocks ? rows : rows * block / blocks / kInterleave<E> * kInterleave<E>;
}

// Into how many parts of a product's columns, a divisor of `owners`, threads that share blocks of rows divide them: until
// blocks are of enough rows for the products to outlast the reading of `bytes` of weights, where those are more than a core
// keeps. `fits(parts)` says whether the columns go into so many.
template <class Fits>
ptrdiff_t column_parts(int64_t bytes, ptrdiff_t rows, ptrdiff_t owners, const Fits& fits) {
  constexpr ptrdiff_t kEnoughRows = 48;
  constexpr int64_t kManyBytes = 1 << 20;
  if (bytes < kManyBytes) return 1;
  ptrdiff_t best = 1;
  for (ptrdiff_t parts = 1; parts <= owners; ++parts) {
    if (owners % parts != 0 || !fits(parts)) continue;
    best = parts;
    if (rows * parts >= owners * kEnoughRows) break;
  }
  return best;
}

// Panels [first, last) of a product's columns.
struct PanelRange {
  ptrdiff_t first, last;
};
inline PanelRange panels_of(ptrdiff_t panels, ptrdiff_t parts, ptrdiff_t part) {
  return {panels * part / parts, panels * (part + 1) / parts};
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
