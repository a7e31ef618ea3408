// partial_gelu_ffn at one level and dtype against double, over hostile shapes.
#pragma once

#include <algorithm>
#include <string>

#include "driver.h"
#include "expect_near.h"
#include "reference.h"

namespace driver {

// Values that T holds exactly, in a guarded buffer and as doubles.
template <class T>
Guarded<T> draw(Random& random, size_t n, double scale, std::vector<double>& exact) {
  Guarded<T> values(n);
  exact.resize(n);
  for (size_t i = 0; i < n; ++i) {
    values[i] = Convert<T>::from_double(random.normal() * scale);
    exact[i] = Convert<T>::to_double(values[i]);
  }
  return values;
}

struct FfnCase {
  int64_t rows, channels, active, gap;  // gap: elements between the rows of x
  bool b_in, merged, bias, normalize, residual;
  repavit::GeluForm gelu;

  std::string name(const char* level) const {
    std::string flags;
    for (const auto& [on, text] : {std::pair(b_in, " b_in"), {merged, " merged"}, {bias, " bias"}, {normalize, " norm"},
                                   {residual, " residual"}, {gelu == repavit::kGeluTanh, " tanh"},
                                   {gelu == repavit::kGeluQuick, " quick"}}) {
      if (on) flags += text;
    }
    return std::string(level) + " M=" + std::to_string(rows) + " C=" + std::to_string(channels) +
           " m=" + std::to_string(active) + " gap=" + std::to_string(gap) + flags;
  }
};

template <class T>
void test_ffn_case(const repavit::Kernels& kernels, repavit::DType dtype, const FfnCase& test, const char* level) {
  const std::string name = test.name(level);
  const auto size = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
  const int64_t rows = test.rows, c = test.channels, m = test.active, stride = c + test.gap;
  Random random(static_cast<uint64_t>(rows * 7919 + c * 104729 + m));
  reference::Ffn truth{rows, c, m, {}, {}, {}, {}, {}, {}, test.normalize, test.residual, test.gelu, 1e-6};

  const double fan_in = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(c, 1)));
  auto dense_x = draw<T>(random, size(rows, c), 1.0, truth.x);
  auto w_in = draw<T>(random, size(m, c), fan_in, truth.w_in);
  auto w_out = draw<T>(random, size(c, m), 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(m, 1))), truth.w_out);
  std::vector<double> unused;
  auto w_merged = draw<T>(random, size(c, c), fan_in, test.merged ? truth.w_merged : unused);
  auto b_in = draw<T>(random, size(m, 1), 1.0, test.b_in ? truth.b_in : unused);
  auto bias = draw<T>(random, size(c, 1), 1.0, test.bias ? truth.bias : unused);

  // Strided rows: what lies between them is NaN and must not be read into the result.
  Guarded<T> x(rows > 0 ? size(rows - 1, stride) + size(c, 1) : 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < c; ++i) x[size(r, stride) + size(i, 1)] = dense_x[size(r, c) + size(i, 1)];
  }

  const int64_t bytes = kernels.partial_gelu_ffn_packed_bytes[dtype](c, m, test.merged);
  Guarded<T> packed(static_cast<size_t>(bytes) / sizeof(T));
  const repavit::PartialGeluFfnWeights weights{c, m, w_in.data(), w_out.data(), test.merged ? w_merged.data() : nullptr};
  kernels.partial_gelu_ffn_pack[dtype](weights, packed.data(), kThreaded);
  expect(packed.intact(), "packing wrote outside its buffer", name.c_str());

  Guarded<T> back_in(size(m, c)), back_out(size(c, m)), back_merged(test.merged ? size(c, c) : 0);
  kernels.partial_gelu_ffn_unpack[dtype](packed.data(), {back_in.data(), back_out.data(), back_merged.data()}, kSerial);
  const auto same = [](Guarded<T>& a, Guarded<T>& b) {
    return b.intact() && std::memcmp(a.data(), b.data(), b.size() * sizeof(T)) == 0;
  };
  expect(same(w_in, back_in) && same(w_out, back_out) && same(w_merged, back_merged), "unpack is not pack's inverse",
         name.c_str());
  if (kernels.partial_gelu_ffn[dtype] == nullptr) return;

  Guarded<T> y(size(rows, c)), again(size(rows, c));
  repavit::PartialGeluFfnArgs args{};
  args.rows = rows, args.channels = c, args.active = m, args.has_merged = test.merged;
  args.x = x.data(), args.x_stride = stride, args.packed = packed.data();
  args.b_in = test.b_in ? b_in.data() : nullptr, args.bias = test.bias ? bias.data() : nullptr;
  args.y = y.data();
  args.norm_eps = truth.norm_eps, args.normalize = test.normalize;
  args.residual = test.residual, args.gelu = test.gelu;
  kernels.partial_gelu_ffn[dtype](args, kThreaded);
  expect(y.intact() && packed.intact(), "wrote outside the output", name.c_str());

  args.y = again.data();
  kernels.partial_gelu_ffn[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  // Rounding of the inputs of the second product, of the result, and of sums of random sign in fp32 (or double).
  expect_near(y, reference::partial_gelu_ffn(truth), 8, 2 * (c + m), dtype, name);
}

