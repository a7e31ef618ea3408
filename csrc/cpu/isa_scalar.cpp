// Level "scalar": 16-byte vectors that any x86-64 and AArch64 have; also float64, and packing for every level.
#define REPAVIT_ISA scalar
#define REPAVIT_ISA_LEVEL 0

#include "kernel_list-inl.h"

void repavit::scalar::install(Kernels& table) {
  install_kernels<float, bf16, fp16, double>(table);
  install_packing<float, bf16, fp16, double>(table);
}
