// The operators in double, one element at a time: the truth of the C++ driver.
#pragma once

#include <algorithm>
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

// ---- On weights of int8 -------------------------------------------------------------------------------------------------

// Whole numbers, and what they stand for: scale q + offset.
struct Quantized {
  std::vector<int> q;
  float scale, offset;
  double operator[](int64_t i) const { return static_cast<double>(scale) * q[static_cast<size_t>(i)] + offset; }
};

// Weights: about 0, as the kernels do it, in float.
inline Quantized quantize_weight(const std::vector<double>& w) {
  float most = 0.0f;
  for (const double v : w) most = std::max(most, std::fabs(static_cast<float>(v)));
  const bool used = most >= 1e-30f;
  Quantized to{{}, used ? most / 127.0f : 0.0f, 0.0f};
  for (const double v : w) {
    to.q.push_back(used ? static_cast<int>(std::nearbyintf(static_cast<float>(v) * (127.0f / most))) : 0);
  }
  return to;
}

// Rows: from their least number to their greatest.
inline Quantized quantize(const std::vector<double>& x) {
  if (x.empty()) return {{}, 0.0f, 0.0f};
  const auto least = static_cast<float>(*std::min_element(x.begin(), x.end()));
  const float range = static_cast<float>(*std::max_element(x.begin(), x.end())) - least;
  const bool used = range >= 1e-30f;
  Quantized to{{}, used ? range / 255.0f : 0.0f, least};
  for (const double v : x) {
    to.q.push_back(used ? static_cast<int>(std::nearbyintf((static_cast<float>(v) - least) * (255.0f / range))) : 0);
  }
  return to;
}

// The rows of w [rows, depth] quantized, each with a scale of its own.
inline std::vector<Quantized> quantize_weights(const std::vector<double>& w, int64_t depth) {
  std::vector<Quantized> rows;
  for (size_t i = 0; depth > 0 && i < w.size(); i += static_cast<size_t>(depth)) {
    rows.push_back(quantize_weight({w.begin() + static_cast<ptrdiff_t>(i), w.begin() + static_cast<ptrdiff_t>(i) + depth}));
  }
  return rows;
}

inline double dot(const Quantized& a, const Quantized& b) {
  double total = 0.0;
  for (size_t i = 0; i < a.q.size(); ++i) total += a[static_cast<int64_t>(i)] * b[static_cast<int64_t>(i)];
  return total;
}

// And how far a kernel may be off that rounds one number of H, or of z behind a norm, the other way.
struct Int8Ffn {
  std::vector<double> y, step;
};

inline double magnitude(const Quantized& w) {
  double total = 0.0;
  for (size_t i = 0; i < w.q.size(); ++i) total += std::fabs(w[static_cast<int64_t>(i)]);
  return total;
}

inline Int8Ffn ffn_int8(const Ffn& p) {
  const int64_t c = p.channels, m = p.active;
  const auto w_in = quantize_weights(p.w_in, c), w_up = quantize_weights(p.w_up, c);
  const auto w_out = quantize_weights(p.w_out, m), w_merged = quantize_weights(p.w_merged, c);
  Int8Ffn to;
  std::vector<double> h(static_cast<size_t>(m));
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* x = p.x.data() + r * c;
    const Quantized z = quantize(normed(x, c, p.norm, p.norm_eps));
    for (int64_t j = 0; j < m; ++j) {
      const auto at = static_cast<size_t>(j);
      h[at] = activate((c > 0 ? dot(z, w_in[at]) : 0.0) + (p.b_in.empty() ? 0.0 : p.b_in[at]), p.activation);
      if (p.gated) h[at] *= (c > 0 ? dot(z, w_up[at]) : 0.0) + (p.b_up.empty() ? 0.0 : p.b_up[at]);
    }
    if (p.inner_norm) h = core(h.data(), m, p.norm_eps);
    const Quantized hq = quantize(h);
    for (int64_t j = 0; j < c; ++j) {
      const auto at = static_cast<size_t>(j);
      double v = m > 0 ? dot(hq, w_out[at]) : 0.0;
      if (!w_merged.empty()) v += dot(z, w_merged[at]);
      if (!p.bias.empty()) v += p.bias[at];
      to.y.push_back(v + (p.residual ? x[j] : 0.0));
      const double of_h = m > 0 ? hq.scale * 127.0 * w_out[at].scale : 0.0;
      double of_z = w_merged.empty() ? 0.0 : z.scale * 127.0 * w_merged[at].scale;
      const double most = p.w_in.empty() ? 0.0 : z.scale * 127.0 * std::max(w_in[0].scale, p.gated ? w_up[0].scale : 0.0f);
      if (m > 0 && c > 0) of_z += most * (p.gated ? 16.0 : 2.0) * magnitude(w_out[at]);  // gates multiply it
      to.step.push_back(of_h + (p.norm == repavit::kNoNorm ? 0.0 : of_z));
    }
  }
  return to;
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
