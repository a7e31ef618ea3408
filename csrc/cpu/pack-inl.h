// Panels of 32 columns from and to nn.Linear layout (the format is described in kernels.h).
#pragma once

#include "checked.h"
#include "gemm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// panel_elements() of a depth that nobody has checked yet; and how many panels so many columns are, none where a panel has
// no elements.
template <class T>
int64_t checked_panel_elements(int64_t depth) {
  return size_product(size_quotient(depth, kInterleave<T>), kInterleave<T>, kPanelColumns);
}
inline int64_t checked_panels(int64_t columns, int64_t elements) {
  const int64_t panels = size_quotient(columns, kPanelColumns);
  return elements == 0 && panels >= 0 ? 0 : panels;
}

// Where element (k, column) of a panel stands.
template <class T>
REPAVIT_INLINE ptrdiff_t panel_index(ptrdiff_t k, ptrdiff_t column) {
  constexpr int kStep = kInterleave<T>;
  return (k / kStep) * kPanelColumns * kStep + column * kStep + k % kStep;
}

constexpr ptrdiff_t kPackBlock = 32;  // k handled at a time: the lines they touch on both sides stay in L1

// One panel: the rows of W [.., depth] that become its columns, null where there is none → panel_elements(depth)
// elements, zeros included.
template <class T>
void pack_rows(const T* const (&rows)[kPanelColumns], ptrdiff_t depth, T* panel) {
  const ptrdiff_t padded = groups_of<T>(depth) * kInterleave<T>;
  for (ptrdiff_t begin = 0; begin < padded; begin += kPackBlock) {
    const ptrdiff_t end = begin + kPackBlock < padded ? begin + kPackBlock : padded;
    const ptrdiff_t known = end < depth ? end : depth;
    for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
      ptrdiff_t k = begin;
      if (const T* row = rows[c]) {
        for (; k < known; ++k) panel[panel_index<T>(k, c)] = row[k];
      }
      for (; k < end; ++k) panel[panel_index<T>(k, c)] = T{};
    }
  }
}

// Inverse of pack_rows: writes the rows that are not null.
template <class T>
void unpack_rows(const T* panel, ptrdiff_t depth, T* const (&rows)[kPanelColumns]) {
  for (ptrdiff_t begin = 0; begin < depth; begin += kPackBlock) {
    const ptrdiff_t end = begin + kPackBlock < depth ? begin + kPackBlock : depth;
    for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
      T* row = rows[c];
      for (ptrdiff_t k = begin; k < end && row != nullptr; ++k) row[k] = panel[panel_index<T>(k, c)];
    }
  }
}

// One panel of consecutive rows: [first, min(first + 32, rows)) of w [rows, depth].
template <class T>
void pack_panel(const T* w, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, T* panel) {
  const T* columns[kPanelColumns];
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) columns[c] = first + c < rows ? w + (first + c) * depth : nullptr;
  pack_rows(columns, depth, panel);
}

template <class T>
void unpack_panel(const T* panel, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, T* w) {
  T* columns[kPanelColumns];
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) columns[c] = first + c < rows ? w + (first + c) * depth : nullptr;
  unpack_rows(panel, depth, columns);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
