// Attention in double, one element at a time: the truth of the C++ driver.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "reference.h"

namespace reference {

// Empty w_qkv and w_proj: the attention alone, x holds q | k | v and y gets o.
struct Attention {
  int64_t batch, tokens, channels, channels_out, heads, d_qk, d_v;
  std::vector<double> x, w_qkv, b_qkv, w_proj, b_proj, bias;  // bias [B, h, T, T]; empty biases: None
  double scale = 1.0, norm_eps = 0.0, inner_norm_eps = 0.0;
  bool residual = false, inner_norm = false;
  repavit::Norm norm = repavit::kNoNorm;
  const repavit::WindowGrid* windows = nullptr;
  std::vector<double> rel_bias, padding;  // of the windows; empty padding: None
  repavit::Norm qk_norm = repavit::kNoNorm;
  std::vector<double> q_norm, k_norm;     // [2, d_qk]
  std::vector<double> cos, sin;           // [h, tokens - prefix, turned]; empty: no rotation
  int64_t prefix = 0, turned = 0;
  bool interleaved = false;
  bool int8 = false;                      // weights, z and o quantized
  std::vector<double>* steps = nullptr;   // of int8: how far y may be off where numbers of o are rounded the other way
};

// One query or key of a head through norm and rotation.
inline void turn(const Attention& p, const std::vector<double>& affine, int64_t head, int64_t token, double* v) {
  if (p.qk_norm != repavit::kNoNorm) {
    const std::vector<double> core = normed(v, p.d_qk, p.qk_norm, p.norm_eps);
    for (int64_t i = 0; i < p.d_qk; ++i) {
      v[i] = core[static_cast<size_t>(i)] * affine[static_cast<size_t>(i)] + affine[static_cast<size_t>(p.d_qk + i)];
    }
  }
  if (p.cos.empty() || token < p.prefix) return;
  const std::vector<double> before(v, v + p.turned);
  const int64_t place = (head * (p.tokens - p.prefix) + token - p.prefix) * p.turned, half = p.turned / 2;
  for (int64_t i = 0; i < p.turned; ++i) {
    const int64_t partner = p.interleaved ? i ^ 1 : (i + half) % p.turned;
    const double sign = (p.interleaved ? i % 2 == 0 : i < half) ? -1.0 : 1.0;
    const size_t at = static_cast<size_t>(place + i);
    v[i] = before[static_cast<size_t>(i)] * p.cos[at] + sign * before[static_cast<size_t>(partner)] * p.sin[at];
  }
}

// The numbers that rows of weights stand for once they are quantized.
inline std::vector<double> dequantized(const std::vector<double>& w, int64_t depth) {
  std::vector<double> to;
  for (const Quantized& row : quantize_weights(w, depth)) {
    for (int64_t i = 0; i < depth; ++i) to.push_back(row[i]);
  }
  return to;
}

// q | k | v of one token, or of a padded one (x null).
inline std::vector<double> qkv_row(const Attention& p, const double* x) {
  const int64_t width = p.heads * (2 * p.d_qk + p.d_v), q_width = p.heads * p.d_qk;
  const std::vector<double> nothing(static_cast<size_t>(p.channels), 0.0);
  std::vector<double> z = x == nullptr ? nothing : normed(x, p.channels, p.norm, p.norm_eps);
  std::vector<double> row(static_cast<size_t>(width)), weights = p.w_qkv;
  if (p.int8) {
    const Quantized whole = quantize(z);
    for (size_t i = 0; i < z.size(); ++i) z[i] = whole[static_cast<int64_t>(i)];
    weights = dequantized(p.w_qkv, p.channels);
  }
  for (int64_t j = 0; j < width; ++j) {
    const size_t i = static_cast<size_t>(j);
    row[i] = p.w_qkv.empty() ? z[i] : dot(z.data(), weights.data() + j * p.channels, p.channels);
    if (!p.b_qkv.empty()) row[i] += p.b_qkv[i];
    if (x == nullptr && !p.padding.empty()) row[i] = j < q_width ? 0.0 : p.padding[static_cast<size_t>(j - q_width)];
  }
  return row;
}

// o of one sequence whose rows of q | k | v are given; add(head, query, key) is what joins a score.
template <class Add>
std::vector<double> attend(const Attention& p, const std::vector<std::vector<double>>& qkv, const Add& add) {
  const int64_t n = static_cast<int64_t>(qkv.size());
  std::vector<double> o(static_cast<size_t>(n * p.heads * p.d_v)), weights(static_cast<size_t>(n));
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t i = 0; i < n; ++i) {
      double most = -HUGE_VAL, sum = 0.0;
      for (int64_t j = 0; j < n; ++j) {
        const double* q = qkv[static_cast<size_t>(i)].data() + h * p.d_qk;
        const double* k = qkv[static_cast<size_t>(j)].data() + (p.heads + h) * p.d_qk;
        weights[static_cast<size_t>(j)] = p.scale * dot(q, k, p.d_qk) + add(h, i, j);
        most = std::fmax(most, weights[static_cast<size_t>(j)]);
      }
      for (double& w : weights) sum += w = most == -HUGE_VAL ? 0.0 : std::exp(w - most);
      for (int64_t c = 0; c < p.d_v; ++c) {
        double total = 0.0;
        for (int64_t j = 0; j < n; ++j) {
          const double v = qkv[static_cast<size_t>(j)][static_cast<size_t>(2 * p.heads * p.d_qk + h * p.d_v + c)];
          total += weights[static_cast<size_t>(j)] * v;
        }
        o[static_cast<size_t>((i * p.heads + h) * p.d_v + c)] = sum > 0.0 ? total / sum : 0.0;
      }
    }
  }
  return o;
}

