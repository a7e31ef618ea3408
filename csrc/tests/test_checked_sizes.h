// Sizes that nobody multiplied without a check: the helper, and what a packed buffer of any shape takes.
#pragma once

#include "../cpu/checked.h"
#include "driver.h"

namespace driver {

inline void test_checked_sizes() {
  using repavit::kNoSize, repavit::size_product, repavit::size_quotient, repavit::size_sum;
  constexpr int64_t kMost = INT64_MAX, kHalf = int64_t{1} << 32;
  const char* where = "checked sizes";
  expect(size_product(kHalf, kHalf / 4) == int64_t{1} << 62 && size_product(kMost, 1) == kMost, "products", where);
  expect(size_product(kHalf, kHalf / 2) == kNoSize && size_product(kHalf, kHalf) == kNoSize, "products that wrap", where);
  expect(size_product(kHalf, kHalf, 0) == kNoSize && size_product(0, kHalf, kHalf) == 0, "chains of products", where);
  expect(size_product(-1, 0) == kNoSize && size_product(3, INT64_MIN) == kNoSize, "negative factors", where);
  expect(size_sum(kMost, 0) == kMost && size_sum(kMost, 1) == kNoSize && size_sum(-1, 1) == kNoSize, "sums", where);
  expect(size_quotient(kMost, 32) == (int64_t{1} << 58) && size_quotient(0, 32) == 0 && size_quotient(-5, 2) == kNoSize,
         "quotients", where);
}

// What a header says may be anything.
inline void test_packed_sizes(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  using repavit::kNoSize;
  constexpr int64_t kHuge[] = {INT64_MAX, INT64_MAX / 2, int64_t{1} << 62, int64_t{1} << 32, -1, INT64_MIN};
  for (const int64_t huge : kHuge) {
    const int64_t other = huge < 0 ? 1 : huge;
    expect(kernels.partial_gelu_ffn_packed_bytes[dtype](huge, other, true) == kNoSize, "FFN too large", level);
    expect(kernels.partial_gelu_ffn_packed_bytes[dtype](other, huge, false) == kNoSize, "FFN too large", level);
    expect(kernels.gated_ffn_packed_bytes[dtype](huge, other, true) == kNoSize, "gated FFN too large", level);
    expect(kernels.gated_ffn_packed_bytes[dtype](other, huge, false) == kNoSize, "gated FFN too large", level);
    expect(kernels.matrix_packed_bytes[dtype](huge, other) == kNoSize, "matrix too large", level);
    expect(kernels.matrix_packed_bytes[dtype](other, huge) == kNoSize, "matrix too large", level);
    for (int i = 0; i < 5; ++i) {
      int64_t sizes[5] = {other, other, 2, other, 3};
      sizes[i] = huge;
      const repavit::AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
      expect(kernels.rep_attention_packed_bytes[dtype](shape) == kNoSize, "attention too large", level);
    }
    if (huge < 0) continue;
    // Panels of no elements take nothing, however many: the header is all there is.
    const int64_t ffn = huge > int64_t{1} << 57 ? kNoSize : 64;  // offsets within its panels are sizes too
    expect(kernels.partial_gelu_ffn_packed_bytes[dtype](0, huge, true) == ffn, "FFN of no channels", level);
    expect(kernels.partial_gelu_ffn_packed_bytes[dtype](huge, 0, false) == ffn, "FFN of nothing hidden", level);
    expect(kernels.matrix_packed_bytes[dtype](huge, 0) == 64, "matrix of no columns", level);
    expect(kernels.rep_attention_packed_bytes[dtype]({0, 0, 1, huge / 4, 1}) == 64, "attention of no channels", level);
  }
}

}  // namespace driver
