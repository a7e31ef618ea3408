// (Shifted) windows of a map by addressing: which token stands where in a window, and what is added to its scores.
#pragma once

#include "attend-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr double kShiftMask = -100.0;  // what Swin adds between tokens that only the roll brought together

template <class T>
struct Windows {
  using A = Accumulator<T>;
  const WindowGrid& grid;
  ptrdiff_t count[2];      // windows in each direction
  ptrdiff_t tokens;        // N, of one window
  ptrdiff_t table_stride;  // of a row of a bias table

  explicit Windows(const WindowGrid& g) : grid(g) {
    for (int d = 0; d < 2; ++d) count[d] = static_cast<ptrdiff_t>((g.map[d] + g.window[d] - 1) / g.window[d]);
    tokens = static_cast<ptrdiff_t>(g.window[0] * g.window[1]);
    table_stride = scratch_stride<A>(tokens);
  }

  ptrdiff_t per_image() const { return count[0] * count[1]; }

  // Windows differ in their mask by being cut by the roll vertically (2), horizontally (1), both or not at all.
  int classes() const { return grid.shift[0] > 0 ? 4 : grid.shift[1] > 0 ? 2 : 1; }
  int class_of(ptrdiff_t window) const {
    const ptrdiff_t w = window % per_image();
    const bool vertical = grid.shift[0] > 0 && w / count[1] == count[0] - 1;
    const bool horizontal = grid.shift[1] > 0 && w % count[1] == count[1] - 1;
    return 2 * vertical + horizontal;
  }

  // Tokens of one window in the order of its rows, counted over the whole batch; kPaddedToken where there is none.
  void locate(ptrdiff_t window, ptrdiff_t* out) const {
    const ptrdiff_t image = window / per_image(), w = window % per_image();
    const ptrdiff_t height = static_cast<ptrdiff_t>(grid.map[0]), width = static_cast<ptrdiff_t>(grid.map[1]);
    const ptrdiff_t top = w / count[1] * static_cast<ptrdiff_t>(grid.window[0]);
    const ptrdiff_t left = w % count[1] * static_cast<ptrdiff_t>(grid.window[1]);
    for (ptrdiff_t i = 0; i < grid.window[0]; ++i) {
      const ptrdiff_t y = source(0, top + i);
      for (ptrdiff_t j = 0; j < grid.window[1]; ++j) {
        const ptrdiff_t x = source(1, left + j);
        *out++ = y < 0 || x < 0 ? kPaddedToken : (image * height + y) * width + x;
      }
    }
  }

  // Table [N][table_stride] of a head: the bias, padded with -Inf.
  void fill_table(ptrdiff_t head, A* table) const {
    const T* bias = static_cast<const T*>(grid.bias) + head * tokens * tokens;
    for (ptrdiff_t i = 0; i < tokens; ++i) widen_bias_row(bias + i * tokens, 1, tokens, table + i * table_stride);
  }

  // Mask [N][table_stride] of a class: tokens of a cut window see each other when they come from the same
  // side of the roll.
  void fill_mask(int window_class, A* mask) const {
    const ptrdiff_t height = static_cast<ptrdiff_t>(grid.window[0]), width = static_cast<ptrdiff_t>(grid.window[1]);
    const ptrdiff_t cut_y = window_class & 2 ? height - static_cast<ptrdiff_t>(grid.shift[0]) : height;
    const ptrdiff_t cut_x = window_class & 1 ? width - static_cast<ptrdiff_t>(grid.shift[1]) : width;
    const auto right_of = [&](ptrdiff_t x) { return x >= cut_x; };
    const auto below = [&](ptrdiff_t y) { return y >= cut_y; };
    for (ptrdiff_t i = 0; i < tokens; ++i) {
      const ptrdiff_t y = i / width, x = i % width;
      A* row = mask + i * table_stride;
      // Most rows are those of a neighbour on the same side of both cuts.
      const ptrdiff_t same = x > 0 && right_of(x) == right_of(x - 1) ? 1 : y > 0 && below(y) == below(y - 1) ? width : 0;
      if (same > 0) {
        copy_elements(row - same * table_stride, row, table_stride);
        continue;
      }
      for (ptrdiff_t j = 0; j < table_stride; ++j) {
        const bool apart = j < tokens && (below(j / width) != below(y) || right_of(j % width) != right_of(x));
        row[j] = apart ? static_cast<A>(kShiftMask) : A{0};
      }
    }
  }

 private:
  // Coordinate that position p of the rolled and padded map comes from; -1 for padding. (No division: the remainder is at
  // most a few extents away.)
  ptrdiff_t source(int d, ptrdiff_t p) const {
    const ptrdiff_t extent = static_cast<ptrdiff_t>(grid.map[d]), shift = static_cast<ptrdiff_t>(grid.shift[d]);
    const ptrdiff_t period = grid.roll_first ? extent : count[d] * static_cast<ptrdiff_t>(grid.window[d]);
    if (p >= period) return -1;
    ptrdiff_t from = p + shift;
    while (from >= period) from -= period;
    return from < extent ? from : -1;
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
