// C = epilogue(sum over segments of A Bᵀ) for quantized rows and panels of int8_t: whole numbers until a segment ends.
//
// A segment's sums are exact. They become floats once, when the segment is done,
//     (sum · scale of the row + offset of the row · sum of the column) · scale of the column,
// and floats of several segments add up: rows that were scaled differently, as H and z of an FFN, need no common unit, and
// no ratio of scales can overflow. The epilogue is handed floats, as from gemm().
#pragma once

#include "arena.h"
#include "gemm-inl.h"
#include "quantize_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Bytes of one panel over the given depth.
REPAVIT_INLINE ptrdiff_t int8_panel_bytes(ptrdiff_t depth) {
  return static_cast<ptrdiff_t>(sizeof(Int8Columns)) + groups_of<int8_t>(depth) * kInterleave<int8_t> * kPanelColumns;
}

// One left operand: rows of `depth` whole numbers q, row r at data + r * stride, each meaning scale q + offset of its row.
template <class O>
struct Int8Rows {
  const O* data;
  ptrdiff_t stride;
  ptrdiff_t depth;
  const RowScale* scales;

  Int8Rows from(ptrdiff_t row, ptrdiff_t k) const { return {data + row * stride + k, stride, depth, scales + row}; }
};

// The numbers that stand on top of a panel (Int8Columns), for the columns of one tile. They may be at any address.
struct Int8Head {
  using I = Simd<int32_t>;
  using F = Simd<float>;
  const char* columns;
  ptrdiff_t first;  // of the panel's columns

  REPAVIT_INLINE F::V scale(int v) const { return F::load(reinterpret_cast<const float*>(at(offsetof(Int8Columns, scale), v))); }
  REPAVIT_INLINE F::V sum(int v) const {
    return I::to_float(I::load(reinterpret_cast<const int32_t*>(at(offsetof(Int8Columns, sum), v))));
  }

 private:
  REPAVIT_INLINE const char* at(size_t field, int v) const {
    return columns + field + sizeof(float) * static_cast<size_t>(first + v * F::kLanes);
  }
};

constexpr ptrdiff_t kInt8Wide = kTileVectors * Simd<int32_t>::kLanes;  // columns of a tile

// The end of a segment: a tile's sums as floats, with those of the segments before it, if there are any, to `to`. Both
// [rows][kInt8Wide]; they may be the same.
template <int kRows>
REPAVIT_INLINE void finish_segment(const Simd<int32_t>::V (&sums)[kRows][kTileVectors], const Int8Head& head,
                                   const RowScale* rows, const float* before, float* to) {
  using I = Simd<int32_t>;
  using F = Simd<float>;
  F::V scale[kTileVectors], sum[kTileVectors];
  REPAVIT_UNROLL
  for (int v = 0; v < kTileVectors; ++v) scale[v] = head.scale(v), sum[v] = head.sum(v);
  REPAVIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const F::V by = F::broadcast(rows[r].scale), offset = F::broadcast(rows[r].offset);
    REPAVIT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      const ptrdiff_t at = r * kInt8Wide + v * F::kLanes;
      const F::V value = F::fma(offset, sum[v], I::to_float(sums[r][v]) * by);
      // Both by name: the compiler would add in one instruction or two, and other heights of tiles otherwise.
      F::store(to + at, before != nullptr ? F::fma(value, scale[v], F::load(before + at)) : value * scale[v]);
    }
  }
}

// ---- Rows of bytes meet panels as they are ---------------------------------------------------------------------------

#if REPAVIT_ISA_LEVEL >= 4

