// Level "avx512": AVX-512 F, BW, VL and DQ.
#define REPAVIT_ISA avx512
#define REPAVIT_ISA_LEVEL 2

#include "kernel_list-inl.h"

void repavit::avx512::install(Kernels& table) { install_kernels<float, bf16, fp16>(table); }
