// gemm for levels whose tile is too narrow to read panels from L2 at the rate of its products.
//
// K goes in chunks, outermost: a strip of rows of A keeps its part of one chunk in L2 while all columns pass by. A chunk
// of one tile's columns is copied to L1, converted to the accumulator's type on the way (16-bit weights cost nothing
// after that), and meets the whole strip. Between chunks the sums wait in memory, one move for 256 products. They come
// out as in gemm_direct: chains of kChunk products, added in order.
#pragma once

#include "arena.h"
#include "scratch-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr ptrdiff_t kChunk = 256;  // k at a time: 16 KiB of a 16-column chunk

// Groups of a panel from b on, `depth` k, as rows of kVectors vectors of the accumulator's type.
template <int kVectors, class T>
REPAVIT_INLINE void expand_chunk(const T* b, ptrdiff_t depth, Accumulator<T>* chunk) {
  using S = SimdOf<T>;
  using D = Dot<T>;
  static_assert(D::kParts == kInterleave<T>, "each part of a group is one k");
  constexpr int kStep = kInterleave<T>;
  for (ptrdiff_t k = 0; k < depth; k += kStep, b += kPanelColumns * kStep) {
    REPAVIT_UNROLL
    for (int part = 0; part < kStep; ++part) {
      if (k + part == depth) break;
      REPAVIT_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        S::store(chunk, D::right(b + v * S::kLanes * kStep, part));
        chunk += S::kLanes;
      }
    }
  }
}

// Which part of K a tile is at: the first starts the sums, the last hands them to the epilogue.
struct ChunkPlace {
  bool first, last;
};

// Brings groups [next, end) of a panel, 64 bytes of each, to L2: some while the products run, not to stop the loads of A,
// and what is left behind them.
template <class T>
struct FetchNext {
  const T *next, *end;

  REPAVIT_INLINE void one() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    next += kPanelColumns * kInterleave<T>;
  }
  template <class E>
  REPAVIT_INLINE void operator()(const E*, int left) {
    if (left == 0) one();
  }
  REPAVIT_INLINE void rest() {
    while (next < end) one();
  }
};

// One tile over one chunk: rows [row, row + kRows) of C; `a` and `sums` are those of its first row.
template <int kRows, int kVectors, class E, class T, class Epilogue>
__attribute__((noinline)) void run_chunk(const Rows<E>& a, const E* chunk, FetchNext<T> fetch, E* sums, ChunkPlace place,
                                         ptrdiff_t row, ptrdiff_t col, int valid, const Epilogue& epilogue) {
  Tile<E, kRows, kVectors> tile;
  tile.clear();
  tile.template accumulate<kVectors * Simd<E>::kLanes>(a, chunk, fetch);
  fetch.rest();
  if (!place.first || !place.last) tile.end_chain(sums, place.first, place.last);
  if (!place.last) return;
  finish_tile(epilogue, row, col, tile.acc, valid);
}

// Columns [col, col + valid) of a strip, kVectors vectors wide, over one chunk. a: the strip's rows from this chunk's k
// on, `rows` of them, row `begin` of C the first; panel points at the chunk's first group of the columns, next at what
// will be wanted after it.
template <int kVectors, class T, class Epilogue>
void run_strip(const Rows<T>& a, ptrdiff_t begin, ptrdiff_t rows, const T* panel, const T* next, Accumulator<T>* sums,
               ChunkPlace place, ptrdiff_t col, int valid, const Epilogue& epilogue) {
  using E = Accumulator<T>;
  constexpr ptrdiff_t kWidth = kVectors * Simd<E>::kLanes;
  alignas(64) E storage[kChunk * kWidth];
  E* chunk = storage;
  __asm__("" : "+r"(chunk));  // or gcc warns of values that a depth of 0 leaves undefined and unread
  expand_chunk<kVectors>(panel, a.depth, chunk);
  const RowTiles tiles(rows);
  const ptrdiff_t groups = groups_of<T>(a.depth), share = (groups + tiles.count - 1) / tiles.count;
  const auto next_from = [&](ptrdiff_t t) { return next + least(t * share, groups) * kPanelColumns * kInterleave<T>; };
  for (ptrdiff_t t = 0, row = 0; t < tiles.count; row += tiles.height(t++)) {
    const int height = tiles.height(t);
    const Rows<E> left{a.data + row * a.stride, a.stride, a.depth};
    const FetchNext<T> fetch{next_from(t), next_from(t + 1)};
    with_tile<kVectors, E>(height, begin + row, col, valid, place.last, epilogue, [&](auto rows_of, const auto& done) {
      run_chunk<rows_of.value, kVectors>(left, chunk, fetch, sums + row * kWidth, place, begin + row, col, valid, done);
    });
  }
}