// gemm_int8: C[rows, columns] = epilogue(sum_i A_i B_iᵀ) over `count` >= 1 segments stacked in the same panels, which stand
// panel_stride bytes apart. Epilogue as in gemm(); lanes from `valid` on are rubbish.
template <class Epilogue>
void gemm_int8(const Int8Rows<uint8_t>* segments, int count, ptrdiff_t rows, const int8_t* panels, ptrdiff_t panel_stride,
               ptrdiff_t columns, const Epilogue& epilogue) {
  using I = Simd<int32_t>;
  if (rows == 0 || columns == 0) return;
  UnitProduct<int8_t> product(
      count, rows, sizeof(Int8Columns), [&](int s) { return reinterpret_cast<const char*>(segments[s].data); },
      [&](int s) { return segments[s].stride; }, [&](int s) { return segments[s].depth; });
  UnitSums sums;
  FetchPanel fetch;
  alignas(64) float values[kBlockRows * kPanelColumns];
  const RowTiles blocks(rows, kBlockRows);
  for (ptrdiff_t col = 0; col < columns; col += kPanelColumns, panels += panel_stride) {
    const auto* panel = reinterpret_cast<const char*>(panels);
    product.take_panel(panel);
    for (ptrdiff_t b = 0, row = 0; b < blocks.count; row += blocks.height(b++)) {
      const int height = blocks.height(b);
      for (int s = 0; s < count; ++s) {
        product.run(s, s + 1, row, height, true, sums, fetch);
        const Int8Head head{panel + product.panel_offset(s) - sizeof(Int8Columns), 0};
        for (int r = 0; r < height; ++r) {
          const auto* whole = reinterpret_cast<const int32_t*>(sums.numbers) + r * kPanelColumns;
          const I::V row_sums[1][kTileVectors] = {{I::load(whole), I::load(whole + I::kLanes)}};
          float* const to = values + r * kPanelColumns;
          finish_segment(row_sums, head, segments[s].scales + row + r, s == 0 ? nullptr : to, to);
        }
      }
      hand_over(values, height, row, col, static_cast<int>(least(columns - col, kPanelColumns)), epilogue);
    }
  }
}

#elif REPAVIT_BYTE_PRODUCTS

// One tile: rows of A from `row` on, columns of a panel from `first` on.
template <int kRows>
__attribute__((noinline)) void run_int8_tile(const Int8Rows<uint8_t>* segments, int count, const char* panel, ptrdiff_t row,
                                             ptrdiff_t first, float* values) {
  using TileOf = Tile<int8_t, kRows, kTileVectors>;
  constexpr int kBytes = static_cast<int>(kInt8Wide) * kInterleave<int8_t>;
  const auto ahead = [](const int8_t* b, int left) __attribute__((always_inline)) {
    FetchPanel().ahead_of<kBytes>(b, left);
  };
  for (int s = 0; s < count; ++s) {
    const Int8Rows<uint8_t> rows = segments[s].from(row, 0);
    const auto* numbers = reinterpret_cast<const int8_t*>(panel + sizeof(Int8Columns)) + first * kInterleave<int8_t>;
    TileOf tile;
    tile.clear();
    tile.template accumulate<kPanelColumns * kInterleave<int8_t>>({rows.data, rows.stride, rows.depth}, numbers, ahead);
    const Int8Head head{panel, first};
    finish_segment(tile.acc, head, rows.scales, s == 0 ? nullptr : values, values);
    panel += int8_panel_bytes(rows.depth);
  }
}

// gemm_int8: C[rows, columns] = epilogue(sum_i A_i B_iᵀ) over `count` >= 1 segments stacked in the same panels, which stand
// panel_stride bytes apart. Epilogue as in gemm(); lanes from `valid` on are rubbish.
template <class Epilogue>
void gemm_int8(const Int8Rows<uint8_t>* segments, int count, ptrdiff_t rows, const int8_t* panels, ptrdiff_t panel_stride,
               ptrdiff_t columns, const Epilogue& epilogue) {
  alignas(64) float values[kTileRows * kInt8Wide];
  const RowTiles tiles(rows);
  for (ptrdiff_t panel = 0; panel < columns; panel += kPanelColumns, panels += panel_stride) {
    for (ptrdiff_t first = 0; first < least(kPanelColumns, columns - panel); first += kInt8Wide) {
      const ptrdiff_t col = panel + first;
      const int valid = static_cast<int>(least(columns - col, kInt8Wide));
      for (ptrdiff_t t = 0, row = 0; t < tiles.count; row += tiles.height(t++)) {
        const int height = tiles.height(t);
        with_height<1, kTileRows>(height, [&](auto rows_of) {
          run_int8_tile<rows_of.value>(segments, count, reinterpret_cast<const char*>(panels), row, first, values);
        });
        hand_over(values, height, row, col, valid, epilogue);
      }
    }
  }
}

