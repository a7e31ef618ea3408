// Panels of 32 columns from and to nn.Linear layout (the format is described in kernels.h).
#pragma once

#include "gemm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Where element (k, column) of a panel stands.
template <class T>
REPAVIT_INLINE ptrdiff_t panel_index(ptrdiff_t k, ptrdiff_t column) {
  constexpr int kStep = kInterleave<T>;
  return (k / kStep) * kPanelColumns * kStep + column * kStep + k % kStep;
}

constexpr ptrdiff_t kPackBlock = 32;  // k handled at a time: the lines they touch on both sides stay in L1

// One panel: rows [first, min(first + 32, rows)) of w [rows, depth] → panel_elements(depth) elements, zeros included.
template <class T>
void pack_panel(const T* w, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, T* panel) {
  const ptrdiff_t columns = rows - first < kPanelColumns ? rows - first : kPanelColumns;
  const ptrdiff_t padded = groups_of<T>(depth) * kInterleave<T>;
  for (ptrdiff_t begin = 0; begin < padded; begin += kPackBlock) {
    const ptrdiff_t end = begin + kPackBlock < padded ? begin + kPackBlock : padded;
    const ptrdiff_t known = end < depth ? end : depth;
    for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
      ptrdiff_t k = begin;
      if (c < columns) {
        for (const T* row = w + (first + c) * depth; k < known; ++k) panel[panel_index<T>(k, c)] = row[k];
      }
      for (; k < end; ++k) panel[panel_index<T>(k, c)] = T{};
    }
  }
}

// Inverse of pack_panel: writes rows [first, min(first + 32, rows)) of w.
template <class T>
void unpack_panel(const T* panel, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, T* w) {
  const ptrdiff_t columns = rows - first < kPanelColumns ? rows - first : kPanelColumns;
  for (ptrdiff_t begin = 0; begin < depth; begin += kPackBlock) {
    const ptrdiff_t end = begin + kPackBlock < depth ? begin + kPackBlock : depth;
    for (ptrdiff_t c = 0; c < columns; ++c) {
      for (ptrdiff_t k = begin; k < end; ++k) w[(first + c) * depth + k] = panel[panel_index<T>(k, c)];
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
