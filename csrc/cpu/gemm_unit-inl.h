// gemm of bf16 on the tile unit (unit_products-inl.h).
#pragma once

#include "unit_products-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// gemm_direct (gemm-inl.h) of bf16: with its sums in the unit's tiles, none of those in registers are compiled.
template <class Epilogue, class Fetch>
void gemm_direct(const Rows<bf16>* segments, int count, ptrdiff_t rows, const bf16* panels, ptrdiff_t panel_stride,
                 ptrdiff_t columns, const Epilogue& epilogue, Fetch& fetch) {
  if (rows == 0 || columns == 0) return;
  UnitProduct<bf16> product(
      count, rows, 0, [&](int s) { return reinterpret_cast<const char*>(segments[s].data); },
      [&](int s) { return segments[s].stride * static_cast<ptrdiff_t>(sizeof(bf16)); },
      [&](int s) { return segments[s].depth; });
  UnitSums sums;
  const RowTiles blocks(rows, kBlockRows);
  for (ptrdiff_t col = 0; col < columns; col += kPanelColumns, panels += panel_stride) {
    const int valid = static_cast<int>(least(columns - col, kPanelColumns));
    product.take_panel(reinterpret_cast<const char*>(panels));
    for (ptrdiff_t b = 0, row = 0; b < blocks.count; row += blocks.height(b++)) {
      const int height = blocks.height(b);
      product.run(0, count, row, height, kWholeTiles<Epilogue> || valid > kUnitRows, sums, fetch);
      hand_over(sums.numbers, height, row, col, valid, epilogue);
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
