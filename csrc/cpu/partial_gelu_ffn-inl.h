// y = gelu(z W_inᵀ + b_in) W_outᵀ [+ z W_mergedᵀ] [+ bias] [+ x]: how H is made; all else is in ffn_rows-inl.h.
#pragma once

#include "partial_gelu_ffn_int8-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// partial_gelu_ffn_<T>: see PartialGeluFfnArgs.
template <class T>
void partial_gelu_ffn(const PartialGeluFfnArgs& args, const Pool& pool) {
  if constexpr (kHasInt8<T>) {
    if (args.int8) return partial_gelu_ffn_int8<T>(args, pool);
  }
  ffn_call<T, FfnKind::kPlain>(args, pool, [](const auto& plan, const Rows<T>& z, ptrdiff_t rows, Operand<T>* h) {
    const T* b_in = static_cast<const T*>(plan.args.b_in);
    const auto product = [&](const auto& to_scratch) {
      gemm(&z, 1, rows, plan.panels, plan.layout.in_stride, plan.layout.active, to_scratch);
    };
    switch (plan.args.activation) {
      case kGeluTanh: return product(GeluToScratch<T, kGeluTanh>{h, plan.h_stride, b_in});
      case kGeluQuick: return product(GeluToScratch<T, kGeluQuick>{h, plan.h_stride, b_in});
      default: return product(GeluToScratch<T, kGeluErf>{h, plan.h_stride, b_in});
    }
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
