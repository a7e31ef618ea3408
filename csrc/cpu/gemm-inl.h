// C = epilogue(sum over segments of A Bᵀ): A row-major and never packed, B in panels (kernels.h), C touched once.
//
// A tile of C stays in registers for the whole of K, so there is no K blocking and nothing is read back. The epilogue is
// a functor that receives each finished row of the tile in registers and does what it likes: bias, activation, residual,
// conversion, any layout of the store. It is compiled into tall tiles alone; others reach it by way of L1 (with_tile).
#pragma once

#include "dot-inl.h"
#include "tile.h"

namespace repavit {
namespace REPAVIT_ISA {

// One left operand for panels of T: rows of `depth` elements, row r at data + r * stride (elements). Where kInterleave<T>
// is 2 and depth is odd, one more element per row is read and must be finite (it meets a zero of the panel).
template <class T>
struct Rows {
  const Operand<T>* data;
  ptrdiff_t stride;
  ptrdiff_t depth;
};

// Groups of k in `depth` elements.
template <class T>
REPAVIT_INLINE ptrdiff_t groups_of(ptrdiff_t depth) {
  return (depth + kInterleave<T> - 1) / kInterleave<T>;
}

// Elements of one panel over the given depth: the distance from a panel to the next, or to what is stacked below it.
template <class T>
REPAVIT_INLINE ptrdiff_t panel_elements(ptrdiff_t depth) {
  return groups_of<T>(depth) * kInterleave<T> * kPanelColumns;
}

// Hides where a pointer or an index comes from: the compiler would make up some of its own, one per row, or per k and row.
template <class P>
REPAVIT_INLINE P opaque(P p) {
  __asm__("" : "+r"(p));
  return p;
}

// Where a tile's rows of A stand. Six pointers fit in the integer registers, and move by the index that they share: on
// AVX2, whose products leave few slots to anything else, that is 5 % of the time.
template <class A, int kRows>
struct PointerPerRow {
  const A* row[kRows];
  ptrdiff_t k = 0;

  REPAVIT_INLINE PointerPerRow(const A* data, ptrdiff_t stride) {
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) row[r] = opaque(data + r * stride);
  }
  REPAVIT_INLINE const A* at(int r, ptrdiff_t ahead) const { return row[r] + k + ahead; }
  REPAVIT_INLINE void next_group(ptrdiff_t) {}
  REPAVIT_INLINE void skip(ptrdiff_t elements) {
    k += elements;
    __asm__("" : "+r"(k));
  }
};

// More rows are base + {0, 1, 2} * stride from every third row: a pointer for each would cost a reload per product.
template <class A, int kRows>
struct PointerPerThree {
  static constexpr int kBases = (kRows + 2) / 3;
  const A* base[kBases];
  ptrdiff_t stride;

  REPAVIT_INLINE PointerPerThree(const A* data, ptrdiff_t row_stride) : stride(row_stride) {
    REPAVIT_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = opaque(data + 3 * i * stride);
  }
  REPAVIT_INLINE const A* at(int r, ptrdiff_t) const { return base[r / 3] + (r % 3) * stride; }
  REPAVIT_INLINE void next_group(ptrdiff_t elements) {
    REPAVIT_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = opaque(base[i] + elements);
  }
  REPAVIT_INLINE void skip(ptrdiff_t) {}
};

// Whether a product with this epilogue has whole tiles of columns alone, so that no narrower ones are compiled.
template <class Epilogue>
constexpr bool kWholeTiles = false;

// Whether this epilogue takes all rows of a tile in one call.
template <class Epilogue>
constexpr bool kTakesTiles = false;

// Whether all of its tiles come by way of memory, as those of few rows do: an activation's constants have the registers
// then that the sums had.
template <class Epilogue>
constexpr bool kFromMemory = false;

template <class T, int kRows, int kVectors>
struct Tile {
  using S = SimdOf<T>;
  using V = typename S::V;
  using D = Dot<T>;
  using A = Operand<T>;
  using E = Accumulator<T>;
  static constexpr int kStep = kInterleave<T>;
  static constexpr bool kFewRows = kTileRows <= 6;
  using Left = typename Choose<kFewRows, PointerPerRow<A, kRows>, PointerPerThree<A, kRows>>::Type;
  static constexpr int kUnroll = kFewRows ? 8 : 4;
  // Products added one by one before the sum moves to memory: a longer chain in fp32 loses digits that peers, which block
  // K, still have. Sums of 16-bit products have none to lose.
  static constexpr bool kChains = sizeof(T) == 4;
  static constexpr ptrdiff_t kChain = kChains ? 256 : PTRDIFF_MAX;

