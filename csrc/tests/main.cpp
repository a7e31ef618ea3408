// Runs every kernel at every level that this machine has, without Python: for sanitizers and emulators.
//
//   driver [thorough] [threads] [LEVEL ...]     exit status 1 if anything failed; levels named are run whatever this machine
//                                               has. threads: float32 and bfloat16 alone, since what threads do is the same
#include <cstring>
#include <stdexcept>

#include "test_checked_sizes.h"
#include "test_fetch_rows.h"
#include "test_ffns.h"
#include "test_fingerprint.h"
#include "test_fused_blocks.h"
#include "test_layernorm.h"
#include "test_model_ends.h"
#include "test_patch_projection.h"
#include "test_rep_attention.h"
#include "test_softmax.h"

namespace {

void test_level_choice() {
  using driver::expect;
  const int supported = repavit::supported_level();
  expect(repavit::lowered_level(nullptr) == supported && repavit::lowered_level("") == supported, "no wish", "dispatch");
  for (int level = 0; level < repavit::kIsaLevels; ++level) {
    const int chosen = repavit::lowered_level(repavit::isa_name(level));
    expect(chosen == (level < supported ? level : supported), "REPAVIT_CPU_ISA only lowers", repavit::isa_name(level));
  }
  bool refused = false;
  try {
    repavit::lowered_level("sse9");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  expect(refused, "an unknown level is refused", "dispatch");
}

template <class T>
void test_operators(const repavit::Kernels& kernels, repavit::DType dtype, const char* level, bool thorough) {
  driver::test_packed_sizes(kernels, dtype, level);
  driver::test_layer_norm<T>(kernels, dtype, level);
  driver::test_ffns<T>(kernels, dtype, level, thorough);
  driver::test_unrounded_sums<T>(kernels, dtype, level);
  driver::test_attention<T>(kernels, dtype, level, thorough);
  driver::test_softmax<T>(kernels, dtype, level);
  driver::test_patches<T>(kernels, dtype, level);
  driver::test_model_ends<T>(kernels, dtype, level);
  driver::test_stack<T>(kernels, dtype, level);
}

// The level of this name; kIsaLevels if there is none.
int level_named(const char* name) {
  int level = 0;
  while (level < repavit::kIsaLevels && std::strcmp(name, repavit::isa_name(level)) != 0) ++level;
  return level;
}

}  // namespace

int main(int argc, char** argv) {
  bool thorough = false, threads = false, any_chosen = false, chosen[repavit::kIsaLevels] = {};
  for (int i = 1; i < argc; ++i) {
    const int level = level_named(argv[i]);
    if (level < repavit::kIsaLevels) {
      chosen[level] = any_chosen = true;
    } else if (std::strcmp(argv[i], "thorough") == 0) {
      thorough = true;
    } else if (std::strcmp(argv[i], "threads") == 0) {
      threads = true;
    } else {
      std::printf("driver: got '%s', wanted thorough, threads or a level: scalar, avx2, avx512, avx512_bf16, amx\n", argv[i]);
      return 2;
    }
  }
  test_level_choice();
  driver::test_checked_sizes();
  driver::test_fetch_rows();
  driver::test_fingerprint();
  for (int level = 0; level < repavit::kIsaLevels; ++level) {
    if (any_chosen ? !chosen[level] : level > repavit::supported_level()) continue;
    const repavit::Kernels kernels = repavit::kernels_at(level);
    const char* name = repavit::isa_name(level);
    driver::test_gelu(kernels, name);
    test_operators<float>(kernels, repavit::kFloat32, name, thorough);
    test_operators<repavit::bf16>(kernels, repavit::kBFloat16, name, thorough);
    if (!threads) {
      test_operators<repavit::fp16>(kernels, repavit::kFloat16, name, thorough);
      test_operators<double>(kernels, repavit::kFloat64, name, thorough);
    }
    std::printf("%s: %d checks, %d failures\n", name, driver::checks, driver::failures);
  }
  return driver::failures ? 1 : 0;
}
