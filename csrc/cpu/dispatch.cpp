#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// One bit for each level of which the library holds the code; setup.py leaves some out where it is told so. The portable
// one is always there.
#if !defined(__x86_64__)
#define REPAVIT_BUILT_LEVELS 1
#elif !defined(REPAVIT_BUILT_LEVELS)
#define REPAVIT_BUILT_LEVELS 31
#endif

namespace repavit {
namespace {

// The best level up to this one of which there is code.
int built_level(int level) {
  while (level > 0 && (REPAVIT_BUILT_LEVELS >> level & 1) == 0) --level;
  return level;
}

constexpr const char* kNames[kIsaLevels] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros where the leaf does not exist
  return r;
}

bool has(unsigned value, unsigned mask) { return (value & mask) == mask; }

// Register files that the operating system saves on a context switch; CPUID alone says nothing about it.
unsigned xcr0() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

#endif

}  // namespace

const char* isa_name(int level) { return kNames[level]; }

namespace {

// Tests without such a processor say that there is one, and whether the system lets this process have it.
#if defined(REPAVIT_EMULATED_AMX)
int level_of_the_processor() { return kAmx; }
bool system_allows_amx() { return REPAVIT_EMULATED_AMX; }
#else

int level_of_the_processor() {
#if defined(__x86_64__)
  constexpr unsigned kOsxsave = 1u << 27, kAvx = 1u << 28, kFma = 1u << 12, kF16c = 1u << 29;
  constexpr unsigned kAvx2Bit = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kYmmState = 0x06, kZmmState = 0xe6, kBf16Bit = 1u << 5;

  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0);
  if (!has(basic.ecx, kOsxsave | kAvx | kFma | kF16c) || !has(extended.ebx, kAvx2Bit)) return kScalar;
  const unsigned saved = xcr0();
  if (!has(saved, kYmmState)) return kScalar;
  if (!has(saved, kZmmState) || !has(extended.ebx, kF | kDq | kBw | kVl)) return kAvx2;
  const bool bf16_dot = extended.eax >= 1 && has(cpuid(7, 1).eax, kBf16Bit);  // leaf 7.0 EAX: last subleaf
  if (!bf16_dot) return kAvx512;
  constexpr unsigned kAmxBits = 1u << 22 | 1u << 24 | 1u << 25, kTileState = 0x60000;  // BF16, TILE and INT8
  return has(extended.edx, kAmxBits) && has(saved, kTileState) ? kAmx : kAvx512Bf16;
#else
  return kScalar;
#endif
}

// Asks Linux, once for all threads of this process, to let them use the registers of AMX.
[[maybe_unused]] bool system_allows_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

#if defined(__x86_64__)
bool has_vnni(bool (*bit)(), int at_least) {
#if defined(REPAVIT_EMULATED_VNNI)  // csrc/tests/run.sh, where the instruction is written in C++
  (void)bit;
  return isa_level() >= at_least;
#else
  return isa_level() >= at_least && bit();
#endif
}
#endif

}  // namespace

bool has_avx_vnni() {
#if defined(__x86_64__)
  static const bool has_it = has_vnni([] { return cpuid(7, 0).eax >= 1 && has(cpuid(7, 1).eax, 1u << 4); }, kAvx2);
  return has_it;
#else
  return false;
#endif
}

bool has_avx512_vnni() {
#if defined(__x86_64__)
  static const bool has_it = has_vnni([] { return has(cpuid(7, 0).ecx, 1u << 11); }, kAvx512);
  return has_it;
#else
  return false;
#endif
}

int supported_level() { return built_level(level_of_the_processor()); }

int lowered_level(const char* wanted) {
  const int supported = supported_level();
  if (wanted == nullptr || *wanted == '\0') return supported;
  for (int level = 0; level < kIsaLevels; ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return built_level(level < supported ? level : supported);
  }
  throw std::runtime_error(std::string("REPAVIT_CPU_ISA: got '") + wanted +
                           "', wanted one of scalar, avx2, avx512, avx512_bf16, amx (it only ever lowers the level)");
}

namespace {

struct Choice {
  int level, amx_refusal;
};

Choice choose_level() {
  const char* wanted = std::getenv("REPAVIT_CPU_ISA");
  const int level = lowered_level(wanted);
#if REPAVIT_BUILT_LEVELS >> 4 & 1
  if (level == kAmx) {
    if (!system_allows_amx()) return {built_level(kAvx512Bf16), 1};
    if (!amx::self_check()) return {built_level(kAvx512Bf16), 2};
  }
#else
  const bool lowered = wanted != nullptr && *wanted != '\0' && std::strcmp(wanted, kNames[kAmx]) != 0;
  if (level_of_the_processor() == kAmx && !lowered) return {level, 3};
#endif
  return {level, 0};
}

const Choice& choice() {
  static const Choice chosen = choose_level();
  return chosen;
}

}  // namespace

int isa_level() { return choice().level; }
int amx_refusal() { return choice().amx_refusal; }

Kernels kernels_at(int level) {
  Kernels table{};
  scalar::install(table);
#if REPAVIT_BUILT_LEVELS >> 1 & 1
  if (level >= kAvx2) avx2::install(table);
#endif
#if REPAVIT_BUILT_LEVELS >> 2 & 1
  if (level >= kAvx512) avx512::install(table);
#endif
#if REPAVIT_BUILT_LEVELS >> 3 & 1
  if (level >= kAvx512Bf16) avx512_bf16::install(table);
#endif
#if REPAVIT_BUILT_LEVELS >> 4 & 1
  if (level >= kAmx) amx::install(table);
#endif
  (void)level;
  return table;
}

const Kernels& kernels() {
  static const Kernels table = kernels_at(isa_level());
  return table;
}

const Kernels& int8_kernels() {
  static const Kernels table = kernels_at(built_level(isa_level() > kAvx2 && !has_avx512_vnni() ? kAvx2 : isa_level()));
  return table;
}

}  // namespace repavit
