// Panels of 32 columns from and to nn.Linear layout (the format is described in kernels.h).
#pragma once

#include "checked.h"
#include "gemm-inl.h"
#include "layernorm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// panel_elements() of a depth that nobody has checked yet; and how many panels so many columns are, none where a panel has
// no elements.
template <class T>
int64_t checked_panel_elements(int64_t depth) {
  const int64_t elements = size_product(size_quotient(depth, kInterleave<T>), kInterleave<T>, kPanelColumns);
  if (!IsSame<T, int8_t>::value) return elements;
  return depth > kInt8Depth ? kNoSize : size_sum(sizeof(Int8Columns), elements);
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

// One row of weights as whole numbers, every fourth k apart: out[k / 4 * 128 + k % 4]. Returns scale and sum.
template <class T>
void quantize_column(const T* row, ptrdiff_t depth, int8_t* out, float* scale, int32_t* sum) {
  const auto number = [row](ptrdiff_t k) {
    float lanes[Simd<float>::kLanes];
    Simd<float>::store(lanes, Simd<float>::load(row + k, 1));
    return lanes[0];
  };
  float most = 0.0f, zeros = 0.0f;
  for (ptrdiff_t k = 0; k < depth; ++k) {
    const float w = number(k), magnitude = __builtin_fabsf(w);
    zeros += w * 0.0f;  // NaN of a NaN or an infinity
    if (magnitude > most) most = magnitude;
  }
  const bool finite = zeros == 0.0f, used = finite && most >= 1e-30f;
  const float factor = used ? 127.0f / most : 0.0f;
  *scale = used ? most / 127.0f : finite ? 0.0f : __builtin_nanf("");
  *sum = 0;
  for (ptrdiff_t k = 0; k < depth; ++k) {
    const auto q = static_cast<int8_t>(used ? __builtin_rintf(number(k) * factor) : 0.0f);
    out[panel_index<int8_t>(k, 0)] = q;
    *sum += q;
  }
}

// As above, to a panel of int8_t.
template <class T>
void pack_rows(const T* const (&rows)[kPanelColumns], ptrdiff_t depth, int8_t* panel) {
  Int8Columns columns{};
  int8_t* const numbers = panel + sizeof(columns);
  __builtin_memset(numbers, 0, static_cast<size_t>(groups_of<int8_t>(depth) * kInterleave<int8_t> * kPanelColumns));
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
    if (rows[c] == nullptr) continue;
    quantize_column(rows[c], depth, numbers + panel_index<int8_t>(0, c), &columns.scale[c], &columns.sum[c]);
  }
  __builtin_memcpy(panel, &columns, sizeof(columns));
}

// The numbers that a panel of int8_t stands for.
template <class T>
void unpack_rows(const int8_t* panel, ptrdiff_t depth, T* const (&rows)[kPanelColumns]) {
  Int8Columns columns;
  __builtin_memcpy(&columns, panel, sizeof(columns));
  const int8_t* const numbers = panel + sizeof(columns);
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
    for (ptrdiff_t k = 0; k < depth && rows[c] != nullptr; ++k) {
      const float w = static_cast<float>(numbers[panel_index<int8_t>(k, c)]) * columns.scale[c];
      Simd<float>::store(rows[c] + k, Simd<float>::broadcast(w), 1);
    }
  }
}

// One panel of consecutive rows: [first, min(first + 32, rows)) of w [rows, depth].
template <class T, class P>
void pack_panel(const T* w, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, P* panel) {
  const T* columns[kPanelColumns];
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) columns[c] = first + c < rows ? w + (first + c) * depth : nullptr;
  pack_rows(columns, depth, panel);
}

template <class T, class P>
void unpack_panel(const P* panel, ptrdiff_t rows, ptrdiff_t depth, ptrdiff_t first, T* w) {
  T* columns[kPanelColumns];
  for (ptrdiff_t c = 0; c < kPanelColumns; ++c) columns[c] = first + c < rows ? w + (first + c) * depth : nullptr;
  unpack_rows(panel, depth, columns);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
