// A packed matrix: where its panels stand, and how they are written and read back.
#pragma once

#include "pack-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Panels of W [N, K]; sizes in elements. They may be any numbers: bytes() is kNoSize where they are none of a matrix.
template <class T>
struct MatrixLayout {
  ptrdiff_t outputs, depth;   // N, K
  ptrdiff_t count, stride;    // ceil(N / 32) panels of depth K

  MatrixLayout(int64_t n, int64_t k)
      : outputs(static_cast<ptrdiff_t>(n)), depth(static_cast<ptrdiff_t>(k)),
        count(checked_panels(outputs, checked_panel_elements<T>(depth))), stride(checked_panel_elements<T>(depth)) {}

  int64_t bytes() const {
    return size_sum(sizeof(PackedMatrixHeader), size_product(sizeof(T), count, stride));
  }
  static const T* panels(const void* packed) {
    return reinterpret_cast<const T*>(static_cast<const char*>(packed) + sizeof(PackedMatrixHeader));
  }
};

template <class T>
int64_t matrix_packed_bytes(int64_t outputs, int64_t depth) {
  return MatrixLayout<T>(outputs, depth).bytes();
}

// w [N, K] in nn.Linear layout, contiguous, and its panels.
template <class T>
struct MatrixCopy {
  MatrixLayout<T> layout;
  T* w;
  T* panels;
};

template <class T>
void matrix_pack(const void* w, int64_t outputs, int64_t depth, void* destination, const Pool& pool) {
  MatrixCopy<T> copy{{outputs, depth}, static_cast<T*>(const_cast<void*>(w)),
                     const_cast<T*>(MatrixLayout<T>::panels(destination))};
  PackedMatrixHeader header{};
  __builtin_memcpy(header.magic, kPackedMatrixMagic, sizeof(header.magic));
  header.dtype = kDTypeOf<T>;
  header.outputs = outputs;
  header.depth = depth;
  header.bytes = copy.layout.bytes();
  __builtin_memcpy(destination, &header, sizeof(header));
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const MatrixCopy<T>& c = *static_cast<const MatrixCopy<T>*>(raw);
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      pack_panel(c.w, c.layout.outputs, c.layout.depth, p * kPanelColumns, c.panels + p * c.layout.stride);
    }
  };
  pool.run(copy.layout.count, body, &copy);
}

template <class T>
void matrix_unpack(const void* packed, void* w, const Pool& pool) {
  PackedMatrixHeader header;
  __builtin_memcpy(&header, packed, sizeof(header));
  MatrixCopy<T> copy{{header.outputs, header.depth}, static_cast<T*>(w),
                     const_cast<T*>(MatrixLayout<T>::panels(packed))};
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const MatrixCopy<T>& c = *static_cast<const MatrixCopy<T>*>(raw);
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      unpack_panel(c.panels + p * c.layout.stride, c.layout.outputs, c.layout.depth, p * kPanelColumns, c.w);
    }
  };
  pool.run(copy.layout.count, body, &copy);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
