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

}  // namespace REPAVIT_ISA
}  // namespace repavit
