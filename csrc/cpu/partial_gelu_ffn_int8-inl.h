// partial_gelu_ffn on weights of int8 (kernels.h): z and H are quantized too, row by row, and all products are exact.
//
// 1. z serves both products. H waits as floats in a strip of rows that L2 holds, since its scale is that of a whole row.
// 2. b_in, activation, bias and shortcut are in fp32; x itself is never quantized, so a shortcut costs no digits.
#pragma once

#include "ffn_rows-inl.h"
#include "gemm_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class T, class O>
struct Int8FfnPlan {
  using Layout = FfnLayout<int8_t, FfnKind::kPlain>;
  const PartialGeluFfnArgs& args;
  Layout layout;
  const int8_t* panels;
  ptrdiff_t blocks, block_rows;            // row blocks of nearly equal height; height of the tallest
  ptrdiff_t float_stride, z_stride, h_stride;

  Int8FfnPlan(const PartialGeluFfnArgs& a, int threads)
      : args(a), layout(a.channels, a.active, a.has_merged), panels(first_panel<int8_t>(a.packed)) {
    const double depth = 2.0 * static_cast<double>(args.active) + static_cast<double>(args.has_merged ? args.channels : 0);
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
template <class T, class O>
struct Int8FfnScratch {
  float *row, *h, *b_in;
  RowScale *z_scales, *h_scales;
  O *z, *hq;

  Int8FfnScratch(Carver& carver, const Int8FfnPlan<T, O>& plan)
      : row(carver.take<float>(whole_panels(plan.layout.channels))),
        h(carver.take<float>(plan.block_rows * plan.float_stride)),
        b_in(carver.take<float>(whole_panels(plan.layout.active))),
        z_scales(carver.take<RowScale>(plan.block_rows)),
        h_scales(carver.take<RowScale>(plan.block_rows)),
        z(carver.take<O>(plan.block_rows * plan.z_stride)),
        hq(carver.take<O>(plan.block_rows * plan.h_stride)) {}
};

// Rows of x through their norm and quantized.
template <class T, class O>
Int8Rows<O> quantized_input(const FfnArgs& args, const T* x, ptrdiff_t rows, float* row, O* z, ptrdiff_t stride,
                            RowScale* scales) {
  const ptrdiff_t columns = static_cast<ptrdiff_t>(args.channels), x_stride = static_cast<ptrdiff_t>(args.x_stride);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    norm_row(x + r * x_stride, row, columns, args.norm, args.norm_eps);
    scales[r] = quantize_row(row, columns, z + r * stride);
  }
  return {z, stride, columns, scales};
}

template <class T, class O>
void int8_ffn_block(const Int8FfnPlan<T, O>& plan, ptrdiff_t block, Int8FfnScratch<T, O>& s) {
  const PartialGeluFfnArgs& args = plan.args;
  const auto& layout = plan.layout;
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride);
  const T* x = static_cast<const T*>(args.x) + begin * x_stride;

  const Int8Rows<O> z = quantized_input(args, x, rows, s.row, s.z, plan.z_stride, s.z_scales);
  const auto hidden = [&](const auto& epilogue) {
    gemm_int8(&z, 1, rows, plan.panels, layout.in_stride, layout.active, epilogue);
  };
  switch (args.activation) {
    case kGeluTanh: hidden(GeluToScratch<float, kGeluTanh>{s.h, plan.float_stride, s.b_in}); break;
    case kGeluQuick: hidden(GeluToScratch<float, kGeluQuick>{s.h, plan.float_stride, s.b_in}); break;
    default: hidden(GeluToScratch<float, kGeluErf>{s.h, plan.float_stride, s.b_in});
  }
  for (ptrdiff_t r = 0; r < rows; ++r) {
    s.h_scales[r] = quantize_row(s.h + r * plan.float_stride, layout.active, s.hq + r * plan.h_stride);
  }
  const Int8Rows<O> segments[2] = {{s.hq, plan.h_stride, layout.active, s.h_scales}, z};
  const BiasResidual<T> epilogue{static_cast<T*>(args.y) + begin * layout.channels, layout.channels,
                                 static_cast<const T*>(args.bias), args.residual ? x : nullptr, x_stride};
  gemm_int8(segments, layout.has_merged ? 2 : 1, rows, plan.panels + layout.out_offset, layout.out_stride, layout.channels,
            epilogue);
}

template <class T, class O>
void partial_gelu_ffn_int8(const PartialGeluFfnArgs& args, const Pool& pool) {
  using Plan = Int8FfnPlan<T, O>;
  const Plan plan(args, pool.threads);
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Plan& p = *static_cast<const Plan*>(raw);
    Carver count;
    (void)Int8FfnScratch<T, O>(count, p);
    Carver carver(thread_arena(count.bytes()));
    Int8FfnScratch<T, O> scratch(carver, p);
    const ptrdiff_t active = p.layout.active;
    for (ptrdiff_t i = 0; i < whole_panels(active); ++i) scratch.b_in[i] = 0.0f;
    if (p.args.b_in != nullptr) convert_row(static_cast<const T*>(p.args.b_in), scratch.b_in, active);
    for (int64_t block = begin; block < end; ++block) int8_ffn_block(p, static_cast<ptrdiff_t>(block), scratch);
  };
  pool.run(plan.blocks, body, const_cast<Plan*>(&plan));
}

// The call of a level that runs int8.
template <class T>
void partial_gelu_ffn_int8(const PartialGeluFfnArgs& args, const Pool& pool) {
  if (args.rows == 0 || args.channels == 0) return;
  with_int8_operand([&](auto operand) { partial_gelu_ffn_int8<T, decltype(operand)>(args, pool); });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
