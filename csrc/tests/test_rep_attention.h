// rep_attention and window_rep_attention at one level and dtype against double, over hostile shapes.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>

#include "driver.h"
#include "reference_attention.h"
#include "test_ffns.h"

namespace driver {

struct AttentionCase {
  int64_t batch, tokens, channels, channels_out, heads, d_qk, d_v, gap;  // gap: elements between the rows of x
  bool b_qkv, b_proj, bias, normalize, residual;
  const repavit::WindowGrid* windows;  // its bias and padding are drawn here; tokens is then that of the map
  bool padding;
  repavit::Norm qk_norm = repavit::kNoNorm;
  int64_t prefix = 0, turned = 0;  // tokens and channels of a head that rotation leaves alone, and that it turns
  bool interleaved = false;
  bool int8 = false;
  double sign = 1.0;  // of the scale; 0 is none
  int threads = kThreaded.threads;
  bool inner_norm = false;

  repavit::Norm norm() const {
    return !normalize ? repavit::kNoNorm : tokens % 3 == 0 ? repavit::kRmsNorm : repavit::kLayerNorm;
  }
  std::string name(const char* level) const {
    std::string text(level);
    for (const auto& [key, value] : {std::pair(" B=", batch), {" T=", tokens}, {" C=", channels},
                                     {" C_out=", channels_out}, {" h=", heads}, {" d_qk=", d_qk}, {" d_v=", d_v},
                                     {" gap=", gap}, {" qk_norm=", qk_norm}, {" turned=", turned},
                                     {" prefix=", prefix}}) {
      text += key + std::to_string(value);
    }
    for (const auto& [on, flag] : {std::pair(b_qkv, " b_qkv"), {b_proj, " b_proj"}, {bias, " bias"},
                                   {normalize, " norm"}, {residual, " residual"}, {windows != nullptr, " windows"},
                                   {padding, " padding"}, {interleaved, " interleaved"}, {int8, " int8"},
                                   {inner_norm, " inner norm"}}) {
      if (on) text += flag;
    }
    if (sign != 1.0) text += sign < 0.0 ? " scale < 0" : " scale = 0";
    if (threads != kThreaded.threads) text += " threads=" + std::to_string(threads);
    return text;
  }
};

template <class T>
void test_attention_case(const repavit::Kernels& kernels, repavit::DType dtype, const AttentionCase& t,
                         const char* level) {
  const std::string name = t.name(level);
  const auto size = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
  const int64_t width = t.heads * (2 * t.d_qk + t.d_v), stride = t.channels + t.gap;
  Random random(static_cast<uint64_t>(t.tokens * 7919 + t.channels * 104729 + t.heads * t.d_qk));
  reference::Attention truth{};
  truth.batch = t.batch, truth.tokens = t.tokens, truth.channels = t.channels, truth.channels_out = t.channels_out;
  truth.heads = t.heads, truth.d_qk = t.d_qk, truth.d_v = t.d_v;
  truth.scale = t.sign / std::sqrt(static_cast<double>(t.d_qk));
  truth.norm_eps = 1e-6, truth.norm = t.norm(), truth.residual = t.residual;
  truth.inner_norm_eps = 0.1, truth.inner_norm = t.inner_norm;  // large: the norm of few numbers is noise

  std::vector<double> unused;
  const double fan_in = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(t.channels, 1)));
  auto dense_x = draw<T>(random, size(t.batch * t.tokens, t.channels), 1.0, truth.x);
  auto w_qkv = draw<T>(random, size(width, t.channels), fan_in, truth.w_qkv);
  auto b_qkv = draw<T>(random, size(width, 1), 0.5, t.b_qkv ? truth.b_qkv : unused);
  auto w_proj = draw<T>(random, size(t.channels_out, t.heads * t.d_v), 0.5, truth.w_proj);
  auto b_proj = draw<T>(random, size(t.channels_out, 1), 1.0, t.b_proj ? truth.b_proj : unused);
  auto bias = draw<T>(random, t.bias ? size(t.batch * t.heads, t.tokens * t.tokens) : 0, 1.0, truth.bias);

  repavit::WindowGrid grid{};
  const int64_t n = t.windows != nullptr ? t.windows->window[0] * t.windows->window[1] : 0;
  auto rel_bias = draw<T>(random, size(t.heads * n, n), 1.0, truth.rel_bias);
  auto padding = draw<T>(random, size(t.heads, t.d_qk + t.d_v), 1.0, t.padding ? truth.padding : unused);
  if (t.windows != nullptr) {
    grid = *t.windows;
    grid.bias = rel_bias.data(), grid.padding = t.padding ? padding.data() : nullptr;
    truth.windows = &grid;
  }

  using Table = std::conditional_t<std::is_same_v<T, double>, double, float>;
  truth.qk_norm = t.qk_norm, truth.prefix = t.prefix, truth.turned = t.turned, truth.interleaved = t.interleaved;
  auto q_norm = draw<T>(random, size(2, t.d_qk), 1.0, truth.q_norm), k_norm = draw<T>(random, size(2, t.d_qk), 1.0, truth.k_norm);
  const size_t table = size(t.heads * (t.tokens - t.prefix), t.turned);
  auto cos = draw<Table>(random, table, 0.7, truth.cos), sin = draw<Table>(random, table, 0.7, truth.sin);

  const int64_t rows = t.batch * t.tokens;  // strided: what lies between the rows is NaN and must not be read
  Guarded<T> x(rows > 0 ? size(rows - 1, stride) + size(t.channels, 1) : 0);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(dense_x.data() + r * t.channels, t.channels, x.data() + r * stride);
  }

  const repavit::AttentionShape shape{t.channels, t.channels_out, t.heads, t.d_qk, t.d_v};
  const auto bytes = t.int8 ? kernels.rep_attention_int8_packed_bytes : kernels.rep_attention_packed_bytes;
  const auto pack = t.int8 ? kernels.rep_attention_int8_pack : kernels.rep_attention_pack;
  const auto unpack = t.int8 ? kernels.rep_attention_int8_unpack : kernels.rep_attention_unpack;
  Guarded<T> packed(static_cast<size_t>(bytes[dtype](shape)) / sizeof(T));
  pack[dtype]({shape, w_qkv.data(), w_proj.data()}, packed.data(), kThreaded);
  expect(packed.intact(), "packing wrote outside its buffer", name.c_str());
  Guarded<T> back_qkv(w_qkv.size()), back_proj(w_proj.size());
  unpack[dtype](packed.data(), {back_qkv.data(), back_proj.data()}, kSerial);
  const auto same = [&](Guarded<T>& a, Guarded<T>& b) { return same_weights(a, b, t.int8); };
  expect(same(w_qkv, back_qkv) && same(w_proj, back_proj), "unpack is not pack's inverse", name.c_str());
  if (kernels.rep_attention[dtype] == nullptr) return;

  Guarded<T> y(size(rows, t.channels_out)), again(size(rows, t.channels_out));
  repavit::RepAttentionArgs args{};
  args.batch = t.batch, args.tokens = t.tokens, args.shape = shape;
  args.x = x.data(), args.x_stride = stride, args.packed = packed.data();
  args.b_qkv = t.b_qkv ? b_qkv.data() : nullptr, args.b_proj = t.b_proj ? b_proj.data() : nullptr;
  args.attn_bias = t.bias ? bias.data() : nullptr;
  const int64_t strides[4] = {t.heads * t.tokens * t.tokens, t.tokens * t.tokens, t.tokens, 1};
  std::copy(strides, strides + 4, args.attn_bias_strides);
  args.windows = truth.windows, args.y = y.data();
  args.scale = truth.scale, args.norm_eps = truth.norm_eps;
  args.norm = t.norm(), args.residual = t.residual, args.int8 = t.int8;
  args.inner_norm_eps = truth.inner_norm_eps, args.inner_norm = t.inner_norm;
  args.qk.norm = t.qk_norm, args.qk.norm_eps = truth.norm_eps, args.qk.interleaved = t.interleaved;
  args.qk.q_norm = q_norm.data(), args.qk.k_norm = k_norm.data();
  args.qk.tokens = t.tokens - t.prefix, args.qk.width = t.turned;
  args.qk.cos = table > 0 ? cos.data() : nullptr, args.qk.sin = sin.data();
  args.qk.cos_strides[1] = args.qk.sin_strides[1] = args.qk.tokens * t.turned;
  args.qk.cos_strides[2] = args.qk.sin_strides[2] = t.turned;
  kernels.rep_attention[dtype](args, {t.threads, kThreaded.run});
  expect(y.intact() && packed.intact(), "wrote outside the output", name.c_str());
  args.y = again.data();
  kernels.rep_attention[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  // Every product's operands are rounded to T once; sums of random sign are in fp32 (or double).
  const int64_t sums = t.channels + t.heads * t.d_v + t.d_qk + t.tokens;
  const int turns = t.qk_norm != repavit::kNoNorm ? 4 : t.turned > 0 ? 2 : 1;  // q and k are rounded once more each
  const int roundings = t.inner_norm ? 4 * turns : turns;                      // and those of o grow by 1 / sqrt(eps)
  std::vector<double> steps;
  truth.int8 = t.int8, truth.steps = &steps;
  const std::vector<double> wanted = reference::rep_attention(truth);
  if (t.int8) {
    // A number of z or o that is rounded the other way is a step; where they are of 16 bits on the way, many are.
    const bool many = sizeof(T) == 2 || t.normalize || roundings > 1;
    for (double& step : steps) step *= many ? 1.0 : 0.1;
  }
  expect_near(y, wanted, 16 * roundings, 8 * roundings * sums, dtype, name, steps);
}