  V acc[kRows][kVectors];

  REPAVIT_INLINE void clear() {
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      REPAVIT_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v] = S::zero();
    }
  }

  // Ends a chain: acc += total unless it is the first, total = acc unless it is the last. total is no member: its address
  // escapes, and acc must stay in registers.
  REPAVIT_INLINE void end_chain(E* total, bool first, bool last) {
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      REPAVIT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        E* at = total + (r * kVectors + v) * S::kLanes;
        if (!first) acc[r][v] += S::load(at);
        if (!last) S::store(at, acc[r][v]);
      }
    }
    if (!last) clear();
  }

  // One group of k, `ahead` elements from where the rows of A are: kRows x kVectors products.
  REPAVIT_INLINE void step(Left& rows, ptrdiff_t ahead, const T* b) {
    REPAVIT_UNROLL
    for (int part = 0; part < D::kParts; ++part) {
      typename D::Factor right[kVectors];
      REPAVIT_UNROLL
      for (int v = 0; v < kVectors; ++v) right[v] = D::right(b + v * S::kLanes * kStep, part);
      REPAVIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const typename D::Factor left = D::left(rows.at(r, ahead), part);
        REPAVIT_UNROLL
        for (int v = 0; v < kVectors; ++v) D::accumulate(acc[r][v], left, right[v]);
      }
    }
    rows.next_group(kStep);
  }

  // Adds A B over one segment; b is the first group's row of B, whose rows stand kRow elements apart. fetch(b, left)
  // is called in front of each group, `left` more of its round behind it, and may ask for memory that will be wanted.
  template <int kRow, class Fetch>
  REPAVIT_INLINE void accumulate(const Rows<T>& a, const T* b, Fetch& fetch) {
    Left rows(a.data, a.stride);
    ptrdiff_t groups = groups_of<T>(a.depth);
    for (; groups >= kUnroll; groups -= kUnroll) {
      REPAVIT_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        fetch(b + u * kRow, kUnroll - 1 - u);
        step(rows, u * kStep, b + u * kRow);
      }
      rows.skip(kUnroll * kStep);
      b += kUnroll * kRow;
    }
    for (; groups > 0; --groups, b += kRow) {
      step(rows, 0, b);
      rows.skip(kStep);
    }
  }
};

// Hands a tile to a copy of its epilogue, whole or by rows. No store can change a copy's members: they stay in registers.
template <int kRows, int kVectors, class V, class Epilogue>
REPAVIT_INLINE void finish_tile(const Epilogue& epilogue, ptrdiff_t row, ptrdiff_t col, const V (&acc)[kRows][kVectors],
                                int valid) {
  const Epilogue done = epilogue;
  if constexpr (kTakesTiles<Epilogue>) {
    done(row, col, acc, valid);
  } else {
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) done(row + r, col, acc[r], valid);
  }
}

// Sums on their way to hand_over below.
template <class E>
struct SumsToMemory {
  E* values;

  template <int kRows, int N>
  REPAVIT_INLINE void operator()(ptrdiff_t, ptrdiff_t, const typename Simd<E>::V (&acc)[kRows][N], int) const {
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      REPAVIT_UNROLL
      for (int i = 0; i < N; ++i) Simd<E>::store(values + (r * kTileVectors + i) * Simd<E>::kLanes, acc[r][i]);
    }
  }
};
template <class E>
constexpr bool kTakesTiles<SumsToMemory<E>> = true;

