// Level "avx512": AVX-512 F, BW, VL and DQ.
#define REPAVIT_ISA avx512
#define REPAVIT_ISA_LEVEL 2

#include "dispatch.h"
#include "partial_gelu_ffn-inl.h"

namespace repavit {
namespace avx512 {

void install(Kernels& table) {
  table.partial_gelu_ffn[kFloat32] = partial_gelu_ffn<float>;
  table.partial_gelu_ffn[kBFloat16] = partial_gelu_ffn<bf16>;
  table.partial_gelu_ffn[kFloat16] = partial_gelu_ffn<fp16>;
}

}  // namespace avx512
}  // namespace repavit
