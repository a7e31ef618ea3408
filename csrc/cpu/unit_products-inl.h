// Products of rows and panels on the tile unit: 32 rows and a panel's 32 columns in four tiles of sums, 64 bytes of each
// row and 16 groups of k of the panel in a step. Panels are read as they are: their groups of k are the unit's.
//
// Sums are added up in the same order for every row, wherever it stands: same bits in any block of rows, batch and number
// of threads. They come out by way of L1, so that blocks are compiled once for all epilogues.
#pragma once

#include "arena.h"
#include "scratch-inl.h"
#include "tile_unit-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr int kBlockRows = 2 * kUnitRows;  // of a block of four tiles
constexpr int kStepBytes = kUnitRows * 2 * kUnitBytes;  // of a panel

static_assert(kTileVectors * Simd<float>::kLanes == kPanelColumns, "a block's rows are handed over as tiles are");

// One segment of a product: rows `stride` bytes apart, so many whole steps of them, and a last one that is filled up with
// zeros, of [rows][64] and [16][128] bytes, or null.
struct UnitSegment {
  const char* rows;
  ptrdiff_t stride, steps;
  char *last_of_rows, *last_of_panel;
  ptrdiff_t panel_offset;  // bytes from a panel's start to the segment's part of it
};

// Sums of one block as it comes: [rows][32] of float or int32_t.
struct alignas(64) UnitSums {
  float numbers[kBlockRows * kPanelColumns];
};

// Loads the shapes of blocks of `height` rows.
inline void shape_unit(int height) {
  UnitConfiguration shapes;
  const int upper = height <= kUnitRows ? height : (height + 1) / 2, lower = height - upper;
  for (int i = 0; i < 2; ++i) {
    shapes.tile(i, upper);
    if (lower > 0) shapes.tile(2 + i, lower);
    shapes.tile(6 + i, kUnitRows);
  }
  shapes.tile(4, upper);
  if (lower > 0) shapes.tile(5, lower);
  TileUnit::configure(shapes);
}

// One step: tiles 4 and 5 of the rows, 6 and 7 of the panel, sums in 0 to 3.
template <class T, bool kTwoOfRows, bool kTwoOfColumns>
REPAVIT_INLINE void unit_step(const char* rows, const char* lower_rows, ptrdiff_t stride, const char* panel) {
  TileUnit::load<6>(panel, 2 * kUnitBytes);
  TileUnit::load<4>(rows, stride);
  TileUnit::multiply<T, 0, 4, 6>();
  if constexpr (kTwoOfColumns) {
    TileUnit::load<7>(panel + kUnitBytes, 2 * kUnitBytes);
    TileUnit::multiply<T, 1, 4, 7>();
  }
  if constexpr (kTwoOfRows) {
    TileUnit::load<5>(lower_rows, stride);
    TileUnit::multiply<T, 2, 5, 6>();
    if constexpr (kTwoOfColumns) TileUnit::multiply<T, 3, 5, 7>();
  }
}

// The rows from `row` on of a block, over all segments.
template <class T, bool kTwoOfRows, bool kTwoOfColumns, class Fetch>
__attribute__((noinline)) void unit_block(const UnitSegment* segments, int count, ptrdiff_t row, int height,
                                          const char* panel, UnitSums& sums, Fetch& fetch) {
  const ptrdiff_t upper = kTwoOfRows ? (height + 1) / 2 : height;
  TileUnit::zero<0>();
  if constexpr (kTwoOfColumns) TileUnit::zero<1>();
  if constexpr (kTwoOfRows) TileUnit::zero<2>();
  if constexpr (kTwoOfRows && kTwoOfColumns) TileUnit::zero<3>();
  for (int s = 0; s < count; ++s) {
    const UnitSegment& segment = segments[s];
    const char *rows = segment.rows + row * segment.stride, *part = panel + segment.panel_offset;
    for (ptrdiff_t step = 0; step < segment.steps; ++step, rows += kUnitBytes, part += kStepBytes) {
      for (int line = 0; line < 8; ++line) fetch.template ahead_of<kStepBytes / 8>(part + line * kStepBytes / 8, 0);
      unit_step<T, kTwoOfRows, kTwoOfColumns>(rows, rows + upper * segment.stride, segment.stride, part);
    }
    if (segment.last_of_rows == nullptr) continue;
    const char* const last = segment.last_of_rows + row * kUnitBytes;
    unit_step<T, kTwoOfRows, kTwoOfColumns>(last, last + upper * kUnitBytes, kUnitBytes, segment.last_of_panel);
  }
  constexpr ptrdiff_t kStride = kPanelColumns * sizeof(float);
  float* const lower = sums.numbers + upper * kPanelColumns;
  TileUnit::store<0>(sums.numbers, kStride);
  if constexpr (kTwoOfColumns) TileUnit::store<1>(sums.numbers + kUnitRows, kStride);
  if constexpr (kTwoOfRows) TileUnit::store<2>(lower, kStride);
  if constexpr (kTwoOfRows && kTwoOfColumns) TileUnit::store<3>(lower + kUnitRows, kStride);
}

