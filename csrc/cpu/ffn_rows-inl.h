// What both FFNs do with their rows: two products per block of rows, H never leaves the core.
//
// 1. A block of rows is small enough for z, H and one panel of weights to live in L2. Weights are read again for every
//    block, from L3, which costs a few GB/s per core.
// 2. The second product is one accumulation over [H | z] (w_out stands on w_merged in each panel): no pass over y.
// 3. Blocks are independent: one fork/join per call, no barrier between the products.
#pragma once

#include "arena.h"
#include "bias_residual-inl.h"
#include "ffn_pack-inl.h"
#include "gelu-inl.h"
#include "layernorm-inl.h"
#include "owners-inl.h"
#include "scratch-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// bias [col, col + lanes), of which n are there.
template <class T>
REPAVIT_INLINE typename SimdOf<T>::V load_bias(const T* bias, ptrdiff_t col, int n) {
  using S = SimdOf<T>;
  if (n >= S::kLanes) return S::load(bias + col);
  return n > 0 ? S::load(bias + col, n) : S::zero();
}

// One call, as every thread sees it.
template <class T, FfnKind kKind, class Args>
struct FfnPlan {
  using Layout = FfnLayout<T, kKind>;
  const Args& args;
  Layout layout;
  const T* panels;
  ptrdiff_t blocks;         // row blocks, of nearly equal height
  ptrdiff_t block_rows;     // height of the tallest
  ptrdiff_t h_stride;       // of H [block_rows, m] in scratch
  ptrdiff_t z_stride;       // of z [block_rows, C] in scratch

  FfnPlan(const Args& a, int threads)
      : args(a), layout(a.channels, a.active, a.has_merged), panels(first_panel<T>(a.packed)) {
    constexpr double kInputs = kKind == FfnKind::kGated ? 2.0 : 1.0;
    const double depth = (kInputs + 1.0) * static_cast<double>(args.active) +
                         static_cast<double>(args.has_merged ? args.channels : 0);
    const double work = 2.0 * static_cast<double>(args.rows) * static_cast<double>(args.channels) * depth;
    const ptrdiff_t owners = useful_threads(work, threads);
    const ptrdiff_t rows = static_cast<ptrdiff_t>(args.rows), limit = most_rows(layout);
    const ptrdiff_t rounds = (rows + owners * limit - 1) / (owners * limit);
    blocks = owners * rounds < rows ? owners * rounds : rows;
    block_rows = (rows + blocks - 1) / blocks;
    h_stride = scratch_stride<Operand<T>>(layout.active);
    z_stride = scratch_stride<Operand<T>>(layout.channels);
  }

  ptrdiff_t block_begin(ptrdiff_t block) const { return static_cast<ptrdiff_t>(args.rows) * block / blocks; }
  size_t h_bytes() const { return sizeof(Operand<T>) * static_cast<size_t>(block_rows * h_stride); }
  size_t z_bytes() const { return sizeof(Operand<T>) * static_cast<size_t>(block_rows * z_stride); }

 private:
  // Rows per block, in whole tiles: what L2 holds beside one panel, or a strip where gemm keeps chunks of K there. Where L2
  // holds few tiles, z and H had better come from L3 than all weights once per few tiles.
  static ptrdiff_t most_rows(const Layout& layout) {
#if REPAVIT_ISA_LEVEL < 2
    (void)layout;
    return kStripRows;
#else
    constexpr ptrdiff_t kPanelElement = sizeof(T), kRowElement = sizeof(Operand<T>);
    constexpr ptrdiff_t kFewTiles = 4, kTilesFromL3 = 8;
    const ptrdiff_t widest = layout.out_stride > layout.in_stride ? layout.out_stride : layout.in_stride;
    const ptrdiff_t room = static_cast<ptrdiff_t>(l2_cache_bytes()) * 5 / 8 - widest * kPanelElement;
    const ptrdiff_t rows = room / (kRowElement * (layout.channels + layout.active));
    const ptrdiff_t tiles = rows / kTileRows;
    return (tiles <= kFewTiles ? kTilesFromL3 : tiles) * kTileRows;
#endif
  }
};

// z of one block in scratch. A plain x is copied too: that costs 0.3 % and buys the operand type, a stride that does not
// alias, a whole last group of k and huge pages.
template <class T, class Plan>
Rows<T> block_input(const Plan& plan, const T* x, ptrdiff_t rows, Operand<T>* scratch) {
  const ptrdiff_t columns = plan.layout.channels, x_stride = static_cast<ptrdiff_t>(plan.args.x_stride);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    Operand<T>* z = scratch + r * plan.z_stride;
    norm_row(x + r * x_stride, z, columns, plan.args.norm, plan.args.norm_eps);
    for (ptrdiff_t k = columns; k % kInterleave<T> != 0; ++k) z[k] = Operand<T>{};
  }
  return {scratch, plan.z_stride, columns};
}

// One block of rows, whose H `hidden(plan, z, rows, h)` writes, in whole panels of columns.
template <class T, class Plan, class Hidden>
void ffn_block(const Plan& plan, ptrdiff_t block, char* scratch, const Hidden& hidden) {
  const FfnArgs& args = plan.args;
  const auto& layout = plan.layout;
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride);
  const T* x = static_cast<const T*>(args.x) + begin * x_stride;

  Operand<T>* h = reinterpret_cast<Operand<T>*>(scratch);
  const Rows<T> z = block_input(plan, x, rows, reinterpret_cast<Operand<T>*>(scratch + plan.h_bytes()));
  hidden(plan, z, rows, h);

  const Rows<T> segments[2] = {{h, plan.h_stride, layout.active}, z};
  const BiasResidual<T> epilogue{static_cast<T*>(args.y) + begin * layout.channels, layout.channels,
                                 static_cast<const T*>(args.bias), args.residual ? x : nullptr, x_stride};
  gemm(segments, layout.has_merged ? 2 : 1, rows, plan.panels + layout.out_offset, layout.out_stride, layout.channels,
       epilogue);
}

// A whole call.
template <class T, FfnKind kKind, class Args, class Hidden>
void ffn_call(const Args& args, const Pool& pool, const Hidden& hidden) {
  if (args.rows == 0 || args.channels == 0) return;
  using Plan = FfnPlan<T, kKind, Args>;
  struct Context {
    Plan plan;
    const Hidden& hidden;
  } context{{args, pool.threads}, hidden};
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    char* scratch = static_cast<char*>(thread_arena(c.plan.h_bytes() + c.plan.z_bytes()));
    for (int64_t block = begin; block < end; ++block) {
      ffn_block<T>(c.plan, static_cast<ptrdiff_t>(block), scratch, c.hidden);
    }
  };
  pool.run(context.plan.blocks, body, &context);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
