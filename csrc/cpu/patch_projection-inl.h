// y = z Wᵀ [+ bias] over patches: patch embedding (a convolution whose stride is its kernel) and Swin's patch merging.
//
// The rows of a block are gathered, and normed, into scratch; then it is a product like any other. No im2col of the whole
// map, no pass over y.
#pragma once

#include "arena.h"
#include "bias_residual-inl.h"
#include "layernorm-inl.h"
#include "owners-inl.h"
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
    const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(sizeof(Operand<T>)) * z_stride;
    const ptrdiff_t tiles = static_cast<ptrdiff_t>(l2_cache_bytes()) / 2 / row_bytes / kTileRows;
    const ptrdiff_t limit = (tiles < 2 ? 2 : tiles) * kTileRows;  // rows that L2 holds beside a panel
    const double weights = static_cast<double>(layout.depth) * static_cast<double>(layout.outputs);
    const ptrdiff_t owners = least(useful_threads(2.0 * static_cast<double>(rows) * weights, threads), rows);
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

// Some patches of a block, in this thread's scratch.
template <class T>
const Operand<T>* gather_patches(const PatchPlan<T>& plan, ptrdiff_t first, ptrdiff_t rows) {
  const size_t bytes = sizeof(Operand<T>) * static_cast<size_t>(plan.block_rows() * plan.z_stride);
  auto* z = static_cast<Operand<T>*>(thread_arena(bytes));
  for (ptrdiff_t r = 0; r < rows; ++r) gather_patch(plan, first + r, z + r * plan.z_stride);
  return z;
}

// Their product, to rows of y that follow each other; `added` are rows like those, or null.
template <class T>
void project_patches(const PatchPlan<T>& plan, const Operand<T>* z, ptrdiff_t rows, T* y, const T* added) {
  const ptrdiff_t outputs = plan.layout.outputs;
  const Rows<T> patches{z, plan.z_stride, plan.layout.depth};
  gemm(&patches, 1, rows, plan.panels, plan.layout.stride, outputs,
       BiasResidual<T>{y, outputs, static_cast<const T*>(plan.args.bias), added, outputs});
}

// Runs `project(first patch, patches)` for every block.
template <class T, class Project>
void for_each_block(const PatchPlan<T>& plan, const Pool& pool, const Project& project) {
  struct Context {
    const PatchPlan<T>& plan;
    const Project& project;
  } context{plan, project};
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    for (ptrdiff_t block = static_cast<ptrdiff_t>(begin); block < end; ++block) {
      const ptrdiff_t first = c.plan.block_begin(block);
      c.project(first, c.plan.block_begin(block + 1) - first);
    }
  };
  pool.run(plan.blocks, body, &context);
}

// patch_projection_<T>: see PatchProjectionArgs.
template <class T>
void patch_projection(const PatchProjectionArgs& args, const Pool& pool) {
  if (args.batch * args.grid[0] * args.grid[1] * args.outputs == 0) return;
  const PatchPlan<T> plan(args, pool.threads);
  for_each_block(plan, pool, [&](ptrdiff_t first, ptrdiff_t rows) {
    T* const y = static_cast<T*>(args.y) + first * plan.layout.outputs;
    project_patches<T>(plan, gather_patches(plan, first, rows), rows, y, nullptr);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
