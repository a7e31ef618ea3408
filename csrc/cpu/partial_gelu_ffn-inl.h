// y = gelu(z W_inᵀ + b_in) W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x]: two products per block of rows, H never leaves the core.
//
// 1. A block of rows is small enough for z, H and one panel of weights to live in L2. Weights are read again for every
//    block, from L3, which costs a few GB/s per core.
// 2. The second product is one accumulation over [H | z] (w_out stands on w_merged in each panel): no pass over y.
// 3. Blocks are independent: one fork/join per call, no barrier between the products.
#pragma once

#include "arena.h"
#include "bias_residual-inl.h"
#include "gelu-inl.h"
#include "layernorm-inl.h"
#include "owners-inl.h"
#include "partial_gelu_ffn_pack-inl.h"
#include "scratch-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Store to H: gelu(acc + b_in). H has whole panels of columns, so a full vector is always written.
template <class T, GeluForm kForm>
struct GeluToScratch {
  using S = SimdOf<T>;
  using V = typename S::V;
  Operand<T>* h;
  ptrdiff_t stride;
  const T* bias;  // [columns] or null

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    Operand<T>* out = h + row * stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      V v = acc[i];
      const int n = valid - i * S::kLanes;
      if (bias != nullptr) v += n >= S::kLanes ? S::load(bias + col + i * S::kLanes) : load_tail(col + i * S::kLanes, n);
      S::store(out + i * S::kLanes, gelu<Accumulator<T>, kForm>(v));
    }
  }

 private:
  REPAVIT_INLINE V load_tail(ptrdiff_t col, int n) const { return n > 0 ? S::load(bias + col, n) : S::zero(); }
};

// One call, as every thread sees it.
template <class T>
struct FfnPlan {
  const PartialGeluFfnArgs& args;
  FfnLayout<T> layout;
  const T* panels;
  ptrdiff_t blocks;         // row blocks, of nearly equal height
  ptrdiff_t block_rows;     // height of the tallest
  ptrdiff_t h_stride;       // of H [block_rows, m] in scratch
  ptrdiff_t z_stride;       // of z [block_rows, C] in scratch

  ptrdiff_t block_begin(ptrdiff_t block) const { return static_cast<ptrdiff_t>(args.rows) * block / blocks; }
  size_t h_bytes() const { return sizeof(Operand<T>) * static_cast<size_t>(block_rows * h_stride); }
  size_t z_bytes() const { return sizeof(Operand<T>) * static_cast<size_t>(block_rows * z_stride); }
};

// Rows per block, in whole tiles: what L2 holds beside one panel, or a strip where gemm keeps chunks of K there. Where L2
// holds few tiles, z and H had better come from L3 than all weights once per few tiles.
template <class T>
ptrdiff_t most_rows(const FfnLayout<T>& layout) {
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

template <class T>
FfnPlan<T> plan_ffn(const PartialGeluFfnArgs& args, int threads) {
  FfnPlan<T> plan{args, FfnLayout<T>(args.channels, args.active, args.has_merged), first_panel<T>(args.packed), 1, 0, 0, 0};

  const double depth = 2.0 * static_cast<double>(args.active) + static_cast<double>(args.has_merged ? args.channels : 0);
  const double work = 2.0 * static_cast<double>(args.rows) * static_cast<double>(args.channels) * depth;
  const ptrdiff_t owners = useful_threads(work, threads);
  const ptrdiff_t rows = static_cast<ptrdiff_t>(args.rows), limit = most_rows(plan.layout);
  const ptrdiff_t rounds = (rows + owners * limit - 1) / (owners * limit);
  plan.blocks = owners * rounds < rows ? owners * rounds : rows;
  plan.block_rows = (rows + plan.blocks - 1) / plan.blocks;

  plan.h_stride = scratch_stride<Operand<T>>(plan.layout.active);
  plan.z_stride = scratch_stride<Operand<T>>(plan.layout.channels);
  return plan;
}

// z of one block in scratch. A plain x is copied too: that costs 0.3 % and buys the operand type, a stride that does not
// alias, a whole last group of k and huge pages.
template <class T>
Rows<T> block_input(const FfnPlan<T>& plan, const T* x, ptrdiff_t rows, Operand<T>* scratch) {
  const ptrdiff_t columns = plan.layout.channels, x_stride = static_cast<ptrdiff_t>(plan.args.x_stride);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    Operand<T>* z = scratch + r * plan.z_stride;
    if (plan.args.normalize) {
      layer_norm_row(x + r * x_stride, z, columns, plan.args.norm_eps);
    } else {
      convert_row(x + r * x_stride, z, columns);
    }
    for (ptrdiff_t k = columns; k % kInterleave<T> != 0; ++k) z[k] = Operand<T>{};
  }
  return {scratch, plan.z_stride, columns};
}

template <class T>
void ffn_block(const FfnPlan<T>& plan, ptrdiff_t block, char* scratch) {
  const PartialGeluFfnArgs& args = plan.args;
  const FfnLayout<T>& layout = plan.layout;
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride);
  const T* x = static_cast<const T*>(args.x) + begin * x_stride;

  Operand<T>* h = reinterpret_cast<Operand<T>*>(scratch);
  const Rows<T> z = block_input(plan, x, rows, reinterpret_cast<Operand<T>*>(scratch + plan.h_bytes()));
  const T* b_in = static_cast<const T*>(args.b_in);
  const auto first_product = [&](const auto& to_scratch) {
    gemm(&z, 1, rows, plan.panels, layout.in_stride, layout.active, to_scratch);
  };
  switch (args.gelu) {
    case kGeluTanh: first_product(GeluToScratch<T, kGeluTanh>{h, plan.h_stride, b_in}); break;
    case kGeluQuick: first_product(GeluToScratch<T, kGeluQuick>{h, plan.h_stride, b_in}); break;
    default: first_product(GeluToScratch<T, kGeluErf>{h, plan.h_stride, b_in});
  }

  const Rows<T> segments[2] = {{h, plan.h_stride, layout.active}, z};
  const BiasResidual<T> epilogue{static_cast<T*>(args.y) + begin * layout.channels, layout.channels,
                                 static_cast<const T*>(args.bias), args.residual ? x : nullptr, x_stride};
  gemm(segments, layout.has_merged ? 2 : 1, rows, plan.panels + layout.out_offset, layout.out_stride, layout.channels,
       epilogue);
}

// partial_gelu_ffn_<T>: see PartialGeluFfnArgs.
template <class T>
void partial_gelu_ffn(const PartialGeluFfnArgs& args, const Pool& pool) {
  if (args.rows == 0 || args.channels == 0) return;
  const FfnPlan<T> plan = plan_ffn<T>(args, pool.threads);
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const FfnPlan<T>& p = *static_cast<const FfnPlan<T>*>(raw);
    char* scratch = static_cast<char*>(thread_arena(p.h_bytes() + p.z_bytes()));
    for (int64_t block = begin; block < end; ++block) ffn_block(p, static_cast<ptrdiff_t>(block), scratch);
  };
  pool.run(plan.blocks, body, const_cast<FfnPlan<T>*>(&plan));
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
