// Level "avx512_bf16": AVX-512 BF16's vdpbf16ps. All other entries are those of the level below.
#define REPAVIT_ISA avx512_bf16
#define REPAVIT_ISA_LEVEL 3

#include "kernel_list-inl.h"

void repavit::avx512_bf16::install(Kernels& table) { install_kernels<bf16>(table); }
