// Level "avx512_bf16": AVX-512 BF16's vdpbf16ps. All other entries are those of the level below.
#define REPAVIT_ISA avx512_bf16
#define REPAVIT_ISA_LEVEL 3

#include "dispatch.h"
#include "fused_blocks-inl.h"
#include "partial_gelu_ffn-inl.h"
#include "patch_projection-inl.h"
#include "peak-inl.h"
#include "pooled_head-inl.h"
#include "rep_attention-inl.h"
#include "token_embedding-inl.h"

namespace repavit {
namespace avx512_bf16 {

void install(Kernels& table) {
  table.fused_blocks[kBFloat16] = fused_blocks<bf16>;
  table.partial_gelu_ffn[kBFloat16] = partial_gelu_ffn<bf16>;
  table.patch_projection[kBFloat16] = patch_projection<bf16>;
  table.pooled_head[kBFloat16] = pooled_head<bf16>;
  table.product_peak[kBFloat16] = product_peak<bf16>;
  table.rep_attention[kBFloat16] = rep_attention<bf16>;
  table.token_embedding[kBFloat16] = token_embedding<bf16>;
}

}  // namespace avx512_bf16
}  // namespace repavit