// The same without weights: x holds q | k | v, y gets o.
template <class T>
void test_heads_alone(const repavit::Kernels& kernels, repavit::DType dtype, const AttentionCase& t, const char* level) {
  if (kernels.rep_attention[dtype] == nullptr) return;
  const std::string name = t.name(level) + " alone";
  const int64_t o_width = t.heads * t.d_v, rows = t.batch * t.tokens, stride = t.channels + t.gap;
  Random random(static_cast<uint64_t>(t.tokens * 7919 + t.channels * 104729 + t.heads * t.d_qk));
  reference::Attention truth{};
  truth.batch = t.batch, truth.tokens = t.tokens, truth.channels = t.channels, truth.channels_out = o_width;
  truth.heads = t.heads, truth.d_qk = t.d_qk, truth.d_v = t.d_v;
  truth.scale = 1.0 / std::sqrt(static_cast<double>(t.d_qk));

  std::vector<double> unused;
  auto dense_x = draw<T>(random, static_cast<size_t>(rows * t.channels), 1.0, truth.x);
  auto bias = draw<T>(random, t.bias ? static_cast<size_t>(t.batch * t.heads * t.tokens * t.tokens) : 0, 1.0, truth.bias);
  repavit::WindowGrid grid{};
  const int64_t n = t.windows != nullptr ? t.windows->window[0] * t.windows->window[1] : 0;
  auto rel_bias = draw<T>(random, static_cast<size_t>(t.heads * n * n), 1.0, truth.rel_bias);
  auto padding = draw<T>(random, static_cast<size_t>(t.heads * (t.d_qk + t.d_v)), 1.0, t.padding ? truth.padding : unused);
  if (t.windows != nullptr) {
    grid = *t.windows;
    grid.bias = rel_bias.data(), grid.padding = t.padding ? padding.data() : nullptr;
    truth.windows = &grid;
  }
  Guarded<T> x(static_cast<size_t>((rows - 1) * stride + t.channels));
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(dense_x.data() + r * t.channels, t.channels, x.data() + r * stride);
  }

  Guarded<T> y(static_cast<size_t>(rows * o_width)), again(y.size());
  repavit::RepAttentionArgs args{};
  args.batch = t.batch, args.tokens = t.tokens, args.shape = {t.channels, 0, t.heads, t.d_qk, t.d_v};
  args.x = x.data(), args.x_stride = stride, args.scale = truth.scale;
  args.attn_bias = t.bias ? bias.data() : nullptr;
  const int64_t strides[4] = {t.heads * t.tokens * t.tokens, t.tokens * t.tokens, t.tokens, 1};
  std::copy(strides, strides + 4, args.attn_bias_strides);
  args.windows = truth.windows, args.y = y.data();
  kernels.rep_attention[dtype](args, kThreaded);
  expect(y.intact(), "wrote outside the output", name.c_str());
  args.y = again.data();
  kernels.rep_attention[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());
  expect_near(y, reference::rep_attention(truth), 16, 8 * (t.d_qk + t.tokens), dtype, name);
}

