// What both FFNs do with their rows: two products per block of rows, H never leaves the core.
//
// 1. A block of rows is small enough for z, H and one panel of weights to live in L2. Weights are read again for every
//    block, from L3, which costs a few GB/s per core.
// 2. The second product is one accumulation over [H | z] (w_out stands on w_merged in each panel): no pass over y.
// 3. Blocks are independent: one fork/join per call, no barrier between the products.
// 4. Where blocks would be of few rows, whose products do not outlast the reading of the weights, threads share larger
//    blocks and each has a part of the columns: three forks, z, H and y, and every weight is read by fewer of them.
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

// Whether H is wanted in whole rows before the second product.
inline bool needs_whole_rows(const PartialGeluFfnArgs&) { return false; }
inline bool needs_whole_rows(const GatedFfnArgs& args) { return args.inner_norm; }

// One call, as every thread sees it.
template <class T, FfnKind kKind, class Args>
struct FfnPlan {
  using Layout = FfnLayout<T, kKind>;
  const Args& args;
  Layout layout;
  const T* panels;
  ptrdiff_t blocks;         // row blocks, of nearly equal height
  ptrdiff_t block_rows;     // height of the tallest
  ptrdiff_t parts = 1;      // of the columns; more than one: threads share z and H
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
    const ptrdiff_t panels_each = least(layout.in_panels, layout.out_panels);
    const auto fits = [&](ptrdiff_t n) { return n == 1 || (n <= panels_each && !needs_whole_rows(args)); };
    parts = column_parts(layout.bytes(), rows, owners, fits);
    const ptrdiff_t rounds = (rows + owners * limit - 1) / (owners * limit);
    const ptrdiff_t wanted = parts > 1 ? owners / parts : owners * rounds;
    blocks = wanted < rows ? wanted : rows;
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

// Some panels of the second product, of rows from `row` on.
template <class T, class Plan>
void ffn_output(const Plan& plan, ptrdiff_t row, ptrdiff_t rows, const Rows<T> (&segments)[2], PanelRange panels) {
  const FfnArgs& args = plan.args;
  const auto& layout = plan.layout;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride), col = panels.first * kPanelColumns;
  const ptrdiff_t columns = least(layout.channels - col, (panels.last - panels.first) * kPanelColumns);
  const T *x = static_cast<const T*>(args.x), *bias = static_cast<const T*>(args.bias);
  const BiasResidual<T> epilogue{static_cast<T*>(args.y) + row * layout.channels + col, layout.channels,
                                 bias != nullptr ? bias + col : nullptr,
                                 args.residual ? x + row * x_stride + col : nullptr, x_stride};
  gemm(segments, layout.has_merged ? 2 : 1, rows, plan.panels + layout.out_offset + panels.first * layout.out_stride,
       layout.out_stride, columns, epilogue);
}

// One block of rows, whose H `hidden(plan, z, rows, h, panels)` writes, in whole panels of columns.
template <class T, class Plan, class Hidden>
void ffn_block(const Plan& plan, ptrdiff_t block, char* scratch, const Hidden& hidden) {
  const auto& layout = plan.layout;
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  const T* x = static_cast<const T*>(plan.args.x) + begin * static_cast<ptrdiff_t>(plan.args.x_stride);

  Operand<T>* h = reinterpret_cast<Operand<T>*>(scratch);
  const Rows<T> z = block_input(plan, x, rows, reinterpret_cast<Operand<T>*>(scratch + plan.h_bytes()));
  hidden(plan, z, rows, h, PanelRange{0, layout.in_panels});
  const ptrdiff_t panels = whole_panels(layout.channels) / kPanelColumns;  // out_panels is 0 where they are empty
  ffn_output<T>(plan, begin, rows, {{h, plan.h_stride, layout.active}, z}, {0, panels});
}

// A whole call whose threads share z and H of a block of rows, and have a part of its columns each.
template <class T, class Plan, class Hidden>
void ffn_by_columns(const Plan& plan, const Pool& pool, const Hidden& hidden) {
  struct Phase {
    const Plan& plan;
    const Hidden& hidden;
    Operand<T>*h, *z;  // of all rows
    int step;

    void run(ptrdiff_t item) const {
      const auto& layout = plan.layout;
      const FfnArgs& args = plan.args;
      const ptrdiff_t total = static_cast<ptrdiff_t>(args.rows);
      if (step == 0) {
        const ptrdiff_t items = plan.blocks * plan.parts, first = total * item / items, last = total * (item + 1) / items;
        const T* x = static_cast<const T*>(args.x) + first * static_cast<ptrdiff_t>(args.x_stride);
        block_input(plan, x, last - first, z + first * plan.z_stride);
        return;
      }
      const ptrdiff_t block = item / plan.parts, part = item % plan.parts;
      const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
      const Rows<T> left{z + begin * plan.z_stride, plan.z_stride, layout.channels};
      Operand<T>* const own = h + begin * plan.h_stride;
      if (step == 1) return hidden(plan, left, rows, own, panels_of(layout.in_panels, plan.parts, part));
      ffn_output<T>(plan, begin, rows, {{own, plan.h_stride, layout.active}, left},
                    panels_of(layout.out_panels, plan.parts, part));
    }
  };
  const size_t rows = static_cast<size_t>(plan.args.rows), element = sizeof(Operand<T>);
  const size_t h_elements = rows * static_cast<size_t>(plan.h_stride);
  auto* const memory = static_cast<Operand<T>*>(
      shared_arena(element * (h_elements + rows * static_cast<size_t>(plan.z_stride))));
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Phase& phase = *static_cast<const Phase*>(raw);
    for (int64_t item = begin; item < end; ++item) phase.run(static_cast<ptrdiff_t>(item));
  };
  for (Phase phase{plan, hidden, memory, memory + h_elements, 0}; phase.step < 3; ++phase.step) {
    pool.run(plan.blocks * plan.parts, body, &phase);
  }
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
  if (context.plan.parts > 1) return ffn_by_columns<T>(context.plan, pool, hidden);
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
