// The list of kernels: what a level writes into the table, for the element types that it names.
//
// An operator is added here once; cpu/isa_<level>.cpp says which flags it is compiled with and for which types it has
// something better than the level below.
#pragma once

#include "dispatch.h"
#include "fused_blocks-inl.h"
#include "gated_ffn-inl.h"
#include "partial_gelu_ffn-inl.h"
#include "patch_projection-inl.h"
#include "peak-inl.h"
#include "pooled_head-inl.h"
#include "rep_attention-inl.h"
#include "token_embedding-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class T>
void install_one(Kernels& table) {
  constexpr DType kType = kDTypeOf<T>;
  table.fused_blocks[kType] = fused_blocks<T>;
  table.gated_ffn[kType] = gated_ffn<T>;
  table.partial_gelu_ffn[kType] = partial_gelu_ffn<T>;
  table.patch_projection[kType] = patch_projection<T>;
  table.pooled_head[kType] = pooled_head<T>;
  table.product_peak[kType] = product_peak<T>;
  table.rep_attention[kType] = rep_attention<T>;
  table.token_embedding[kType] = token_embedding<T>;
}

// A packed layout is the same at every level, so one level packs for all.
template <class T>
void install_packing_of(Kernels& table) {
  constexpr DType kType = kDTypeOf<T>;
  table.partial_gelu_ffn_packed_bytes[kType] = ffn_packed_bytes<T, FfnKind::kPlain>;
  table.partial_gelu_ffn_pack[kType] = ffn_pack<T, FfnKind::kPlain>;
  table.partial_gelu_ffn_unpack[kType] = ffn_unpack<T, FfnKind::kPlain>;
  table.gated_ffn_packed_bytes[kType] = ffn_packed_bytes<T, FfnKind::kGated>;
  table.gated_ffn_pack[kType] = ffn_pack<T, FfnKind::kGated>;
  table.gated_ffn_unpack[kType] = ffn_unpack<T, FfnKind::kGated>;
  if constexpr (kHasInt8<T>) {
    table.partial_gelu_ffn_int8_packed_bytes[kType] = ffn_packed_bytes<int8_t, FfnKind::kPlain>;
    table.partial_gelu_ffn_int8_pack[kType] = ffn_pack<T, FfnKind::kPlain, int8_t>;
    table.partial_gelu_ffn_int8_unpack[kType] = ffn_unpack<T, FfnKind::kPlain, int8_t>;
    table.gated_ffn_int8_packed_bytes[kType] = ffn_packed_bytes<int8_t, FfnKind::kGated>;
    table.gated_ffn_int8_pack[kType] = ffn_pack<T, FfnKind::kGated, int8_t>;
    table.gated_ffn_int8_unpack[kType] = ffn_unpack<T, FfnKind::kGated, int8_t>;
    table.rep_attention_int8_packed_bytes[kType] = rep_attention_packed_bytes<int8_t>;
    table.rep_attention_int8_pack[kType] = rep_attention_pack<T, int8_t>;
    table.rep_attention_int8_unpack[kType] = rep_attention_unpack<T, int8_t>;
  }
  table.matrix_packed_bytes[kType] = matrix_packed_bytes<T>;
  table.matrix_pack[kType] = matrix_pack<T>;
  table.matrix_unpack[kType] = matrix_unpack<T>;
  table.rep_attention_packed_bytes[kType] = rep_attention_packed_bytes<T>;
  table.rep_attention_pack[kType] = rep_attention_pack<T>;
  table.rep_attention_unpack[kType] = rep_attention_unpack<T>;
}

template <class... Types>
void install_kernels(Kernels& table) {
  (install_one<Types>(table), ...);
  table.int8_product_peak = int8_product_peak;
}

template <class... Types>
void install_packing(Kernels& table) {
  (install_packing_of<Types>(table), ...);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
