// y = z Wᵀ [+ bias] over patches: patch embedding (a convolution whose stride is its kernel) and Swin's patch merging.
//
// The rows of a block are gathered, and normed, into scratch; then it is a product like any other. No im2col of the whole
// map, no pass over y.
#pragma once

#include "arena.h"
#include "bias_residual-inl.h"
#include "layernorm-inl.h"
#include "packed_matrix-inl.h"
#include "scratch-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// One call, as every thread sees it.
template <class T>
struct PatchPlan {
  const PatchProjectionArgs& args;
  MatrixLayout<T> layout;
  const T* panels;
  ptrdiff_t rows, blocks, z_stride;

  PatchPlan(const PatchProjectionArgs& a, int threads)
      : args(a),
        layout(a.outputs, a.planes * a.lines * a.run),
        panels(MatrixLayout<T>::panels(a.packed)),
        rows(static_cast<ptrdiff_t>(a.batch * a.grid[0] * a.grid[1])),
        z_stride(scratch_stride<Operand<T>>(layout.depth)) {
    constexpr ptrdiff_t kWorkPerThread = ptrdiff_t{1} << 20;  // a fork pays from about a million operations a thread
    const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(sizeof(Operand<T>)) * z_stride;
    const ptrdiff_t tiles = static_cast<ptrdiff_t>(l2_cache_bytes()) / 2 / row_bytes / kTileRows;
    const ptrdiff_t limit = (tiles < 2 ? 2 : tiles) * kTileRows;  // rows that L2 holds beside a panel
    const ptrdiff_t useful = 1 + 2 * rows * layout.depth * layout.outputs / kWorkPerThread;
    const ptrdiff_t owners = least(least(useful, threads), rows);
    blocks = owners * ((rows + owners * limit - 1) / (owners * limit));
  }
  ptrdiff_t block_begin(ptrdiff_t block) const { return rows * block / blocks; }
  ptrdiff_t block_rows() const { return (rows + blocks - 1) / blocks; }
};

// One patch's elements, or their LayerNorm core.
template <class T>
void gather_patch(const PatchPlan<T>& plan, ptrdiff_t row, Operand<T>* z) {
  const PatchProjectionArgs& args = plan.args;
  const int64_t across = row % args.grid[1], down = row / args.grid[1] % args.grid[0];
  const int64_t map = row / args.grid[1] / args.grid[0];
  const T* patch = static_cast<const T*>(args.x) + map * args.strides[0] + down * args.strides[1] +
                   across * args.strides[2];
  Operand<T>* to = z;
  for (int64_t plane = 0; plane < args.planes; ++plane) {
    for (int64_t line = 0; line < args.lines; ++line, to += args.run) {
      convert_row(patch + plane * args.strides[3] + line * args.strides[4], to, static_cast<ptrdiff_t>(args.run));
    }
  }
  if (args.normalize) layer_norm_row(z, z, plan.layout.depth, args.norm_eps);
  for (ptrdiff_t k = plan.layout.depth; k % kInterleave<T> != 0; ++k) z[k] = Operand<T>{};
}

template <class T>
void project_patches(const PatchPlan<T>& plan, ptrdiff_t block, Operand<T>* z) {
  const ptrdiff_t begin = plan.block_begin(block), rows = plan.block_begin(block + 1) - begin;
  for (ptrdiff_t r = 0; r < rows; ++r) gather_patch(plan, begin + r, z + r * plan.z_stride);
  const Rows<T> patches{z, plan.z_stride, plan.layout.depth};
  const ptrdiff_t outputs = plan.layout.outputs;
  const BiasResidual<T> epilogue{static_cast<T*>(plan.args.y) + begin * outputs, outputs,
                                 static_cast<const T*>(plan.args.bias), nullptr, 0};
  gemm(&patches, 1, rows, plan.panels, plan.layout.stride, outputs, epilogue);
}

// patch_projection_<T>: see PatchProjectionArgs.
template <class T>
void patch_projection(const PatchProjectionArgs& args, const Pool& pool) {
  if (args.batch * args.grid[0] * args.grid[1] * args.outputs == 0) return;
  const PatchPlan<T> plan(args, pool.threads);
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const PatchPlan<T>& p = *static_cast<const PatchPlan<T>*>(raw);
    const size_t bytes = sizeof(Operand<T>) * static_cast<size_t>(p.block_rows() * p.z_stride);
    auto* scratch = static_cast<Operand<T>*>(thread_arena(bytes));
    for (int64_t block = begin; block < end; ++block) project_patches(p, static_cast<ptrdiff_t>(block), scratch);
  };
  pool.run(plan.blocks, body, const_cast<PatchPlan<T>*>(&plan));
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
