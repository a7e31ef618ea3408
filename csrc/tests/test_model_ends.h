// token_embedding and pooled_head at one level and dtype against double: hostile shapes, every option.
#pragma once

#include <algorithm>
#include <string>

#include "driver.h"
#include "reference.h"
#include "test_ffns.h"

namespace driver {

// Compares y with what double gives; `depth` products were added for each.
template <class T>
void expect_close(Guarded<T>& y, const std::vector<double>& wanted, int64_t depth, repavit::DType dtype,
                  const std::string& name) {
  expect_near(y, wanted, 32, 8 * (depth + 16), dtype, name);
}

// LayerNorm with affine of one row, in place.
inline void norm_row(double* row, const std::vector<double>& weight, const std::vector<double>& bias, double eps) {
  const std::vector<double> z = reference::core(row, static_cast<int64_t>(weight.size()), eps);
  for (size_t i = 0; i < z.size(); ++i) row[i] = z[i] * weight[i] + bias[i];
}

template <class T>
void test_embedding_case(const repavit::Kernels& kernels, repavit::DType dtype, int64_t batch, const int64_t (&grid)[2],
                         int64_t prefix, int64_t channels, int flags, const char* level) {
  const bool with_position = flags & 1, normalize = flags & 2, with_bias = flags & 4;
  const std::string name = std::string(level) + " embedding B=" + std::to_string(batch) + " grid=" +
                           std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + " P=" + std::to_string(prefix) +
                           " N=" + std::to_string(channels) + " flags=" + std::to_string(flags);
  constexpr int64_t kPatch[2] = {2, 3}, kPlanes = 3, kDepth = kPlanes * kPatch[0] * kPatch[1];
  constexpr double kEps = 1e-5;
  const int64_t patches = grid[0] * grid[1], height = grid[0] * kPatch[0], width = grid[1] * kPatch[1];
  Random random(static_cast<uint64_t>(channels * 131 + patches * 7 + prefix));
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<double> image, w, b, rows, position, norm_w, norm_b;
  auto x = draw<T>(random, count(batch * kPlanes * height * width), 1.0, image);
  auto weight = draw<T>(random, count(channels * kDepth), 1.0 / std::sqrt(kDepth), w);
  auto bias = draw<T>(random, count(channels), 1.0, b), norm_weight = draw<T>(random, count(channels), 1.0, norm_w);
  auto norm_bias = draw<T>(random, count(channels), 1.0, norm_b);
  auto prefix_rows = draw<T>(random, count(prefix * channels), 1.0, rows);
  auto added = draw<T>(random, count((prefix + patches) * channels), 1.0, position);
  Guarded<T> packed(count(kernels.matrix_packed_bytes[dtype](channels, kDepth)) / sizeof(T));
  kernels.matrix_pack[dtype](weight.data(), channels, kDepth, packed.data(), kSerial);

  repavit::TokenEmbeddingArgs args{};
  args.patches.batch = batch, args.patches.grid[0] = grid[0], args.patches.grid[1] = grid[1];
  args.patches.planes = kPlanes, args.patches.lines = kPatch[0], args.patches.run = kPatch[1];
  args.patches.outputs = channels, args.patches.x = x.data(), args.patches.packed = packed.data();
  args.patches.bias = with_bias ? bias.data() : nullptr;
  const int64_t strides[5] = {kPlanes * height * width, kPatch[0] * width, kPatch[1], height * width, width};
  std::copy(strides, strides + 5, args.patches.strides);
  args.prefix = prefix, args.prefix_rows = prefix_rows.data(), args.position = with_position ? added.data() : nullptr;
  args.norm_weight = norm_weight.data(), args.norm_bias = norm_bias.data();
  args.norm_eps = kEps, args.normalize = normalize;
  Guarded<T> y(count(batch * (prefix + patches) * channels)), again(y.size());
  args.patches.y = y.data();
  kernels.token_embedding[dtype](args, kThreaded);
  expect(y.intact(), "wrote outside the output", name.c_str());
  args.patches.y = again.data();
  kernels.token_embedding[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  std::vector<double> wanted(y.size());
  for (int64_t token = 0; token < batch * (prefix + patches); ++token) {
    const int64_t map = token / (prefix + patches), at = token % (prefix + patches), patch = at - prefix;
    double* row = wanted.data() + token * channels;
    std::vector<double> elements;
    for (int64_t k = 0; patch >= 0 && k < kDepth; ++k) {
      const int64_t plane = k / (kPatch[0] * kPatch[1]), line = k / kPatch[1] % kPatch[0], column = k % kPatch[1];
      elements.push_back(image[count(map * strides[0] + patch / grid[1] * strides[1] + patch % grid[1] * strides[2] +
                                     plane * strides[3] + line * strides[4] + column)]);
    }
    for (int64_t n = 0; n < channels; ++n) {
      row[n] = patch < 0 ? rows[count(at * channels + n)]
                         : reference::dot(elements.data(), w.data() + n * kDepth, kDepth);
      if (with_bias && patch >= 0) row[n] += b[count(n)];
      if (with_position) row[n] += position[count(at * channels + n)];
      // the norm reads what was stored
      if (normalize) row[n] = Convert<T>::to_double(Convert<T>::from_double(row[n]));
    }
    if (normalize) norm_row(row, norm_w, norm_b, kEps);
  }
  if (channels > 1 || !normalize) expect_close(y, wanted, kDepth, dtype, name);  // the norm of one element is noise
}

template <class T>
void test_head_case(const repavit::Kernels& kernels, repavit::DType dtype, int64_t batch, int64_t tokens, int64_t first,
                    int64_t pooled, int64_t channels, int64_t outputs, int flags, const char* level) {
  const bool normalize = flags & 1, with_bias = flags & 2, with_weight = flags & 4;
  std::string name = std::string(level) + " head";
  for (const auto& [key, value] : {std::pair(" B=", batch), {" T=", tokens}, {" first=", first}, {" count=", pooled},
                                   {" C=", channels}, {" N=", outputs}, {" flags=", static_cast<int64_t>(flags)}}) {
    name += key + std::to_string(value);
  }
  constexpr double kEps = 1e-5;
  Random random(static_cast<uint64_t>(channels * 17 + outputs * 5 + tokens));
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t results = with_weight ? outputs : channels;
  std::vector<double> features, w, b, norm_w, norm_b;
  auto x = draw<T>(random, count(batch * tokens * channels), 1.0, features);
  auto weight = draw<T>(random, count(outputs * channels), 1.0 / std::sqrt(static_cast<double>(channels)), w);
  auto bias = draw<T>(random, count(outputs), 1.0, b);
  auto norm_weight = draw<T>(random, count(channels), 1.0, norm_w);
  auto norm_bias = draw<T>(random, count(channels), 1.0, norm_b);
  Guarded<T> y(count(batch * results)), again(y.size());
  repavit::PooledHeadArgs args{batch, tokens, channels, results, first, pooled, x.data(),
                               with_weight ? weight.data() : nullptr, with_weight && with_bias ? bias.data() : nullptr,
                               y.data(), norm_weight.data(), norm_bias.data(), kEps, normalize};
  kernels.pooled_head[dtype](args, kThreaded);
  expect(y.intact(), "wrote outside the output", name.c_str());
  args.y = again.data();
  kernels.pooled_head[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  std::vector<double> wanted;
  for (int64_t image = 0; image < batch; ++image) {
    std::vector<double> mean(count(channels));
    for (int64_t t = first; t < first + pooled; ++t) {
      const double* origin = features.data() + (image * tokens + t) * channels;
      std::vector<double> row(origin, origin + channels);
      if (normalize) norm_row(row.data(), norm_w, norm_b, kEps);
      for (size_t i = 0; i < row.size(); ++i) mean[i] += row[i] / static_cast<double>(pooled);
    }
    for (int64_t n = 0; n < results; ++n) {
      wanted.push_back(with_weight ? reference::dot(mean.data(), w.data() + n * channels, channels) +
                                         (with_bias ? b[count(n)] : 0.0)
                                   : mean[count(n)]);
    }
  }
  expect_close(y, wanted, channels + pooled, dtype, name);
}

template <class T>
void test_model_ends(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  if (kernels.token_embedding[dtype] == nullptr) return;
  int flags = 0;
  for (const int64_t prefix : {0, 1, 5}) {
    for (const int64_t channels : {2, 17, 33, 64}) {
      for (const int64_t batch : {0, 1, 3}) {
        flags = (flags + 3) % 8;
        test_embedding_case<T>(kernels, dtype, batch, {3, 1 + channels % 4}, prefix, channels, flags, level);
        test_embedding_case<T>(kernels, dtype, batch, {1, 1}, prefix, channels, 7 - flags, level);
      }
    }
  }
  for (const int64_t channels : {2, 31, 48}) {
    for (const int64_t outputs : {1, 4, 7, 33}) {
      for (const int64_t batch : {0, 1, 4, 6}) {
        flags = (flags + 3) % 8;
        test_head_case<T>(kernels, dtype, batch, 6, 0, 1, channels, outputs, flags, level);
        test_head_case<T>(kernels, dtype, batch, 6, 1, 5, channels, outputs, 7 - flags, level);
      }
    }
  }
}

}  // namespace driver