// What a product on the unit has beside its operands: the padded last steps, and the shape that is loaded.
template <class T>
class UnitProduct {
 public:
  static constexpr int kMostSegments = 2;
  static constexpr ptrdiff_t kStep = kUnitBytes / static_cast<ptrdiff_t>(sizeof(T));  // elements of a row in one step

  // `rows` of each segment; depth(s) elements of T, from data(s) on, stride(s) bytes apart. head: bytes in front of the
  // numbers of each segment's part of a panel.
  template <class Data, class Stride, class Depth>
  UnitProduct(int count, ptrdiff_t rows, ptrdiff_t head, const Data& data, const Stride& stride, const Depth& depth)
      : count_(count) {
    ptrdiff_t bytes = 0, offset = 0;
    for (int s = 0; s < count; ++s) bytes += depth(s) % kStep != 0 ? rows * kUnitBytes + kStepBytes : 0;
    char* memory = static_cast<char*>(product_arena(static_cast<size_t>(bytes)));
    for (int s = 0; s < count; ++s) {
      const ptrdiff_t steps = depth(s) / kStep, left = depth(s) % kStep, groups = (left + kGroup - 1) / kGroup;
      segments_[s] = {data(s), stride(s), steps, nullptr, nullptr, offset + head};
      groups_[s] = groups;
      offset += head + steps * kStepBytes + groups * 2 * kUnitBytes;
      if (left == 0) continue;
      segments_[s].last_of_rows = memory;
      segments_[s].last_of_panel = memory + rows * kUnitBytes;
      memory += rows * kUnitBytes + kStepBytes;
      for (ptrdiff_t r = 0; r < rows; ++r) {
        char* const to = segments_[s].last_of_rows + r * kUnitBytes;
        __builtin_memset(to, 0, kUnitBytes);
        __builtin_memcpy(to, data(s) + r * stride(s) + steps * kUnitBytes, static_cast<size_t>(left) * sizeof(T));
      }
    }
  }
  ~UnitProduct() { TileUnit::release(); }
  UnitProduct(const UnitProduct&) = delete;
  UnitProduct& operator=(const UnitProduct&) = delete;

  // Bytes from a panel's start to the numbers of a segment's part.
  ptrdiff_t panel_offset(int segment) const { return segments_[segment].panel_offset; }

  // The next products are with this panel.
  void take_panel(const char* panel) {
    panel_ = panel;
    for (int s = 0; s < count_; ++s) {
      if (segments_[s].last_of_panel == nullptr) continue;
      const size_t bytes = static_cast<size_t>(groups_[s]) * 2 * kUnitBytes;
      const char* const from = panel + segments_[s].panel_offset + segments_[s].steps * kStepBytes;
      __builtin_memcpy(segments_[s].last_of_panel, from, bytes);
      __builtin_memset(segments_[s].last_of_panel + bytes, 0, static_cast<size_t>(kStepBytes) - bytes);
    }
  }

  // Sums of segments [first, last) for `height` rows from `row` on; of 16 columns, or 32.
  template <class Fetch>
  void run(int first, int last, ptrdiff_t row, int height, bool wide, UnitSums& sums, Fetch& fetch) {
    if (height != shape_) shape_unit(shape_ = height);
    const auto block = [&](auto run_block) { run_block(segments_ + first, last - first, row, height, panel_, sums, fetch); };
    if (height > kUnitRows) {
      wide ? block(unit_block<T, true, true, Fetch>) : block(unit_block<T, true, false, Fetch>);
    } else {
      wide ? block(unit_block<T, false, true, Fetch>) : block(unit_block<T, false, false, Fetch>);
    }
  }

 private:
  static constexpr ptrdiff_t kGroup = kInterleave<T>;
  int count_, shape_ = 0;
  const char* panel_ = nullptr;
  UnitSegment segments_[kMostSegments];
  ptrdiff_t groups_[kMostSegments];
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