template <class T>
void test_ffn(const repavit::Kernels& kernels, repavit::DType dtype, const char* level, bool thorough) {
  const std::vector<int64_t> rows = thorough ? std::vector<int64_t>{0, 1, 2, 5, 6, 13, 14, 15, 29, 49, 103}
                                             : std::vector<int64_t>{0, 1, 7, 15, 29};
  const std::vector<int64_t> widths = thorough ? std::vector<int64_t>{0, 1, 7, 16, 17, 31, 32, 33, 61, 64, 96}
                                               : std::vector<int64_t>{0, 1, 17, 31, 32, 33};
  int flags = 0, cases = 0;
  for (const int64_t r : rows) {
    for (const int64_t c : widths) {
      for (const int64_t m : widths) {
        // Every combination of options comes by as the shapes go round: 37 is coprime to 32, and 3 to both.
        flags = (flags + 37) % 32;
        const auto bit = [&](int i) { return (flags >> i & 1) != 0; };
        const auto form = static_cast<repavit::GeluForm>(cases++ % repavit::kGeluForms);
        test_ffn_case<T>(kernels, dtype, {r, c, m, bit(0) ? 3 : 0, bit(0), bit(1), bit(2), bit(3), bit(4), form}, level);
      }
    }
  }
  // Rows a multiple of 4 KiB apart, which are copied into scratch; and enough rows for several blocks.
  test_ffn_case<T>(kernels, dtype, {15, 1024, 40, 0, true, true, true, false, true, repavit::kGeluErf}, level);
  if (thorough) test_ffn_case<T>(kernels, dtype, {331, 160, 48, 0, true, true, true, true, true, repavit::kGeluQuick}, level);
}

// The activation itself, through an FFN of one channel: special values, and the error over the range that matters.
inline void test_gelu(const repavit::Kernels& kernels, const char* level) {
  const float one = 1.0f, inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  std::vector<char> packed(static_cast<size_t>(kernels.partial_gelu_ffn_packed_bytes[repavit::kFloat32](1, 1, false)));
  kernels.partial_gelu_ffn_pack[repavit::kFloat32]({1, 1, &one, &one, nullptr}, packed.data(), kSerial);
  const auto gelu = [&](std::vector<float> x, repavit::GeluForm form) {
    std::vector<float> y(x.size());
    repavit::PartialGeluFfnArgs args{};
    args.rows = static_cast<int64_t>(x.size()), args.channels = args.active = args.x_stride = 1;
    args.x = x.data(), args.packed = packed.data(), args.y = y.data(), args.gelu = form;
    kernels.partial_gelu_ffn[repavit::kFloat32](args, kSerial);
    return y;
  };
  for (const repavit::GeluForm form : {repavit::kGeluErf, repavit::kGeluTanh, repavit::kGeluQuick}) {
    const auto special = gelu({nan, inf, -inf, 0.0f, -0.0f, -100.0f, -1e30f, 1e30f, 1e-42f, -3e38f, 3e38f}, form);
    expect(std::isnan(special[0]) && special[1] == inf && std::isnan(special[2]), "gelu of NaN, Inf, -Inf", level);
    expect(special[3] == 0.0f && special[4] == 0.0f && special[5] == 0.0f && special[6] == 0.0f && special[9] == 0.0f,
           "gelu of zero", level);
    expect(special[7] == 1e30f && special[8] > 0.0f && special[10] == 3e38f, "gelu of the huge and the tiny", level);

    std::vector<float> x;
    for (int i = -90000; i <= 90000; ++i) x.push_back(static_cast<float>(i) * 1e-4f);
    const auto y = gelu(x, form);
    double worst = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double scale = std::max(1.0, std::fabs(static_cast<double>(x[i])));
      worst = std::max(worst, std::fabs(y[i] - reference::gelu(x[i], form)) / scale);
    }
    if (!expect(worst <= 2e-7, "gelu is further than 2e-7 from the truth", level)) std::printf("       %.3g\n", worst);
  }
}

}  // namespace driver
