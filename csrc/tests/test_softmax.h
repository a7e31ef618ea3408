// Softmax itself, read off rep_attention: with x, W_v and W_proj the identity and no scores but the bias, y is the
// matrix of weights.
#pragma once

#include <algorithm>
#include <string>

#include "test_ffns.h"

namespace driver {

template <class T>
T minus_infinity() {
  if constexpr (std::is_floating_point_v<T>) return -std::numeric_limits<T>::infinity();
  else return T{static_cast<uint16_t>(std::is_same_v<T, repavit::bf16> ? 0xff80 : 0xfc00)};
}

// The finite number of T that is furthest from 0.
template <class T>
T greatest_number(bool negative) {
  if constexpr (std::is_floating_point_v<T>) return negative ? std::numeric_limits<T>::lowest() : std::numeric_limits<T>::max();
  else return T{static_cast<uint16_t>((std::is_same_v<T, repavit::bf16> ? 0x7f7f : 0x7bff) | (negative ? 0x8000 : 0))};
}

// Row 0 of the bias is all -Inf: no weights. Row 1 has a NaN: all NaN. Row 2 is the least number, but for one -Inf: all
// others weigh the same. Row 3 has the greatest number once, among the least and others: the only weight. The other rows
// are drawn over four octaves of weights, with one that must vanish. Where one key is left over by vectors of any width,
// it is the one that differs.
template <class T>
void test_softmax(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  if (kernels.rep_attention[dtype] == nullptr) return;
  for (const int64_t tokens : {int64_t{61}, int64_t{65}, int64_t{523}, int64_t{577}}) {  // in one pass, and block by block
    const std::string name = std::string(level) + " softmax of " + std::to_string(tokens);
    const size_t n = static_cast<size_t>(tokens), other = tokens % 16 == 1 ? n - 1 : 5;
    const T zero = Convert<T>::from_double(0.0), one = Convert<T>::from_double(1.0);
    std::vector<T> identity(n * n, zero), w_qkv((n + 2) * n, zero);
    for (size_t i = 0; i < n; ++i) identity[i * n + i] = w_qkv[(i + 2) * n + i] = one;

    Random random(static_cast<uint64_t>(tokens));
    std::vector<double> exact(n * n);
    std::vector<T> bias(n * n);
    for (size_t i = 0; i < n * n; ++i) {
      bias[i] = Convert<T>::from_double(i % n == n / 2 ? -200.0 : -2.8 * random.uniform());
      exact[i] = Convert<T>::to_double(bias[i]);
    }
    std::fill_n(bias.begin(), n, minus_infinity<T>());
    bias[n + other] = poison<T>();
    std::fill_n(bias.begin() + 2 * tokens, n, greatest_number<T>(true));
    bias[2 * n + other] = minus_infinity<T>();
    bias[3 * n + 7] = greatest_number<T>(true), bias[3 * n + other] = greatest_number<T>(false);

    const repavit::AttentionShape shape{tokens, tokens, 1, 1, tokens};
    Guarded<T> packed(static_cast<size_t>(kernels.rep_attention_packed_bytes[dtype](shape)) / sizeof(T));
    kernels.rep_attention_pack[dtype]({shape, w_qkv.data(), identity.data()}, packed.data(), kSerial);
    Guarded<T> y(n * n);
    repavit::RepAttentionArgs args{};
    args.batch = 1, args.tokens = tokens, args.shape = shape, args.scale = 1.0;
    args.x = identity.data(), args.x_stride = tokens, args.packed = packed.data(), args.y = y.data();
    args.attn_bias = bias.data();
    const int64_t strides[4] = {0, 0, tokens, 1};
    std::copy(strides, strides + 4, args.attn_bias_strides);
    kernels.rep_attention[dtype](args, kSerial);

    const auto got = [&](size_t i) { return Convert<T>::to_double(y[i]); };
    bool nothing = true, undefined = true, alike = true, alone = true, vanishes = true;
    for (size_t j = 0; j < n; ++j) {
      nothing &= got(j) == 0.0, undefined &= std::isnan(got(n + j));
      const double share = j == other ? 0.0 : 1.0 / static_cast<double>(n - 1);
      alike &= std::fabs(got(2 * n + j) - share) <= 4 * Tolerance<T>::kRounding * share;
      alone &= got(3 * n + j) == (j == other ? 1.0 : 0.0);
    }
    double worst = 0.0;
    for (size_t i = 4; i < n; ++i) {
      std::vector<double> wanted(n);
      double sum = 0.0;
      for (size_t j = 0; j < n; ++j) sum += wanted[j] = std::exp(exact[i * n + j]);
      for (size_t j = 0; j < n; ++j) {
        const double error = std::fabs(got(i * n + j) * sum / wanted[j] - 1.0);
        if (j == n / 2) vanishes &= got(i * n + j) < 0x1p-149;
        else worst = error >= worst ? error : error == error ? worst : HUGE_VAL;
      }
    }
    expect(nothing && undefined, "rows of -Inf and of NaN", name.c_str());
    expect(alike && alone, "rows of the greatest and the least number", name.c_str());
    expect(vanishes, "a weight that must vanish", name.c_str());
    // Weights and y are rounded to T; the exponential is good to 1e-6 of its value, or 8.6e-5 where weights have 8 bits.
    const double exponential = dtype == repavit::kFloat64 ? 0x1p-47 : dtype == repavit::kBFloat16 ? 1e-4 : 1e-6;
    const double bound = 4 * Tolerance<T>::kRounding + exponential;
    if (!expect(worst <= bound, "weights are off", name.c_str())) std::printf("       %.3g, bound %.3g\n", worst, bound);
  }
}

}  // namespace driver
