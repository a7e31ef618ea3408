// What both FFNs do with their rows on weights of int8 (kernels.h): as in ffn_rows-inl.h, with z and H quantized row by row.
//
// 1. z serves both products. H waits as floats in a strip of rows that L2 holds, since its scale is that of a whole row.
// 2. Biases, activation and shortcut are in fp32; x itself is never quantized, so a shortcut costs no digits.
#pragma once

#include "ffn_rows-inl.h"
#include "gemm_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class O, FfnKind kKind, class Args>
struct Int8FfnPlan {
  using Layout = FfnLayout<int8_t, kKind>;
  const Args& args;
  Layout layout;
  const int8_t* panels;
  ptrdiff_t blocks, block_rows;            // row blocks of nearly equal height; height of the tallest
  ptrdiff_t float_stride, z_stride, h_stride;

  Int8FfnPlan(const Args& a, int threads)
      : args(a), layout(a.channels, a.active, a.has_merged), panels(first_panel<int8_t>(a.packed)) {
    constexpr double kInputs = kKind == FfnKind::kGated ? 2.0 : 1.0;
    const double depth = (kInputs + 1.0) * static_cast<double>(args.active) +
                         static_cast<double>(args.has_merged ? args.channels : 0);
    const double work = static_cast<double>(args.rows) * static_cast<double>(args.channels) * depth;
    const ptrdiff_t owners = useful_threads(work, threads);  // a multiplication takes half of what it does in floats
    const ptrdiff_t rows = static_cast<ptrdiff_t>(args.rows), limit = most_rows(layout);
    const ptrdiff_t rounds = (rows + owners * limit - 1) / (owners * limit);
    blocks = owners * rounds < rows ? owners * rounds : rows;
    block_rows = (rows + blocks - 1) / blocks;
    float_stride = scratch_stride<float>(layout.active);
    z_stride = scratch_stride<O>(layout.channels);
    h_stride = scratch_stride<O>(layout.active);
  }

  ptrdiff_t block_begin(ptrdiff_t block) const { return static_cast<ptrdiff_t>(args.rows) * block / blocks; }

 private:
  static ptrdiff_t most_rows(const Layout& layout) {
#if REPAVIT_ISA_LEVEL < 2
    (void)layout;
    return kStripRows;
#else
    constexpr ptrdiff_t kFewTiles = 4, kTilesFromL3 = 8;
    const ptrdiff_t row = layout.channels + layout.active * static_cast<ptrdiff_t>(1 + sizeof(float));
    const ptrdiff_t tiles = (static_cast<ptrdiff_t>(l2_cache_bytes()) * 5 / 8 - layout.out_stride) / row / kTileRows;
    return (tiles <= kFewTiles ? kTilesFromL3 : tiles) * kTileRows;
#endif
  }
};

// One thread's memory for a block of rows.
template <class O>
struct Int8FfnScratch {
  float *row, *h;
  float* biases[2];  // of the first product, in float: b_in, or b_gate and b_up; whole panels
  RowScale *z_scales, *h_scales;
  O *z, *hq;

  template <class Plan>
  Int8FfnScratch(Carver& carver, const Plan& plan)
      : row(carver.take<float>(whole_panels(plan.layout.channels))),
        h(carver.take<float>(plan.block_rows * plan.float_stride)),
        biases{carver.take<float>(whole_panels(plan.layout.active)), carver.take<float>(whole_panels(plan.layout.active))},
        z_scales(carver.take<RowScale>(plan.block_rows)),
        h_scales(carver.take<RowScale>(plan.block_rows)),
        z(carver.take<O>(plan.block_rows * plan.z_stride)),
        hq(carver.take<O>(plan.block_rows * plan.h_stride)) {}

  // A bias of T, or none, as floats; zeros behind it.
  template <class T>
  void set_bias(int i, const void* bias, ptrdiff_t count) {
    for (ptrdiff_t k = bias != nullptr ? count : 0; k < whole_panels(count); ++k) biases[i][k] = 0.0f;
    if (bias != nullptr) convert_row(static_cast<const T*>(bias), biases[i], count);
  }
};

// Rows of x through their norm and quantized.
template <class T, class O>
Int8Rows<O> quantized_input(const FfnArgs& args, const T* x, ptrdiff_t rows, ptrdiff_t stride, Int8FfnScratch<O>& s) {
  const ptrdiff_t columns = static_cast<ptrdiff_t>(args.channels), x_stride = static_cast<ptrdiff_t>(args.x_stride);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    norm_row(x + r * x_stride, s.row, columns, args.norm, args.norm_eps);
    s.z_scales[r] = quantize_row(s.row, columns, s.z + r * stride);
  }
  return {s.z, stride, columns, s.z_scales};
}

// One block of rows, whose H `hidden(plan, z, rows, scratch)` writes to scratch.
template <class T, class O, class Plan, class Hidden>
void int8_ffn_block(const Plan& plan, ptrdiff_t block, Int8FfnScratch<O>& s, const Hidden& hidden) {
  const FfnArgs& args = plan.args;
  const auto& layout = plan.layout;
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride);
  const T* x = static_cast<const T*>(args.x) + begin * x_stride;

  const Int8Rows<O> z = quantized_input(args, x, rows, plan.z_stride, s);
  hidden(plan, z, rows, s);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    s.h_scales[r] = quantize_row(s.h + r * plan.float_stride, layout.active, s.hq + r * plan.h_stride);
  }
  const Int8Rows<O> segments[2] = {{s.hq, plan.h_stride, layout.active, s.h_scales}, z};
  const BiasResidual<T> epilogue{static_cast<T*>(args.y) + begin * layout.channels, layout.channels,
                                 static_cast<const T*>(args.bias), args.residual ? x : nullptr, x_stride};
  gemm_int8(segments, layout.has_merged ? 2 : 1, rows, plan.panels + layout.out_offset, layout.out_stride, layout.channels,
            epilogue);
}

// A whole call. `prepare(scratch)` sets the biases of a thread's scratch.
template <class T, FfnKind kKind, class Args, class Prepare, class Hidden>
void int8_ffn_call(const Args& args, const Pool& pool, const Prepare& prepare, const Hidden& hidden) {
  if (args.rows == 0 || args.channels == 0) return;
  with_int8_operand([&](auto operand) {
    using O = decltype(operand);
    struct Context {
      Int8FfnPlan<O, kKind, Args> plan;
      const Prepare& prepare;
      const Hidden& hidden;
    } context{{args, pool.threads}, prepare, hidden};
    const auto body = [](void* raw, int64_t begin, int64_t end) {
      const Context& c = *static_cast<const Context*>(raw);
      Carver count;
      (void)Int8FfnScratch<O>(count, c.plan);
      Carver carver(thread_arena(count.bytes()));
      Int8FfnScratch<O> scratch(carver, c.plan);
      c.prepare(scratch);
      for (int64_t block = begin; block < end; ++block) {
        int8_ffn_block<T>(c.plan, static_cast<ptrdiff_t>(block), scratch, c.hidden);
      }
    };
    pool.run(context.plan.blocks, body, &context);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
