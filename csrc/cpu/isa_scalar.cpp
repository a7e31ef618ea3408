// Level "scalar": 16-byte vectors that any x86-64 and AArch64 have; also float64, and packing for every level.
#define REPAVIT_ISA scalar
#define REPAVIT_ISA_LEVEL 0

#include "dispatch.h"
#include "partial_gelu_ffn-inl.h"

namespace repavit {
namespace scalar {
namespace {

template <class T, int kDType>
void install_packing(Kernels& table) {
  table.partial_gelu_ffn_packed_bytes[kDType] = partial_gelu_ffn_packed_bytes<T>;
  table.partial_gelu_ffn_pack[kDType] = partial_gelu_ffn_pack<T, kDType>;
  table.partial_gelu_ffn_unpack[kDType] = partial_gelu_ffn_unpack<T>;
}

}  // namespace

void install(Kernels& table) {
  install_packing<float, kFloat32>(table);
  install_packing<bf16, kBFloat16>(table);
  install_packing<fp16, kFloat16>(table);
  install_packing<double, kFloat64>(table);
  table.partial_gelu_ffn[kFloat32] = partial_gelu_ffn<float>;
  table.partial_gelu_ffn[kBFloat16] = partial_gelu_ffn<bf16>;
  table.partial_gelu_ffn[kFloat16] = partial_gelu_ffn<fp16>;
  table.partial_gelu_ffn[kFloat64] = partial_gelu_ffn<double>;
}

}  // namespace scalar
}  // namespace repavit
