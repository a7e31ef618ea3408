// Level "avx2": AVX2, FMA and F16C (-mavx2 -mfma -mf16c).
#define REPAVIT_ISA avx2
#define REPAVIT_ISA_LEVEL 1

#include "dispatch.h"
#include "fused_blocks-inl.h"
#include "partial_gelu_ffn-inl.h"
#include "patch_projection-inl.h"
#include "peak-inl.h"
#include "pooled_head-inl.h"
#include "rep_attention-inl.h"
#include "token_embedding-inl.h"

namespace repavit {
namespace avx2 {

void install(Kernels& table) {
  table.fused_blocks[kFloat32] = fused_blocks<float>;
  table.fused_blocks[kBFloat16] = fused_blocks<bf16>;
  table.fused_blocks[kFloat16] = fused_blocks<fp16>;
  table.partial_gelu_ffn[kFloat32] = partial_gelu_ffn<float>;
  table.partial_gelu_ffn[kBFloat16] = partial_gelu_ffn<bf16>;
  table.partial_gelu_ffn[kFloat16] = partial_gelu_ffn<fp16>;
  table.patch_projection[kFloat32] = patch_projection<float>;
  table.patch_projection[kBFloat16] = patch_projection<bf16>;
  table.patch_projection[kFloat16] = patch_projection<fp16>;
  table.pooled_head[kFloat32] = pooled_head<float>;
  table.pooled_head[kBFloat16] = pooled_head<bf16>;
  table.pooled_head[kFloat16] = pooled_head<fp16>;
  table.product_peak[kFloat32] = product_peak<float>;
  table.product_peak[kBFloat16] = product_peak<bf16>;
  table.product_peak[kFloat16] = product_peak<fp16>;
  table.rep_attention[kFloat32] = rep_attention<float>;
  table.rep_attention[kBFloat16] = rep_attention<bf16>;
  table.rep_attention[kFloat16] = rep_attention<fp16>;
  table.token_embedding[kFloat32] = token_embedding<float>;
  table.token_embedding[kBFloat16] = token_embedding<bf16>;
  table.token_embedding[kFloat16] = token_embedding<fp16>;
}

}  // namespace avx2
}  // namespace repavit
