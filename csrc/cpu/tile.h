// The register tiles, in one table: kTileRows rows of C by kTileVectors vectors of columns stay in registers.
//
//   level    element  lanes  rows x columns   registers: accumulators + B + A of all
//   AVX-512  float    16     14 x 32          28 + 2 + 1 of 32
//   AVX2     float     8      6 x 16          12 + 2 + 1 of 16
//   NEON     float     4      6 x 16          24 + 4 + 1 of 32
//   NEON     double    2      6 x 8           24 + 4 + 1 of 32
//   SSE2     float     4      4 x 8            8 + 2 + 1 of 16
//   SSE2     double    2      4 x 4            8 + 2 + 1 of 16
#pragma once

#include "kernels.h"

namespace repavit {
namespace REPAVIT_ISA {

#if REPAVIT_ISA_LEVEL >= 2
constexpr int kTileRows = 14, kTileVectors = 2;
#elif REPAVIT_ISA_LEVEL == 1
constexpr int kTileRows = 6, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// Tiles of at least so many rows have their epilogue in registers: all of products of more rows than a tile has, but 7 of 15
// or 3 of 7. None of the level that no machine of today needs.
#if REPAVIT_ISA_LEVEL >= 1 || defined(__aarch64__)
constexpr int kTallRows = kTileRows / 2 + 1;
#else
constexpr int kTallRows = kTileRows + 1;
#endif

#if REPAVIT_ISA_LEVEL < 2
constexpr int kStripRows = 200;  // rows of A that L2 keeps a chunk of K of (gemm_chunked-inl.h): 200 KiB of fp32
#endif

// How rows are divided into tiles of nearly equal height, the taller ones first: 15 rows of 14 are 8 + 7, never 14 + 1.
// (Divided once: a division in front of every tile is what its first loads would wait for.)
struct RowTiles {
  ptrdiff_t count, low, taller;

  explicit RowTiles(ptrdiff_t rows, ptrdiff_t most = kTileRows)
      : count((rows + most - 1) / most), low(rows / (count > 0 ? count : 1)), taller(rows - low * count) {}

  int height(ptrdiff_t tile) const { return static_cast<int>(low + (tile < taller)); }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
