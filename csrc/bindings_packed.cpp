// Bindings that concern packed copies of every kind (see bindings_packed.h).
#include "bindings_packed.h"

namespace {

using namespace repavit_bindings;

// A number that changes when the weights do, as far as it sees (cpu/fingerprint.h).
int64_t fingerprint(std::vector<Tensor> weights) {
  Fingerprint fingerprint;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.is_cpu(), "weights: one is not on the CPU; move it with .to('cpu')");
    check_memory("weights", w);
    if (w.numel() == 0) continue;
    const Tensor ordered = torch::stable::contiguous(w);
    const auto element = static_cast<int64_t>(w.element_size());
    const int64_t columns = w.dim() == 0 ? 1 : w.size(w.dim() - 1), rows = w.numel() / columns;
    fingerprint.add({static_cast<const char*>(ordered.const_data_ptr()), rows, columns, columns * element, element, element});
  }
  return static_cast<int64_t>(fingerprint.value());
}

// From now on the copy is compared with no weights: those it was made of are gone.
void packed_stands_alone(Tensor packed) {
  constexpr char kMagic[2] = {'r', 'v'};  // what all headers begin with
  const bool ours = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                    packed.numel() >= static_cast<int64_t>(sizeof(repavit::PackedFfnHeader));
  if (ours) check_memory("packed", packed);
  STD_TORCH_CHECK(ours && std::memcmp(packed.const_data_ptr(), kMagic, sizeof(kMagic)) == 0,
                  "packed: wanted what one of the pack operators returned");
  Reading reading;
  reading.pause([&] { set_fingerprint(packed, Fingerprint::kOfNothing); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("packed_stands_alone", TORCH_BOX(&packed_stands_alone));
}