#endif

// ---- Rows of int16_t meet a chunk of a panel that was widened into L1 ------------------------------------------------

#if REPAVIT_ISA_LEVEL <= 1

constexpr ptrdiff_t kInt8Chunk = 512;  // k at a time: with 16 columns 16 KiB once widened

// Of lanes of four bytes the first two, or the last two, as 16-bit numbers with their signs.
template <int kFirst>
REPAVIT_INLINE Simd<int32_t>::V widened_pair(Simd<int32_t>::V quads) {
#if REPAVIT_ISA_LEVEL == 1
  constexpr int kFour = kFirst << 8 | (kFirst + 1) << 24 | 0x800080;  // each byte on top of 16 bits, then down again
  const __m256i bytes = _mm256_setr_epi32(kFour, kFour + 0x04000400, kFour + 0x08000800, kFour + 0x0c000c00, kFour,
                                          kFour + 0x04000400, kFour + 0x08000800, kFour + 0x0c000c00);
  return (Simd<int32_t>::V)_mm256_srai_epi16(_mm256_shuffle_epi8((__m256i)quads, bytes), 8);
#else
  const auto low = quads << (24 - 8 * kFirst) >> 24, high = quads << (16 - 8 * kFirst) >> 24;
  return (low & 0xffff) | high << 16;
#endif
}

// A tile's columns of groups of four k from b on, as pairs of k: chunk [depth / 2][kInt8Wide][2].
REPAVIT_INLINE void widen_chunk(const int8_t* b, ptrdiff_t groups, int16_t* chunk) {
  constexpr int kLanes = Simd<int32_t>::kLanes, kRow = 2 * kTileVectors * kLanes;
  for (ptrdiff_t g = 0; g < groups; ++g, b += kPanelColumns * kInterleave<int8_t>, chunk += 2 * kRow) {
    for (int v = 0; v < kTileVectors; ++v) {
      Simd<int32_t>::V quads;
      __builtin_memcpy(&quads, b + v * kLanes * kInterleave<int8_t>, sizeof(quads));
      const auto even = widened_pair<0>(quads), odd = widened_pair<2>(quads);
      __builtin_memcpy(chunk + v * 2 * kLanes, &even, sizeof(even));
      __builtin_memcpy(chunk + kRow + v * 2 * kLanes, &odd, sizeof(odd));
    }
  }
}

// What is kept of a strip between chunks (whole numbers) and segments (floats): [columns][rows], a tile's together.
struct Int8Sums {
  int32_t* sums;
  float* totals;

  Int8Sums at(ptrdiff_t i) const { return {sums + i, totals + i}; }
};

// Where a chunk is: of its segment the first starts the sums, the last ends them; of the segments likewise.
struct Int8Place {
  bool first, last, first_segment, last_segment;
};

struct NoFetch {
  template <class B>
  REPAVIT_INLINE void operator()(const B*, int) const {}
};

// One tile over one chunk. Once the last segment is done its floats are in `values`.
template <int kRows>
__attribute__((noinline)) void run_int8_chunk(const Int8Rows<int16_t>& rows, const int16_t* chunk, const Int8Head& head,
                                              Int8Sums at, Int8Place place, float* values) {
  using I = Simd<int32_t>;
  Tile<int16_t, kRows, kTileVectors> tile;
  REPAVIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    REPAVIT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      tile.acc[r][v] = place.first ? I::zero() : I::load(at.sums + r * kInt8Wide + v * I::kLanes);
    }
  }
  const NoFetch fetch;
  tile.template accumulate<2 * kInt8Wide>({rows.data, rows.stride, rows.depth}, chunk, fetch);
  if (place.last) {
    return finish_segment(tile.acc, head, rows.scales, place.first_segment ? nullptr : at.totals,
                          place.last_segment ? values : at.totals);
  }
  REPAVIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    REPAVIT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) I::store(at.sums + r * kInt8Wide + v * I::kLanes, tile.acc[r][v]);
  }
}

