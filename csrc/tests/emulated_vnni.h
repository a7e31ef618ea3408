// Products of bytes on machines that have no instruction for them: `run.sh avx_vnni` compiles isa_avx2.cpp with this header
// before all else (-include), and dispatch.cpp with -DREPAVIT_EMULATED_VNNI.
#pragma once

#include <stdint.h>
#include <string.h>

namespace emulated {

// Each lane of acc gets four products of unsigned bytes of a and signed ones of b; sums of 32 bits wrap.
template <class V>
[[gnu::noinline]] V vpdpbusd(V acc, V a, V b) {
  for (size_t i = 0; i < sizeof(V) / 4; ++i) {
    uint32_t sum = static_cast<uint32_t>(acc[i]);
    for (int k = 0; k < 32; k += 8) {
      const auto left = static_cast<uint8_t>(a[i] >> k);
      const auto right = static_cast<int8_t>(b[i] >> k);
      sum += static_cast<uint32_t>(left * right);
    }
    acc[i] = static_cast<int32_t>(sum);
  }
  return acc;
}

}  // namespace emulated

#define emulated_vpdpbusd(acc, a, b) acc = emulated::vpdpbusd(acc, a, b)
#define REPAVIT_VEX_PRODUCT(instruction, acc, a, b) emulated_##instruction(acc, a, b)
