// Chooses the instruction-set level once, at the first call that needs it: CPUID, XCR0 and REPAVIT_CPU_ISA.
#pragma once

#include "kernels.h"

namespace repavit {

// Each level writes the entries it has something better for; levels are applied in order, lowest first.
namespace scalar { void install(Kernels&); }
namespace avx2 { void install(Kernels&); }
namespace avx512 { void install(Kernels&); }
namespace avx512_bf16 { void install(Kernels&); }
namespace amx {
void install(Kernels&);
bool self_check();  // whether a small product comes out right, on this thread
}

const char* isa_name(int level);

// Highest level that this build contains and this machine can run. Asks CPUID every time.
int supported_level();

// supported_level(), lowered by `wanted` ("scalar", "avx2", ...; null or empty: not at all).
// Throws std::runtime_error if `wanted` is no level's name.
int lowered_level(const char* wanted);

// Level in use: lowered_level(getenv("REPAVIT_CPU_ISA")), decided at the first successful call; without AMX where the system
// does not let this process have it, or its first product comes out wrong.
int isa_level();

// Why the level in use is not AMX, which this processor has: 0 nothing of the kind, or REPAVIT_CPU_ISA asked for another,
// 1 the system refused its registers, 2 a product came out wrong, 3 this build is without it.
int amx_refusal();

// Whether the processor multiplies bytes in 256-bit registers (AVX-VNNI), and in 512-bit ones (AVX512-VNNI).
bool has_avx_vnni();
bool has_avx512_vnni();

// Functions of one level <= supported_level(), and of the level in use.
Kernels kernels_at(int level);
const Kernels& kernels();
// Functions of the level in use for calls with int8 weights: of AVX2, where an AVX-512 processor does not multiply bytes.
const Kernels& int8_kernels();

}  // namespace repavit
