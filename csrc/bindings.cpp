// Binding of what is no operator: the level in use, memory, the machine's own limit. The bindings are the only files that
// see torch (stable ABI, one library for every torch >= 2.10): check, allocate, call.
//
// Schemas live in repavit_ops/library.py; these files implement them for the CPU. The Python layer validates first and
// gives better messages; the checks here are the last line of defence for callers of torch.ops.
#include "bindings_common.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

using namespace repavit_bindings;

// Runs products in registers on all threads; returns the operations done. The caller takes the time.
int64_t product_peak(const Tensor& like, int64_t iterations) {
  constexpr int64_t kMost = int64_t{1} << 32;  // a minute or so; nothing interrupts it
  STD_TORCH_CHECK(0 <= iterations && iterations <= kMost, "iterations: got ", iterations, ", wanted 0 to ", kMost);
  if (like.scalar_type() == ScalarType::Char) return repavit::int8_kernels().int8_product_peak(iterations, torch_pool());
  return repavit::kernels().product_peak[check_input("like", like)](iterations, torch_pool());
}

int64_t cpu_isa() { return repavit::isa_level(); }
int64_t amx_refusal() { return repavit::amx_refusal(); }

int64_t scratch_bytes() { return static_cast<int64_t>(repavit::arena_bytes()); }

void release_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("product_peak", TORCH_BOX(&product_peak));
}

// These take no tensor, so no device chooses them: this key also serves calls without one.
STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("amx_refusal", TORCH_BOX(&amx_refusal));
  m.impl("scratch_bytes", TORCH_BOX(&scratch_bytes));
  m.impl("release_freed_memory", TORCH_BOX(&release_freed_memory));
}
