// y = [prefix; patches Wᵀ + bias] + position per image [, LayerNorm]: what a ViT's blocks start from, without a pass
// for the class token, one for the position and one for the norm.
//
// Patches are projected in blocks as patch_projection does, straight to their rows of y; a block norms its rows while
// they are in cache, and who has an image's first patch also has its prefix.
#pragma once

#include "patch_projection-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// out = in [+ added], so many elements.
template <class T>
void copy_rows(const T* in, const T* added, T* out, ptrdiff_t elements) {
  using S = SimdOf<T>;
  for_each_vector(in, elements, [&](typename S::V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
    store_some<S>(out + i, added != nullptr ? v + S::load(added + i, n) : v, n);
  });
}

// Patches [first, first + rows) of one image, given as z; its first patch brings the prefix along.
template <class T>
void embed_patches(const TokenEmbeddingArgs& args, const PatchPlan<T>& plan, ptrdiff_t image, ptrdiff_t first,
                   ptrdiff_t rows, const Operand<T>* z) {
  const ptrdiff_t channels = plan.layout.outputs, prefix = static_cast<ptrdiff_t>(args.prefix);
  const ptrdiff_t tokens = prefix + static_cast<ptrdiff_t>(args.patches.grid[0] * args.patches.grid[1]);
  T* const y = static_cast<T*>(args.patches.y) + image * tokens * channels;
  const T* const position = static_cast<const T*>(args.position);
  ptrdiff_t begin = prefix + first;  // tokens of the image
  const ptrdiff_t end = begin + rows, at = begin * channels;
  project_patches<T>(plan, z, rows, y + at, position != nullptr ? position + at : nullptr);
  if (first == 0) {
    begin = 0;
    copy_rows(static_cast<const T*>(args.prefix_rows), position, y, prefix * channels);
  }
  const Affine<T> affine{static_cast<const T*>(args.norm_weight), static_cast<const T*>(args.norm_bias)};
  for (ptrdiff_t i = begin; args.normalize && i < end; ++i) {
    layer_norm_row(y + i * channels, y + i * channels, channels, args.norm_eps, affine);
  }
}

// token_embedding_<T>: see TokenEmbeddingArgs.
template <class T>
void token_embedding(const TokenEmbeddingArgs& args, const Pool& pool) {
  if (args.patches.batch == 0) return;
  const PatchPlan<T> plan(args.patches, pool.threads);
  const ptrdiff_t patches = static_cast<ptrdiff_t>(args.patches.grid[0] * args.patches.grid[1]);
  for_each_block(plan, pool, [&](ptrdiff_t first, ptrdiff_t rows) {
    const Operand<T>* z = gather_patches(plan, first, rows);
    for (ptrdiff_t end = first + rows, next; first < end; first = next) {
      const ptrdiff_t image = first / patches;
      next = least((image + 1) * patches, end);
      embed_patches(args, plan, image, first - image * patches, next - first, z);
      z += (next - first) * plan.z_stride;
    }
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