template <int kVectors, class E, class Epilogue>
REPAVIT_INLINE void hand_over_rows(const E* values, int height, ptrdiff_t row, ptrdiff_t col, int valid,
                                   const Epilogue& epilogue) {
  using S = Simd<E>;
  const Epilogue done = epilogue;
  for (int r = 0; r < height; ++r, values += kTileVectors * S::kLanes) {
    typename S::V finished[1][kVectors];
    REPAVIT_UNROLL
    for (int v = 0; v < kVectors; ++v) finished[0][v] = S::load(values + v * S::kLanes);
    finish_tile(done, row + r, col, finished, valid);
  }
}

// finish_tile of a tile that lies in memory, as rows of kTileVectors vectors. Tiles that come this way are compiled once
// for all epilogues: sums of whole numbers, those of the tile unit, and tiles of few rows or columns. The way through L1
// is a hundredth of the shortest product.
template <class E, class Epilogue>
__attribute__((noinline)) void hand_over(const E* values, int height, ptrdiff_t row, ptrdiff_t col, int valid,
                                         const Epilogue& epilogue) {
  if (kWholeTiles<Epilogue> || valid > Simd<E>::kLanes) {
    return hand_over_rows<kTileVectors>(values, height, row, col, valid, epilogue);
  }
  if constexpr (!kWholeTiles<Epilogue>) hand_over_rows<1>(values, height, row, col, valid, epilogue);
}

// What a product asks memory for in front of each group of k: its panel, kBytes of each row of it, ahead of where it is
// read. `left` more groups of the round follow.
struct FetchPanel {
  static constexpr int kDistance = 8192;  // bytes
  template <int kBytes>
  REPAVIT_INLINE void ahead_of(const void* panel, int) const {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(static_cast<const char*>(panel) + kDistance + line);
  }
};

// One tile: rows [row, row + kRows) of C, `valid` columns from `col` on (1 <= valid <= kVectors * kLanes).
// panel points at that column of the panel. Segment i's panel part stands on segment i + 1's.
template <int kRows, int kVectors, class T, class Epilogue, class Fetch>
__attribute__((noinline)) void run_tile(const Rows<T>* segments, int count, const T* panel, ptrdiff_t row, ptrdiff_t col,
                                        int valid, const Epilogue& epilogue, Fetch& fetch) {
  using TileOf = Tile<T, kRows, kVectors>;
  TileOf tile;
  tile.clear();
  alignas(64) typename TileOf::E storage[TileOf::kChains ? kRows * kVectors * TileOf::S::kLanes : 1];
  auto* total = &storage[0];
  __asm__("" : "+r"(total));  // or gcc warns of values that `chains` guards
  constexpr int kBytes = kVectors * TileOf::S::kLanes * TileOf::kStep * static_cast<int>(sizeof(T));
  const auto ahead = [&fetch](const T* b, int left) __attribute__((always_inline)) {
    fetch.template ahead_of<kBytes>(b, left);
  };
  int chains = 0;
  for (int s = 0; s < count; ++s) {
    const Rows<T>& segment = segments[s];
    for (ptrdiff_t k = 0; k < segment.depth; k += TileOf::kChain) {
      if (TileOf::kChains && chains > 0) tile.end_chain(total, chains == 1, false);
      ++chains;
      const ptrdiff_t left = segment.depth - k, depth = left < TileOf::kChain ? left : TileOf::kChain;
      const Rows<T> a{segment.data + row * segment.stride + k, segment.stride, depth};
      tile.template accumulate<kPanelColumns * kInterleave<T>>(a, panel, ahead);
      panel += panel_elements<T>(depth);
      if (depth == left) break;
    }
  }
  if (TileOf::kChains && chains > 1) tile.end_chain(total, false, true);
  finish_tile(epilogue, row, col, tile.acc, valid);
}

// Calls run with the height of a tile, kLeast to kMost rows, as a constant.
template <int kLeast, int kMost, class Run>
REPAVIT_INLINE void with_height(int height, const Run& run) {
  if (kLeast == kMost || height == kMost) return run(Constant<kMost>{});
  if constexpr (kLeast < kMost) with_height<kLeast, kMost - 1>(height, run);
}

