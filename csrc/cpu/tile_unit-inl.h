// The tile unit of AMX: eight registers of 16 rows of 64 bytes, and products of two of them added to a third.
//
// A tile's shape stands in a configuration, which a thread loads before it uses the unit and gives back behind it: whatever
// runs next finds the unit as it left it, and an idle unit costs nothing at a context switch. Linux lets a process use the
// unit's registers once it has asked (dispatch.cpp).
#pragma once

#include "kernels.h"
#include "simd-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr int kUnitRows = 16, kUnitBytes = 64;  // of a tile, at most

// What LDTILECFG reads.
struct alignas(64) UnitConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void tile(int index, int height) {
    row_bytes[index] = kUnitBytes;
    rows[index] = static_cast<uint8_t>(height);
  }
};
static_assert(sizeof(UnitConfiguration) == 64, "as the processor reads it");

#if !defined(REPAVIT_TILE_UNIT)  // csrc/tests/emulated_tile_unit.h has it in C++

// By name, not by intrinsics, which take numbers of tiles as literals alone.
struct TileUnit {
  static REPAVIT_INLINE void configure(const UnitConfiguration& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
  static REPAVIT_INLINE void release() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  static REPAVIT_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows of 64 bytes, `stride` bytes apart.
  template <int kTile>
  static REPAVIT_INLINE void load(const char* rows, ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static REPAVIT_INLINE void store(void* rows, ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  // sums += left · right: pairs of bf16, or runs of four of unsigned bytes with signed ones.
  template <class T, int kSums, int kLeft, int kRight>
  static REPAVIT_INLINE void multiply() {
    if constexpr (sizeof(T) == 2) {
      __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
    } else {
      __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
    }
  }
};

#else
using TileUnit = REPAVIT_TILE_UNIT;
#endif

}  // namespace REPAVIT_ISA
}  // namespace repavit
