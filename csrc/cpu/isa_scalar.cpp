// Level "scalar": 16-byte vectors that any x86-64 and AArch64 have; also float64, and packing for every level.
#define REPAVIT_ISA scalar
#define REPAVIT_ISA_LEVEL 0

// In the library alone: those of glibc 2.29 differ in how they report errors, and a static driver has no versions.
#if defined(__PIC__) && !defined(__PIE__) && defined(__gnu_linux__)
#if defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver exp2,exp2@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver exp2,exp2@GLIBC_2.17");
#endif
#endif

#include "kernel_list-inl.h"

void repavit::scalar::install(Kernels& table) {
  install_kernels<float, bf16, fp16, double>(table);
  install_packing<float, bf16, fp16, double>(table);
}