// Runs one tile: run(height as a constant, epilogue), where the epilogue of a tile of few rows or columns is one that leaves
// its sums in memory, from where hand_over takes those that are `complete`.
template <int kVectors, class E, class Epilogue, class Run>
REPAVIT_INLINE void with_tile(int height, ptrdiff_t row, ptrdiff_t col, int valid, bool complete, const Epilogue& epilogue,
                              const Run& run) {
  constexpr bool kInRegisters = kVectors == kTileVectors && !kFromMemory<Epilogue> && kTallRows <= kTileRows;
  if constexpr (kInRegisters) {
    if (height >= kTallRows) {
      return with_height<kTallRows, kTileRows>(height, [&](auto rows) { run(rows, epilogue); });
    }
  }
  alignas(64) E values[kTileRows * kTileVectors * Simd<E>::kLanes];
  const SumsToMemory<E> to_memory{values};
  with_height<1, kInRegisters ? kTallRows - 1 : kTileRows>(height, [&](auto rows) { run(rows, to_memory); });
  if (complete) hand_over(values, height, row, col, valid, epilogue);
}

// As gemm below, for few rows: the panels are read as they stand, once per tile. `fetch` may ask for other memory than
// theirs.
template <class T, class Epilogue, class Fetch>
void gemm_direct(const Rows<T>* segments, int count, ptrdiff_t rows, const T* panels, ptrdiff_t panel_stride,
                 ptrdiff_t columns, const Epilogue& epilogue, Fetch& fetch) {
  constexpr int kLanes = SimdOf<T>::kLanes, kWide = kTileVectors * kLanes;
  const RowTiles tiles(rows);
  for (ptrdiff_t first = 0; first < columns; first += kPanelColumns, panels += panel_stride) {
    const ptrdiff_t end = first + kPanelColumns < columns ? first + kPanelColumns : columns;
    for (ptrdiff_t col = first; col < end; col += kWide) {
      const T* panel = panels + (col - first) * kInterleave<T>;
      const int valid = static_cast<int>(end - col < kWide ? end - col : kWide);
      for (ptrdiff_t t = 0, row = 0; t < tiles.count; row += tiles.height(t++)) {
        const int height = tiles.height(t);
        if (kWholeTiles<Epilogue> || valid > kLanes) {
          with_tile<kTileVectors, Accumulator<T>>(height, row, col, valid, true, epilogue, [&](auto rows_of, const auto& done) {
            run_tile<rows_of.value, kTileVectors>(segments, count, panel, row, col, valid, done, fetch);
          });
        } else if constexpr (!kWholeTiles<Epilogue>) {
          with_tile<1, Accumulator<T>>(height, row, col, valid, true, epilogue, [&](auto rows_of, const auto& done) {
            run_tile<rows_of.value, 1>(segments, count, panel, row, col, valid, done, fetch);
          });
        }
      }
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit

#if REPAVIT_ISA_LEVEL < 2
#include "gemm_chunked-inl.h"
#elif REPAVIT_ISA_LEVEL >= 4
#include "gemm_unit-inl.h"
#endif

namespace repavit {
namespace REPAVIT_ISA {

// gemm_<T>: C[rows, columns] = epilogue(sum_i A_i B_iᵀ) over `count` segments stacked in the same panels.
//
// panels: ceil(columns / 32) panels, panel_stride elements apart. Each panel meets all rows before the next, so it comes
// from outer memory once.
//
// Epilogue: called once per row and group of columns of C as
//     template <int N> void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const
// with columns [col, col + valid) of the row in acc, valid <= N * kLanes; lanes from `valid` on are finite rubbish if A
// is finite (zero weights) and must not be stored beyond C. Mark operator() always_inline: acc lives in registers. One that
// says kTakesTiles is called once per tile, with V (&acc)[kRows][N].
template <class T, class Epilogue>
REPAVIT_INLINE void gemm(const Rows<T>* segments, int count, ptrdiff_t rows, const T* panels, ptrdiff_t panel_stride,
                         ptrdiff_t columns, const Epilogue& epilogue) {
#if REPAVIT_ISA_LEVEL < 2
  gemm_chunked(segments, count, rows, panels, panel_stride, columns, epilogue);
#else
  FetchPanel fetch;
  gemm_direct(segments, count, rows, panels, panel_stride, columns, epilogue, fetch);
#endif
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
