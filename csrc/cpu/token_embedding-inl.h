// y = [prefix; patches Wᵀ + bias] + position per image [, LayerNorm]: what a ViT's blocks start from, without a pass
// for the class token, one for the position and one for the norm.
//
// Patches are projected in blocks as patch_projection does, straight to their rows of y; a block norms its rows while
// they are in cache, and who has an image's first patch also has its prefix.
#pragma once

#include "patch_projection-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Rows of y as patches count them: image after image, each behind its prefix.
template <class T>
struct TokensOfPatches {
  using S = SimdOf<T>;
  using V = typename S::V;
  T* y;
  const T *bias, *position;              // [channels], [prefix + patches, channels]; or null
  ptrdiff_t channels, patches, prefix;   // rows of each image
  ptrdiff_t first;                       // patch that row 0 of the product is

  REPAVIT_INLINE T* token(ptrdiff_t patch) const {
    return y + (patch / patches * (prefix + patches) + prefix + patch % patches) * channels;
  }
  REPAVIT_INLINE const T* position_of(ptrdiff_t patch) const {
    return position != nullptr ? position + (prefix + patch % patches) * channels : nullptr;
  }

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    BiasResidual<T>{token(first + row), 0, bias, position_of(first + row), 0}(0, col, acc, valid);
  }

  // The prefix of the image whose first patch this is.
  void fill_prefix(ptrdiff_t patch, const T* rows) const {
    T* const out = token(patch) - prefix * channels;
    for_each_vector(rows, prefix * channels, [&](V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
      store_some<S>(out + i, position != nullptr ? v + S::load(position + i, n) : v, n);
    });
  }
};

template <class T>
void embed_patches(const TokenEmbeddingArgs& args, const PatchPlan<T>& plan, ptrdiff_t first, ptrdiff_t rows) {
  const ptrdiff_t channels = plan.layout.outputs, prefix = static_cast<ptrdiff_t>(args.prefix);
  const ptrdiff_t patches = static_cast<ptrdiff_t>(args.patches.grid[0] * args.patches.grid[1]);
  const TokensOfPatches<T> tokens{static_cast<T*>(args.patches.y), static_cast<const T*>(args.patches.bias),
                                  static_cast<const T*>(args.position), channels, patches, prefix, first};
  project_patches(plan, first, rows, tokens);
  const Affine<T> affine{static_cast<const T*>(args.norm_weight), static_cast<const T*>(args.norm_bias)};
  for (ptrdiff_t patch = first; patch < first + rows; ++patch) {
    T* row = tokens.token(patch);
    if (patch % patches == 0) {
      tokens.fill_prefix(patch, static_cast<const T*>(args.prefix_rows));
      row -= prefix * channels;
    }
    for (; args.normalize && row <= tokens.token(patch); row += channels) {
      layer_norm_row(row, row, channels, args.norm_eps, affine);
    }
  }
}

// token_embedding_<T>: see TokenEmbeddingArgs.
template <class T>
void token_embedding(const TokenEmbeddingArgs& args, const Pool& pool) {
  if (args.patches.batch == 0) return;
  const PatchPlan<T> plan(args.patches, pool.threads);
  for_each_block(plan, pool, [&](ptrdiff_t first, ptrdiff_t rows) { embed_patches(args, plan, first, rows); });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
