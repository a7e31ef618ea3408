// Level "amx": products of bf16, and of int8 behind bf16 tokens, on AMX's tile unit. All other entries are those below.
#define REPAVIT_ISA amx
#define REPAVIT_ISA_LEVEL 4

#include "kernel_list-inl.h"

namespace repavit {
namespace amx {
namespace {

// Sums as they are, of kColumns columns.
struct StoreSums {
  static constexpr ptrdiff_t kColumns = 40;
  float* out;

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const Simd<float>::V (&acc)[N], int valid) const {
    for (int i = 0; i < valid; ++i) out[row * kColumns + col + i] = acc[i / 16][i % 16];
  }
};

// Rows of 3 numbers, one more than a step has, and two panels: sums that floats hold exactly.
bool multiplies_right() {
  constexpr ptrdiff_t kRows = 3, kDepth = 33, kColumns = StoreSums::kColumns, kGroups = (kDepth + 1) / 2;
  alignas(64) bf16 rows[kRows * kDepth + 1] = {}, panels[2 * kGroups * 2 * kPanelColumns] = {};
  const auto small = [](ptrdiff_t i) { return static_cast<float>(i % 7 - 3); };
  const auto narrow = [](float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof(bits));
    return bf16{static_cast<uint16_t>(bits >> 16)};
  };
  for (ptrdiff_t i = 0; i < kRows * kDepth; ++i) rows[i] = narrow(small(i));
  for (ptrdiff_t n = 0; n < kColumns; ++n) {
    for (ptrdiff_t k = 0; k < kDepth; ++k) {
      bf16* const panel = panels + n / kPanelColumns * panel_elements<bf16>(kDepth);
      panel[panel_index<bf16>(k, n % kPanelColumns)] = narrow(small(5 * k + 3 * n));
    }
  }
  float out[kRows * kColumns];
  const Rows<bf16> left{rows, kDepth, kDepth};
  FetchPanel fetch;
  gemm_direct(&left, 1, kRows, panels, panel_elements<bf16>(kDepth), kColumns, StoreSums{out}, fetch);
  bool right = true;
  for (ptrdiff_t r = 0; r < kRows; ++r) {
    for (ptrdiff_t n = 0; n < kColumns; ++n) {
      float sum = 0;
      for (ptrdiff_t k = 0; k < kDepth; ++k) sum += small(r * kDepth + k) * small(5 * k + 3 * n);
      right &= out[r * kColumns + n] == sum;
    }
  }
  return right;
}

}  // namespace

bool self_check() { return multiplies_right(); }
void install(Kernels& table) { install_kernels<bf16>(table); }

}  // namespace amx
}  // namespace repavit