// One chunk of a segment, of all columns: `rows` is the strip's part of it, `offset` where the segment's part of a panel
// starts, `done` how many of its k were before.
template <class Epilogue>
void run_int8_columns(const Int8Rows<int16_t>& rows, ptrdiff_t begin, ptrdiff_t height, const int8_t* panels,
                      ptrdiff_t panel_stride, ptrdiff_t offset, ptrdiff_t done, ptrdiff_t columns, Int8Sums sums,
                      Int8Place place, const Epilogue& epilogue) {
  alignas(64) int16_t chunk[kInt8Chunk * kInt8Wide];
  alignas(64) float values[kTileRows * kInt8Wide];
  const RowTiles tiles(height);
  for (ptrdiff_t panel = 0; panel < columns; panel += kPanelColumns, panels += panel_stride) {
    const int8_t* const part = panels + offset;
    for (ptrdiff_t first = 0; first < least(kPanelColumns, columns - panel); first += kInt8Wide) {
      const Int8Head head{reinterpret_cast<const char*>(part), first};
      widen_chunk(part + sizeof(Int8Columns) + done * kPanelColumns + first * kInterleave<int8_t>,
                  groups_of<int8_t>(rows.depth), chunk);
      const ptrdiff_t col = panel + first;
      const int valid = static_cast<int>(least(columns - col, kInt8Wide));
      for (ptrdiff_t t = 0, row = 0; t < tiles.count; row += tiles.height(t++)) {
        const int tall = tiles.height(t);
        with_height<1, kTileRows>(tall, [&](auto rows_of) {
          run_int8_chunk<rows_of.value>(rows.from(row, 0), chunk, head, sums.at(col * height + row * kInt8Wide), place, values);
        });
        if (place.last && place.last_segment) hand_over(values, tall, begin + row, col, valid, epilogue);
      }
    }
  }
}

template <class Epilogue>
void gemm_int8(const Int8Rows<int16_t>* segments, int count, ptrdiff_t rows, const int8_t* panels, ptrdiff_t panel_stride,
               ptrdiff_t columns, const Epilogue& epilogue) {
  if (rows == 0 || columns == 0) return;
  bool chunks = false;
  for (int s = 0; s < count; ++s) chunks |= segments[s].depth > kInt8Chunk;
  const ptrdiff_t strips = (rows + kStripRows - 1) / kStripRows, tallest = (rows + strips - 1) / strips;
  const size_t numbers = static_cast<size_t>(tallest * whole_panels(columns));
  const size_t sum_bytes = chunks ? sizeof(int32_t) * numbers : 0, total_bytes = count > 1 ? sizeof(float) * numbers : 0;
  char* const memory = static_cast<char*>(product_arena(sum_bytes + total_bytes));
  const Int8Sums sums{reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory + sum_bytes)};
  for (ptrdiff_t strip = 0; strip < strips; ++strip) {
    const ptrdiff_t begin = rows * strip / strips, height = rows * (strip + 1) / strips - begin;
    ptrdiff_t offset = 0;
    for (int s = 0; s < count; ++s) {
      const ptrdiff_t depth = segments[s].depth;
      for (ptrdiff_t k = 0; k == 0 || k < depth; k += kInt8Chunk) {
        Int8Rows<int16_t> part = segments[s].from(begin, k);
        part.depth = least(kInt8Chunk, depth - k);
        const Int8Place place{k == 0, k + part.depth == depth, s == 0, s + 1 == count};
        run_int8_columns(part, begin, height, panels, panel_stride, offset, k, columns, sums, place, epilogue);
      }
      offset += int8_panel_bytes(depth);
    }
  }
}

#endif

}  // namespace REPAVIT_ISA
}  // namespace repavit
