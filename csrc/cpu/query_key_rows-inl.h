// What happens to a head's queries and keys between their projection and the scores: a norm of their own (QK-norm), then
// rotation by their token's place (rotary embedding). In place, in scratch that the product has just left in cache.
#pragma once

#include "layernorm-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// The first n lanes, or all.
template <class S, class O>
REPAVIT_INLINE typename S::V load_some(const O* p, ptrdiff_t n) {
  return n >= S::kLanes ? S::load(p) : S::load(p, static_cast<int>(n));
}

// Pairs (i, i + width / 2): (a, b) → (a cos - b sin, b cos + a sin), each side by its own element of the tables.
template <class T>
void rotate_halves(Operand<T>* row, const Accumulator<T>* cos, const Accumulator<T>* sin, ptrdiff_t width) {
  using S = SimdOf<T>;
  using V = typename S::V;
  const ptrdiff_t half = width / 2;
  Operand<T>* const upper = row + half;
  for (ptrdiff_t i = 0; i < half; i += S::kLanes) {
    const ptrdiff_t n = half - i;
    const V a = load_some<S>(row + i, n), b = load_some<S>(upper + i, n);
    const V turned = S::fnma(b, load_some<S>(sin + i, n), a * load_some<S>(cos + i, n));
    const V other = S::fma(a, load_some<S>(sin + half + i, n), b * load_some<S>(cos + half + i, n));
    const int lanes = n < S::kLanes ? static_cast<int>(n) : S::kLanes;
    store_some<S>(row + i, turned, lanes);
    store_some<S>(upper + i, other, lanes);
  }
}

// The same of pairs (2 i, 2 i + 1).
template <class T>
void rotate_neighbours(Operand<T>* row, const Accumulator<T>* cos, const Accumulator<T>* sin, ptrdiff_t width) {
  using S = SimdOf<T>;
  using V = typename S::V;
  Accumulator<T> alternating[S::kLanes];
  for (int i = 0; i < S::kLanes; ++i) alternating[i] = i % 2 == 0 ? -1 : 1;
  const V signs = S::load(alternating);
  for (ptrdiff_t i = 0; i < width; i += S::kLanes) {
    const ptrdiff_t n = width - i;
    const V v = load_some<S>(row + i, n), turn = load_some<S>(sin + i, n) * signs;
    const V turned = S::fma(S::swap_pairs(v), turn, v * load_some<S>(cos + i, n));
    store_some<S>(row + i, turned, n < S::kLanes ? static_cast<int>(n) : S::kLanes);
  }
}

// One query or key [d_qk] of a head through norm and rotation.
template <class T>
void turn_row(const QueryKeyArgs& args, const void* norm, ptrdiff_t d_qk, ptrdiff_t image, ptrdiff_t head, ptrdiff_t token,
              Operand<T>* row) {
  if (args.norm != kNoNorm) {
    const T* weight = static_cast<const T*>(norm);
    const Affine<T> affine{weight, weight + d_qk};
    if (args.norm == kLayerNorm) {
      layer_norm_row(row, row, d_qk, args.norm_eps, affine);
    } else {
      rms_norm_row(row, row, d_qk, args.norm_eps, affine);
    }
  }
  if (args.cos == nullptr || token < 0) return;
  const auto row_of = [&](const void* table, const int64_t (&strides)[3]) {
    return static_cast<const Accumulator<T>*>(table) + image * strides[0] + head * strides[1] + token * strides[2];
  };
  const Accumulator<T> *cos = row_of(args.cos, args.cos_strides), *sin = row_of(args.sin, args.sin_strides);
  const ptrdiff_t width = static_cast<ptrdiff_t>(args.width);
  if (args.interleaved) return rotate_neighbours<T>(row, cos, sin, width);
  rotate_halves<T>(row, cos, sin, width);
}

// q and k, at the head of each row [q | k | v], of `count` tokens from the `first` of all images' on.
template <class T>
void turn_rows(const QueryKeyArgs& args, ptrdiff_t d_qk, ptrdiff_t length, ptrdiff_t head, ptrdiff_t first, ptrdiff_t count,
               Operand<T>* rows, ptrdiff_t stride) {
  if (args.norm == kNoNorm && args.cos == nullptr) return;
  const ptrdiff_t prefix = length - static_cast<ptrdiff_t>(args.tokens);
  for (ptrdiff_t r = 0; r < count; ++r, rows += stride) {
    const ptrdiff_t image = (first + r) / length, token = (first + r) % length - prefix;
    turn_row<T>(args, args.q_norm, d_qk, image, head, token, rows);
    turn_row<T>(args, args.k_norm, d_qk, image, head, token, rows + d_qk);
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
