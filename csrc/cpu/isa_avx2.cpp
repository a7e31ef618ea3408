// Level "avx2": AVX2, FMA and F16C (-mavx2 -mfma -mf16c).
#define REPAVIT_ISA avx2
#define REPAVIT_ISA_LEVEL 1

#include "kernel_list-inl.h"

void repavit::avx2::install(Kernels& table) { install_kernels<float, bf16, fp16>(table); }
