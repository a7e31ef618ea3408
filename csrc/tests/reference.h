// The operators in double, one element at a time: the truth of the C++ driver.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace reference {

struct Ffn {
  int64_t rows, channels, active;
  std::vector<double> x, w_in, b_in, w_up, b_up, w_out, w_merged, bias;  // nn.Linear layout; empty: None
  bool gated = false, inner_norm = false, residual = false;              // gated: w_in and b_in are those of the gate
  repavit::Norm norm = repavit::kNoNorm;
  repavit::Activation activation = repavit::kGeluErf;
  double norm_eps = 0.0;
};

inline double activate(double x, repavit::Activation form) {
  if (form == repavit::kSilu) return x / (1.0 + std::exp(-x));
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

inline std::vector<double> normed(const double* x, int64_t n, repavit::Norm norm, double eps) {
  if (norm == repavit::kLayerNorm) return core(x, n, eps);
  std::vector<double> z(x, x + n);
  if (norm == repavit::kNoNorm) return z;
  double square = 0.0;
  for (const double v : z) square += v * v / static_cast<double>(n);
  for (double& v : z) v /= std::sqrt(square + eps);
  return z;
}

inline double dot(const double* a, const double* b, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

inline std::vector<double> ffn(const Ffn& p) {
  const int64_t c = p.channels, m = p.active;
  std::vector<double> y, h(static_cast<size_t>(m));
  const auto linear = [&](const std::vector<double>& w, const std::vector<double>& b, const double* z, int64_t j) {
    return dot(z, w.data() + j * c, c) + (b.empty() ? 0.0 : b[static_cast<size_t>(j)]);
  };
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* x = p.x.data() + r * c;
    const std::vector<double> z = normed(x, c, p.norm, p.norm_eps);
    for (int64_t j = 0; j < m; ++j) {
      double& value = h[static_cast<size_t>(j)];
      value = activate(linear(p.w_in, p.b_in, z.data(), j), p.activation);
      if (p.gated) value *= linear(p.w_up, p.b_up, z.data(), j);
    }
    if (p.inner_norm) h = core(h.data(), m, p.norm_eps);
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
