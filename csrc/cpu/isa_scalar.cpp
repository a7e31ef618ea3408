// Level "scalar": 16-byte vectors that any x86-64 and AArch64 have; also float64, and packing for every level.
#define REPAVIT_ISA scalar
#define REPAVIT_ISA_LEVEL 0

#include "dispatch.h"
#include "fused_blocks-inl.h"
#include "partial_gelu_ffn-inl.h"
#include "patch_projection-inl.h"
#include "peak-inl.h"
#include "pooled_head-inl.h"
#include "rep_attention-inl.h"
#include "token_embedding-inl.h"

namespace repavit {
namespace scalar {
namespace {

template <class T, int kDType>
void install_packing(Kernels& table) {
  table.partial_gelu_ffn_packed_bytes[kDType] = partial_gelu_ffn_packed_bytes<T>;
  table.partial_gelu_ffn_pack[kDType] = partial_gelu_ffn_pack<T, kDType>;
  table.partial_gelu_ffn_unpack[kDType] = partial_gelu_ffn_unpack<T>;
  table.matrix_packed_bytes[kDType] = matrix_packed_bytes<T>;
  table.matrix_pack[kDType] = matrix_pack<T, kDType>;
  table.matrix_unpack[kDType] = matrix_unpack<T>;
  table.rep_attention_packed_bytes[kDType] = rep_attention_packed_bytes<T>;
  table.rep_attention_pack[kDType] = rep_attention_pack<T, kDType>;
  table.rep_attention_unpack[kDType] = rep_attention_unpack<T>;
}

}  // namespace

void install(Kernels& table) {
  install_packing<float, kFloat32>(table);
  install_packing<bf16, kBFloat16>(table);
  install_packing<fp16, kFloat16>(table);
  install_packing<double, kFloat64>(table);
  table.fused_blocks[kFloat32] = fused_blocks<float>;
  table.fused_blocks[kBFloat16] = fused_blocks<bf16>;
  table.fused_blocks[kFloat16] = fused_blocks<fp16>;
  table.fused_blocks[kFloat64] = fused_blocks<double>;
  table.partial_gelu_ffn[kFloat32] = partial_gelu_ffn<float>;
  table.partial_gelu_ffn[kBFloat16] = partial_gelu_ffn<bf16>;
  table.partial_gelu_ffn[kFloat16] = partial_gelu_ffn<fp16>;
  table.partial_gelu_ffn[kFloat64] = partial_gelu_ffn<double>;
  table.patch_projection[kFloat32] = patch_projection<float>;
  table.patch_projection[kBFloat16] = patch_projection<bf16>;
  table.patch_projection[kFloat16] = patch_projection<fp16>;
  table.patch_projection[kFloat64] = patch_projection<double>;
  table.pooled_head[kFloat32] = pooled_head<float>;
  table.pooled_head[kBFloat16] = pooled_head<bf16>;
  table.pooled_head[kFloat16] = pooled_head<fp16>;
  table.pooled_head[kFloat64] = pooled_head<double>;
  table.product_peak[kFloat32] = product_peak<float>;
  table.product_peak[kBFloat16] = product_peak<bf16>;
  table.product_peak[kFloat16] = product_peak<fp16>;
  table.product_peak[kFloat64] = product_peak<double>;
  table.rep_attention[kFloat32] = rep_attention<float>;
  table.rep_attention[kBFloat16] = rep_attention<bf16>;
  table.rep_attention[kFloat16] = rep_attention<fp16>;
  table.rep_attention[kFloat64] = rep_attention<double>;
  table.token_embedding[kFloat32] = token_embedding<float>;
  table.token_embedding[kBFloat16] = token_embedding<bf16>;
  table.token_embedding[kFloat16] = token_embedding<fp16>;
  table.token_embedding[kFloat64] = token_embedding<double>;
}

}  // namespace scalar
}  // namespace repavit
