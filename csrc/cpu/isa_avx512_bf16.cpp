// Level "avx512_bf16": AVX-512 BF16's vdpbf16ps. Its fp32 entries are those of the level below.
#define REPAVIT_ISA avx512_bf16
#define REPAVIT_ISA_LEVEL 3

#include "dispatch.h"

namespace repavit {
namespace avx512_bf16 {

void install(Kernels&) {}

}  // namespace avx512_bf16
}  // namespace repavit