template <class T>
void test_attention(const repavit::Kernels& kernels, repavit::DType dtype, const char* level, bool thorough) {
  int flags = 0, cases = 0;
  const auto bit = [&](int i) { return (flags >> i & 1) != 0; };
  const auto next = [&] { flags = (flags + 37) % 64; };  // every combination comes by: 37 is coprime to 64
  for (const int64_t tokens : thorough ? std::vector<int64_t>{1, 2, 5, 15, 16, 17, 31, 33, 49, 67}
                                       : std::vector<int64_t>{1, 5, 17, 33}) {
    for (const auto& [d_qk, d_v] : {std::pair<int64_t, int64_t>(1, 1), {7, 5}, {16, 32}, {33, 16}, {8, 40}}) {
      for (const int64_t batch : {1, 2, 4}) {
        next();
        const int64_t c = 13 + 4 * tokens % 29;
        AttentionCase image{batch, tokens, c, bit(4) ? c : c + 6, 1 + tokens % 3, d_qk, d_v, bit(5) ? 3 : 0, bit(0), bit(1),
                            bit(2), bit(3), bit(4), nullptr, false};
        image.inner_norm = ++cases % 7 < 3;  // coprime to what flags, batches and heads repeat in
        test_attention_case<T>(kernels, dtype, image, level);
        image.int8 = dtype != repavit::kFloat64;
        if (image.int8) test_attention_case<T>(kernels, dtype, image, level);
        if (batch == 2) continue;  // four are enough to be shared out, and left over
        const int64_t heads = 1 + tokens % 3, width = heads * (2 * d_qk + d_v);
        test_heads_alone<T>(kernels, dtype,
                            {batch, tokens, width, 0, heads, d_qk, d_v, bit(5) ? 3 : 0, false, false, bit(2), false, false,
                             nullptr, false},
                            level);
        for (const int form : {0, 1, 2}) {  // QK-norm alone, rotation alone, both
          if (form != 1 && d_qk < 7) continue;  // the norm of few numbers is noise
          const int64_t turned = form == 0 ? 0 : (batch == 1 ? d_qk : d_qk - 4 * (d_qk > 8)) / 2 * 2;
          const repavit::Norm norm = form == 1 ? repavit::kNoNorm : bit(0) ? repavit::kRmsNorm : repavit::kLayerNorm;
          test_attention_case<T>(kernels, dtype,
                                 {batch, tokens, c, c, heads, d_qk, d_v, 0, bit(0), bit(1), bit(2), bit(3), bit(4), nullptr,
                                  false, norm, tokens > 3 ? 2 : 0, turned, bit(5)},
                                 level);
        }
      }
    }
  }
  test_attention_case<T>(kernels, dtype, {1, 523, 8, 8, 1, 4, 3, 0, true, true, true, false, true, nullptr, false},
                         level);  // online softmax
  for (const int64_t batch : {1, 3}) {  // heads of no values: the bias and the shortcut are left
    test_attention_case<T>(kernels, dtype, {batch, 5, 24, 24, 2, 9, 0, 0, true, true, false, true, batch == 1, nullptr, false},
                           level);
  }
  for (const double sign : {0.0, -1.0}) {  // what masks keys beyond the last must not count on the sign
    for (const int64_t tokens : {5, 50}) {
      AttentionCase odd{2, tokens, 24, 24, 2, 9, 16, 0, true, true, false, false, false, nullptr, false};
      odd.sign = sign;
      test_attention_case<T>(kernels, dtype, odd, level);
    }
  }

  const repavit::WindowGrid grids[] = {
      {{8, 12}, {4, 4}, {2, 2}, false, nullptr, nullptr}, {{10, 13}, {4, 4}, {2, 1}, false, nullptr, nullptr},
      {{10, 13}, {4, 4}, {2, 1}, true, nullptr, nullptr}, {{3, 5}, {7, 7}, {0, 3}, true, nullptr, nullptr},
      {{9, 7}, {3, 5}, {1, 0}, false, nullptr, nullptr},  {{7, 7}, {7, 7}, {0, 0}, false, nullptr, nullptr},
      {{4, 3}, {1, 1}, {0, 0}, false, nullptr, nullptr},  {{10, 13}, {9, 9}, {4, 3}, false, nullptr, nullptr},
  };
  // Few rows of large weights, whose threads share heads and columns: three of them all, four by twos; one window is an
  // image of few rows.
  for (const auto& [tokens, threads, windows] : {std::tuple<int64_t, int, const repavit::WindowGrid*>(
           5, 3, nullptr), {50, 4, nullptr}, {15, 3, &grids[3]}, {49, 4, &grids[5]}}) {
    AttentionCase few{1, tokens, 523, 530, 6, 34, 56, 2, true, true, false, true, false, windows, windows != nullptr};
    few.threads = threads;
    if (windows == nullptr) few.bias = few.inner_norm = true, few.qk_norm = repavit::kRmsNorm, few.prefix = 1, few.turned = 32;
    test_attention_case<T>(kernels, dtype, few, level);
    AttentionCase odd{1, tokens, 811, 811, 3, 60, 57, 0, true, false, false, true, true, windows, false};
    odd.threads = threads;  // the last group of k of o is not whole
    if (threads == 3) test_attention_case<T>(kernels, dtype, odd, level);
  }
  for (const repavit::WindowGrid& grid : grids) {
    for (const int64_t batch : {1, 3}) {
      next();
      test_attention_case<T>(kernels, dtype,
                             {batch, grid.map[0] * grid.map[1], 19, 19, 2, 9, 16, bit(5) ? 1 : 0, bit(0), bit(1), false,
                              bit(3), bit(4), &grid, bit(2)},
                             level);
      if (dtype != repavit::kFloat64) {
        AttentionCase int8{batch, grid.map[0] * grid.map[1], 19, 19, 2, 9, 16, bit(5) ? 1 : 0, bit(0), bit(1), false, bit(3),
                           bit(4), &grid, bit(2)};
        int8.int8 = true;
        test_attention_case<T>(kernels, dtype, int8, level);
      }
      test_heads_alone<T>(kernels, dtype,
                          {batch, grid.map[0] * grid.map[1], 3 * (2 * 9 + 16), 0, 3, 9, 16, bit(5) ? 1 : 0, false, false,
                           false, false, false, &grid, bit(2)},
                          level);
    }
  }
}

}  // namespace driver
