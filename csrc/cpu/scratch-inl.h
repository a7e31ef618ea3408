// Scratch memory: how one block is divided into arrays, and how far apart their rows stand.
#pragma once

#include "simd-inl.h"
#include "tile.h"

namespace repavit {
namespace REPAVIT_ISA {

// Hands out 64-byte aligned arrays of one block. Without a block it only counts: the same code that divides the memory
// says how much of it is needed.
class Carver {
 public:
  explicit Carver(void* block = nullptr) : block_(static_cast<char*>(block)) {}
  template <class T>
  T* take(ptrdiff_t elements) {
    T* array = block_ != nullptr ? reinterpret_cast<T*>(block_ + bytes_) : nullptr;
    bytes_ += (sizeof(T) * static_cast<size_t>(elements) + 63) / 64 * 64;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* block_;
  size_t bytes_ = 0;
};

REPAVIT_INLINE ptrdiff_t whole_panels(ptrdiff_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
}

// A row stride for scratch: whole panels of columns, and never near a multiple of 2 KiB, at which the rows of a tile
// would fall into the same few sets of L1.
template <class T>
REPAVIT_INLINE ptrdiff_t scratch_stride(ptrdiff_t columns) {
  const ptrdiff_t whole = whole_panels(columns);
  const ptrdiff_t line = 64 / static_cast<ptrdiff_t>(sizeof(T));
  return whole * static_cast<ptrdiff_t>(sizeof(T)) % 2048 == 0 ? whole + line : whole;
}

REPAVIT_INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

}  // namespace REPAVIT_ISA
}  // namespace repavit
