// gemm for levels whose tile is too narrow to read panels from L2 at the rate of its products.
//
// A chunk of K of one tile's columns is copied to L1, converted to the accumulator's type on the way (16-bit weights cost
// nothing after that), and meets a whole strip of rows, whose sums wait in L1 from chunk to chunk. The strip's rows of A
// stay in L2. Sums come out as in gemm_direct: chains of kChunk products, added in order.
#pragma once

#include "arena.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr ptrdiff_t kChunk = 256;      // k at a time: 16 KiB of a 16-column chunk
constexpr ptrdiff_t kStripRows = 96;  // at most: 6 KiB of sums

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

constexpr int kPanelBytes = 128;  // of one group of k

// Which part of K a tile is at: the first starts the sums, the last hands them to the epilogue.
struct ChunkPlace {
  bool first, last;
};

// One tile over one chunk: rows [row, row + kRows) of C; `a` and `sums` are those of its first row, `ahead` its share of
// the panel rows to fetch.
template <int kRows, int kVectors, class E, class Epilogue>
__attribute__((noinline)) void run_chunk(const Rows<E>& a, const E* chunk, E* sums, const char* ahead,
                                         ChunkPlace place, ptrdiff_t row, ptrdiff_t col, int valid,
                                         const Epilogue& epilogue) {
  using S = Simd<E>;
  Tile<E, kRows, kVectors> tile;
  tile.clear();
  tile.template accumulate<kVectors * S::kLanes, 1, kPanelBytes>(a, chunk, ahead);
  if (!place.first || !place.last) tile.end_chain(sums, place.first, place.last);
  if (!place.last) return;
  REPAVIT_UNROLL
  for (int r = 0; r < kRows; ++r) epilogue(row + r, col, tile.acc[r], valid);
}

template <int kMaxRows, int kVectors, class E, class Epilogue>
REPAVIT_INLINE void choose_chunk_rows(int rows, const Rows<E>& a, const E* chunk, E* sums, const char* ahead,
                                      ChunkPlace place, ptrdiff_t row, ptrdiff_t col, int valid,
                                      const Epilogue& epilogue) {
  if (rows == kMaxRows) return run_chunk<kMaxRows, kVectors>(a, chunk, sums, ahead, place, row, col, valid, epilogue);
  if constexpr (kMaxRows > 1) {
    choose_chunk_rows<kMaxRows - 1, kVectors>(rows, a, chunk, sums, ahead, place, row, col, valid, epilogue);
  }
}

// Columns [col, col + valid) of a strip of rows, kVectors vectors wide; panel points at the first of them, next_panel at
// what will be wanted after them. While one chunk is at work, the next one comes to L2.
template <int kVectors, class T, class Epilogue>
void run_strip(const Rows<T>* segments, int count, ptrdiff_t begin, ptrdiff_t end, const T* panel,
               const T* next_panel, ptrdiff_t col, int valid, const Epilogue& epilogue) {
  using E = Accumulator<T>;
  constexpr ptrdiff_t kWidth = kVectors * Simd<E>::kLanes;
  alignas(64) E chunk_storage[kChunk * kWidth], sums_storage[kStripRows * kWidth];
  E *chunk = chunk_storage, *sums = sums_storage;
  __asm__("" : "+r"(chunk), "+r"(sums));  // or gcc warns of values that `place` guards
  ptrdiff_t left = 0;  // chunks to come
  for (int s = 0; s < count; ++s) left += (segments[s].depth + kChunk - 1) / kChunk;
  const ptrdiff_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  const auto run = [&](const E* a, ptrdiff_t stride, ptrdiff_t depth, const T* next, ChunkPlace place) {
    const ptrdiff_t groups = groups_of<T>(depth);
    const char* ahead = reinterpret_cast<const char*>(next);
    for (ptrdiff_t t = 0; t < tiles; ++t) {
      const ptrdiff_t row = rows * t / tiles;
      const int height = static_cast<int>(rows * (t + 1) / tiles - row);
      choose_chunk_rows<kTileRows, kVectors>(height, Rows<E>{a + row * stride, stride, depth}, chunk,
                                             sums + row * kWidth, ahead + groups * t / tiles * kPanelBytes, place,
                                             begin + row, col, valid, epilogue);
    }
  };
  if (left == 0) return run(nullptr, 0, 0, next_panel, {true, true});
  bool first = true;
  for (int s = 0; s < count; ++s) {
    for (ptrdiff_t k = 0; k < segments[s].depth; k += kChunk, first = false) {
      const ptrdiff_t rest = segments[s].depth - k, depth = rest < kChunk ? rest : kChunk;
      expand_chunk<kVectors>(panel, depth, chunk);
      panel += panel_elements<T>(depth);
      --left;
      run(segments[s].data + begin * segments[s].stride + k, segments[s].stride, depth, left > 0 ? panel : next_panel,
          {first, left == 0});
    }
  }
}

template <class T, class Epilogue>
void gemm_chunked(const Rows<T>* segments, int count, ptrdiff_t rows, const T* panels, ptrdiff_t panel_stride,
                  ptrdiff_t columns, const Epilogue& epilogue) {
  constexpr int kLanes = SimdOf<T>::kLanes, kWide = kTileVectors * kLanes;
  ptrdiff_t depth = 1;
  for (int s = 0; s < count; ++s) depth += segments[s].depth;
  constexpr ptrdiff_t kElement = sizeof(Accumulator<T>);
  const ptrdiff_t in_l2 = static_cast<ptrdiff_t>(l2_cache_bytes()) / 2 / (depth * kElement);
  const ptrdiff_t limit = in_l2 < 4 * kTileRows ? 4 * kTileRows : in_l2 < kStripRows ? in_l2 : kStripRows;
  const ptrdiff_t strips = (rows + limit - 1) / limit;
  for (ptrdiff_t strip = 0; strip < strips; ++strip) {
    const ptrdiff_t begin = rows * strip / strips, end = rows * (strip + 1) / strips;
    const T* panel = panels;
    for (ptrdiff_t first = 0; first < columns; first += kPanelColumns, panel += panel_stride) {
      const ptrdiff_t last = first + kPanelColumns < columns ? first + kPanelColumns : columns;
      for (ptrdiff_t col = first; col < last; col += kWide) {
        const T* at = panel + (col - first) * kInterleave<T>;
        const T* next = col + kWide < last ? at + kWide * kInterleave<T> : panel + panel_stride;
        const int valid = static_cast<int>(last - col < kWide ? last - col : kWide);
        if (valid > kLanes) {
          run_strip<kTileVectors>(segments, count, begin, end, at, next, col, valid, epilogue);
        } else {
          run_strip<1>(segments, count, begin, end, at, next, col, valid, epilogue);
        }
      }
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