// All columns of a strip over one chunk, which starts `offset` elements into every panel. sums: [columns][rows] of the
// strip, a tile's columns together.
template <class T, class Epilogue>
void run_columns(const Rows<T>& a, ptrdiff_t begin, ptrdiff_t rows, const T* panels, ptrdiff_t panel_stride,
                 ptrdiff_t offset, ptrdiff_t columns, Accumulator<T>* sums, ChunkPlace place,
                 const Epilogue& epilogue) {
  constexpr int kLanes = SimdOf<T>::kLanes, kWide = kTileVectors * kLanes;
  const T* after = panels + offset + panel_elements<T>(a.depth);  // the next chunk of the first panel
  for (ptrdiff_t first = 0; first < columns; first += kPanelColumns, panels += panel_stride) {
    const ptrdiff_t last = least(first + kPanelColumns, columns);
    for (ptrdiff_t col = first; col < last; col += kWide) {
      const T* at = panels + offset + (col - first) * kInterleave<T>;
      const T* next = col + kWide < last ? at + kWide * kInterleave<T> : panels + panel_stride + offset;
      if (col + kWide >= columns) next = after;
      const int valid = static_cast<int>(least(last - col, kWide));
      if (kWholeTiles<Epilogue> || valid > kLanes) {
        run_strip<kTileVectors>(a, begin, rows, at, next, sums + col * rows, place, col, valid, epilogue);
      } else if constexpr (!kWholeTiles<Epilogue>) {
        run_strip<1>(a, begin, rows, at, next, sums + col * rows, place, col, valid, epilogue);
      }
    }
  }
}

template <class T, class Epilogue>
void gemm_chunked(const Rows<T>* segments, int count, ptrdiff_t rows, const T* panels, ptrdiff_t panel_stride,
                  ptrdiff_t columns, const Epilogue& epilogue) {
  using E = Accumulator<T>;
  if (rows == 0 || columns == 0) return;
  ptrdiff_t chunks = 0;
  for (int s = 0; s < count; ++s) chunks += (segments[s].depth + kChunk - 1) / kChunk;
  const ptrdiff_t strips = (rows + kStripRows - 1) / kStripRows, tallest = (rows + strips - 1) / strips;
  const size_t bytes = sizeof(E) * static_cast<size_t>(tallest * whole_panels(columns));
  E* sums = static_cast<E*>(product_arena(chunks > 1 ? bytes : 0));
  for (ptrdiff_t strip = 0; strip < strips; ++strip) {
    const ptrdiff_t begin = rows * strip / strips, height = rows * (strip + 1) / strips - begin;
    const auto run = [&](const Rows<T>& a, ptrdiff_t offset, ChunkPlace place) {
      run_columns(a, begin, height, panels, panel_stride, offset, columns, sums, place, epilogue);
    };
    if (chunks == 0) run({nullptr, 0, 0}, 0, {true, true});
    ptrdiff_t offset = 0, done = 0;
    for (int s = 0; s < count; ++s) {
      for (ptrdiff_t k = 0; k < segments[s].depth; k += kChunk, ++done) {
        const ptrdiff_t depth = least(kChunk, segments[s].depth - k);
        run({segments[s].data + begin * segments[s].stride + k, segments[s].stride, depth}, offset,
            {done == 0, done + 1 == chunks});
        offset += panel_elements<T>(depth);
      }
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