// The token that stands at (y, x) of the rolled and padded map; -1 for padding.
inline int64_t rolled_token(const repavit::WindowGrid& g, int64_t y, int64_t x) {
  const int64_t at[2] = {y, x};
  int64_t from[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t padded = (g.map[d] + g.window[d] - 1) / g.window[d] * g.window[d];
    const int64_t period = g.roll_first ? g.map[d] : padded;
    from[d] = at[d] < period ? (at[d] + g.shift[d]) % period : g.map[d];
    if (from[d] >= g.map[d]) return -1;
  }
  return from[0] * g.map[1] + from[1];
}

// o of one image, windows and mask as Swin has them: regions by position in the rolled map.
inline std::vector<double> windowed(const Attention& p, const double* image) {
  const repavit::WindowGrid& g = *p.windows;
  const int64_t n = g.window[0] * g.window[1], width = p.heads * p.d_v;
  std::vector<double> o(static_cast<size_t>(p.tokens * width));
  for (int64_t top = 0; top < g.map[0]; top += g.window[0]) {
    for (int64_t left = 0; left < g.map[1]; left += g.window[1]) {
      std::vector<int64_t> tokens, regions;
      std::vector<std::vector<double>> qkv;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at[2] = {top + i / g.window[1], left + i % g.window[1]};
        int64_t region = 0;
        for (int d = 0; d < 2; ++d) {
          const int64_t extent = (g.map[d] + g.window[d] - 1) / g.window[d] * g.window[d];
          const int part = (at[d] >= extent - g.window[d]) + (at[d] >= extent - g.shift[d]);
          region = 3 * region + (g.shift[d] == 0 ? 0 : part);
        }
        tokens.push_back(rolled_token(g, at[0], at[1]));
        regions.push_back(region);
        qkv.push_back(qkv_row(p, tokens.back() < 0 ? nullptr : image + tokens.back() * p.channels));
      }
      const std::vector<double> part = attend(p, qkv, [&](int64_t h, int64_t i, int64_t j) {
        const bool apart = regions[static_cast<size_t>(i)] != regions[static_cast<size_t>(j)];
        return p.rel_bias[static_cast<size_t>((h * n + i) * n + j)] - (apart ? 100.0 : 0.0);
      });
      for (int64_t i = 0; i < n; ++i) {
        const int64_t token = tokens[static_cast<size_t>(i)];
        for (int64_t c = 0; token >= 0 && c < width; ++c) {
          o[static_cast<size_t>(token * width + c)] = part[static_cast<size_t>(i * width + c)];
        }
      }
    }
  }
  return o;
}

inline std::vector<double> rep_attention(const Attention& p) {
  const int64_t width = p.heads * p.d_v;
  std::vector<double> y;
  for (int64_t b = 0; b < p.batch; ++b) {
    const double* image = p.x.data() + b * p.tokens * p.channels;
    std::vector<double> o;
    if (p.windows != nullptr) {
      o = windowed(p, image);
    } else {
      std::vector<std::vector<double>> qkv;
      for (int64_t t = 0; t < p.tokens; ++t) {
        qkv.push_back(qkv_row(p, image + t * p.channels));
        for (int64_t h = 0; h < p.heads; ++h) {
          turn(p, p.q_norm, h, t, qkv.back().data() + h * p.d_qk);
          turn(p, p.k_norm, h, t, qkv.back().data() + (p.heads + h) * p.d_qk);
        }
      }
      o = attend(p, qkv, [&](int64_t h, int64_t i, int64_t j) {
        return p.bias.empty() ? 0.0 : p.bias[static_cast<size_t>(((b * p.heads + h) * p.tokens + i) * p.tokens + j)];
      });
    }
    if (p.w_qkv.empty()) y.insert(y.end(), o.begin(), o.end());
    for (int64_t t = 0; t < p.tokens && p.inner_norm; ++t) {
      const std::vector<double> row = core(o.data() + t * width, width, p.inner_norm_eps);
      std::copy(row.begin(), row.end(), o.begin() + t * width);
    }
    std::vector<float> scales;
    for (int64_t t = 0; t < p.tokens && p.int8; ++t) {
      const Quantized whole = quantize({o.begin() + t * width, o.begin() + (t + 1) * width});
      for (int64_t i = 0; i < width; ++i) o[static_cast<size_t>(t * width + i)] = whole[i];
      scales.push_back(whole.scale);
    }
    const std::vector<double> proj = p.int8 ? dequantized(p.w_proj, width) : p.w_proj;
    for (int64_t t = 0; t < p.tokens && !p.w_qkv.empty(); ++t) {
      for (int64_t c = 0; c < p.channels_out; ++c) {
        const double bias = p.b_proj.empty() ? 0.0 : p.b_proj[static_cast<size_t>(c)];
        y.push_back(dot(o.data() + t * width, proj.data() + c * width, width) + bias +
                    (p.residual ? image[t * p.channels + c] : 0.0));
        if (!p.int8) continue;
        double magnitude = 0.0;
        for (int64_t i = 0; i < width; ++i) magnitude += std::fabs(proj[static_cast<size_t>(c * width + i)]);
        p.steps->push_back(scales[static_cast<size_t>(t)] * magnitude);
      }
    }
  }
  return y;
}

}  // namespace reference
