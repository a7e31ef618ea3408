// The operators in double, one element at a time: the truth of the C++ driver.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace reference {

struct Ffn {
  int64_t rows, channels, active;
  std::vector<double> x, w_in, b_in, w_out, w_merged, bias;  // nn.Linear layout; empty b_in, w_merged, bias: None
  bool normalize = false, residual = false;
  repavit::GeluForm gelu = repavit::kGeluErf;
  double norm_eps = 0.0;
};

inline double gelu(double x, repavit::GeluForm form) {
  if (form == repavit::kGeluQuick) return x / (1.0 + std::exp(-1.702 * x));
  if (form == repavit::kGeluTanh) return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
}

inline std::vector<double> core(const double* x, int64_t n, double eps) {
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += x[i] / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(n);
  std::vector<double> z(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) z[static_cast<size_t>(i)] = (x[i] - mean) / std::sqrt(variance + eps);
  return z;
}

inline double dot(const double* a, const double* b, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

inline std::vector<double> partial_gelu_ffn(const Ffn& p) {
  const int64_t c = p.channels, m = p.active;
  std::vector<double> y, h(static_cast<size_t>(m));
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* x = p.x.data() + r * c;
    const std::vector<double> z = p.normalize ? core(x, c, p.norm_eps) : std::vector<double>(x, x + c);
    for (int64_t j = 0; j < m; ++j) {
      const double bias = p.b_in.empty() ? 0.0 : p.b_in[static_cast<size_t>(j)];
      h[static_cast<size_t>(j)] = gelu(dot(z.data(), p.w_in.data() + j * c, c) + bias, p.gelu);
    }
    for (int64_t j = 0; j < c; ++j) {
      double v = dot(h.data(), p.w_out.data() + j * m, m);
      if (!p.w_merged.empty()) v += dot(z.data(), p.w_merged.data() + j * c, c);
      if (!p.bias.empty()) v += p.bias[static_cast<size_t>(j)];
      y.push_back(v + (p.residual ? x[j] : 0.0));
    }
  }
  return y;
}

}  // namespace reference
