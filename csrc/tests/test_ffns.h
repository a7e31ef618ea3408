// partial_gelu_ffn and gated_ffn at one level and dtype against double, over hostile shapes.
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
  bool b_in, merged, bias, residual, gated, inner_norm;
  repavit::Norm norm;
  repavit::Activation activation;
  bool int8 = false;
  int threads = kThreaded.threads;

  std::string name(const char* level) const {
    std::string flags;
    for (const auto& [on, text] : {std::pair(b_in, " b_in"), {merged, " merged"}, {bias, " bias"}, {residual, " residual"},
                                   {gated, " gated"}, {inner_norm, " inner norm"}, {int8, " int8"}}) {
      if (on) flags += text;
    }
    return std::string(level) + " M=" + std::to_string(rows) + " C=" + std::to_string(channels) +
           " m=" + std::to_string(active) + " gap=" + std::to_string(gap) + flags + " norm " + std::to_string(norm) +
           " activation " + std::to_string(activation) + " threads " + std::to_string(threads);
  }
};

// The functions of the table that one of the FFNs has.
struct FfnKernels {
  int64_t (*bytes)(int64_t, int64_t, bool);
  void (*pack)(const repavit::FfnWeights&, void*, const repavit::Pool&);
  void (*unpack)(const void*, const repavit::FfnMutableWeights&, const repavit::Pool&);

  FfnKernels(const repavit::Kernels& k, repavit::DType dtype, bool gated, bool int8)
      : bytes(gated ? k.gated_ffn_packed_bytes[dtype] : k.partial_gelu_ffn_packed_bytes[dtype]),
        pack(gated ? k.gated_ffn_pack[dtype] : k.partial_gelu_ffn_pack[dtype]),
        unpack(gated ? k.gated_ffn_unpack[dtype] : k.partial_gelu_ffn_unpack[dtype]) {
    if (!int8) return;
    bytes = (gated ? k.gated_ffn_int8_packed_bytes : k.partial_gelu_ffn_int8_packed_bytes)[dtype];
    pack = (gated ? k.gated_ffn_int8_pack : k.partial_gelu_ffn_int8_pack)[dtype];
    unpack = (gated ? k.gated_ffn_int8_unpack : k.partial_gelu_ffn_int8_unpack)[dtype];
  }
};

template <class T>
void test_ffn_case(const repavit::Kernels& kernels, repavit::DType dtype, const FfnCase& test, const char* level) {
  const std::string name = test.name(level);
  const repavit::Pool pool{test.threads, kThreaded.run};
  const FfnKernels of(kernels, dtype, test.gated, test.int8);
  const auto size = [](int64_t a, int64_t b) { return static_cast<size_t>(a * b); };
  const int64_t rows = test.rows, c = test.channels, m = test.active, up = test.gated ? m : 0, stride = c + test.gap;
  Random random(static_cast<uint64_t>(rows * 7919 + c * 104729 + m));
  reference::Ffn truth{};
  truth.rows = rows, truth.channels = c, truth.active = m, truth.norm_eps = test.inner_norm ? 0.1 : 1e-6;
  truth.gated = test.gated, truth.inner_norm = test.inner_norm, truth.residual = test.residual;
  truth.norm = test.norm, truth.activation = test.activation;

  const double fan_in = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(c, 1)));
  auto dense_x = draw<T>(random, size(rows, c), 1.0, truth.x);
  auto w_in = draw<T>(random, size(m, c), fan_in, truth.w_in), w_up = draw<T>(random, size(up, c), fan_in, truth.w_up);
  auto w_out = draw<T>(random, size(c, m), 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(m, 1))), truth.w_out);
  std::vector<double> unused;
  auto w_merged = draw<T>(random, size(c, c), fan_in, test.merged ? truth.w_merged : unused);
  auto b_in = draw<T>(random, size(m, 1), 1.0, test.b_in ? truth.b_in : unused);
  auto b_up = draw<T>(random, size(up, 1), 1.0, test.bias ? truth.b_up : unused);
  auto bias = draw<T>(random, size(c, 1), 1.0, test.bias ? truth.bias : unused);

  // Strided rows: what lies between them is NaN and must not be read into the result.
  Guarded<T> x(rows > 0 ? size(rows - 1, stride) + size(c, 1) : 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < c; ++i) x[size(r, stride) + size(i, 1)] = dense_x[size(r, c) + size(i, 1)];
  }

  Guarded<T> packed(static_cast<size_t>(of.bytes(c, m, test.merged)) / sizeof(T));
  of.pack({c, m, w_in.data(), w_up.data(), w_out.data(), test.merged ? w_merged.data() : nullptr}, packed.data(), pool);
  expect(packed.intact(), "packing wrote outside its buffer", name.c_str());

  Guarded<T> back_in(size(m, c)), back_up(size(up, c)), back_out(size(c, m)), back_merged(test.merged ? size(c, c) : 0);
  of.unpack(packed.data(), {back_in.data(), back_up.data(), back_out.data(), back_merged.data()}, kSerial);
  const auto same = [&](Guarded<T>& a, Guarded<T>& b) { return same_weights(a, b, test.int8); };
  expect(same(w_in, back_in) && same(w_up, back_up) && same(w_out, back_out) && same(w_merged, back_merged),
         "unpack is not pack's inverse", name.c_str());
  if (kernels.partial_gelu_ffn[dtype] == nullptr) return;

  Guarded<T> y(size(rows, c)), again(size(rows, c));
  repavit::GatedFfnArgs args{};
  args.rows = rows, args.channels = c, args.active = m, args.has_merged = test.merged;
  args.x = x.data(), args.x_stride = stride, args.packed = packed.data();
  args.bias = test.bias ? bias.data() : nullptr;
  args.norm_eps = args.inner_norm_eps = truth.norm_eps, args.norm = test.norm, args.inner_norm = test.inner_norm;
  args.residual = test.residual, args.activation = test.activation, args.int8 = test.int8;
  args.b_gate = test.b_in ? b_in.data() : nullptr, args.b_up = test.bias ? b_up.data() : nullptr;
  const auto run = [&](Guarded<T>& to, const repavit::Pool& pool) {
    args.y = to.data();
    if (test.gated) return kernels.gated_ffn[dtype](args, pool);
    repavit::PartialGeluFfnArgs plain{};
    static_cast<repavit::FfnArgs&>(plain) = args;
    plain.b_in = args.b_gate;
    kernels.partial_gelu_ffn[dtype](plain, pool);
  };
  run(y, pool);
  expect(y.intact() && packed.intact(), "wrote outside the output", name.c_str());
  run(again, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  if (test.int8) {
    const reference::Int8Ffn wanted = reference::ffn_int8(truth);
    return expect_near(y, wanted.y, test.inner_norm ? 8 : 2, (test.inner_norm ? 8 : 2) * (c + m), dtype, name, wanted.step);
  }
  // Rounding of the inputs of the second product, of the result, and of sums of random sign in fp32 (or double). Roundings
  // of H go through an inner norm, whose eps is large here, once more.
  expect_near(y, reference::ffn(truth), test.inner_norm ? 32 : 8, 2 * (c + m), dtype, name);
}

template <class T>
void test_ffns(const repavit::Kernels& kernels, repavit::DType dtype, const char* level, bool thorough) {
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
        const repavit::Norm norm = !bit(3) ? repavit::kNoNorm : cases % 2 == 0 ? repavit::kLayerNorm : repavit::kRmsNorm;
        FfnCase test{r, c, m, bit(0) ? 3 : 0, bit(0), bit(1), bit(2), bit(4), false, false, norm,
                     static_cast<repavit::Activation>(cases % repavit::kGeluForms)};
        test_ffn_case<T>(kernels, dtype, test, level);
        // Of int8, whose products have no dtype, every second case plain and every other one gated, unless all are asked for.
        const bool plain_int8 = dtype != repavit::kFloat64 && (thorough || cases / 2 % 2 == 0);
        test.int8 = plain_int8;
        if (test.int8) test_ffn_case<T>(kernels, dtype, test, level);
        test.int8 = false;
        test.gated = true, test.inner_norm = cases % 3 == 0;
        test.activation = static_cast<repavit::Activation>(cases % repavit::kActivations);
        test_ffn_case<T>(kernels, dtype, test, level);
        test.int8 = dtype != repavit::kFloat64 && (thorough || !plain_int8);
        if (test.int8) test_ffn_case<T>(kernels, dtype, test, level);
        ++cases;
      }
    }
  }
  // Rows a multiple of 4 KiB apart, which are copied into scratch; and enough rows for several blocks.
  for (const bool gated : {false, true}) {
    test_ffn_case<T>(kernels, dtype, {15, 1024, 40, 0, true, true, true, true, gated, false, repavit::kNoNorm,
                                      repavit::kGeluErf}, level);
    // Few rows of large weights, whose threads share the columns: three of them all, four by twos.
    for (const auto& [rows, threads] : {std::pair<int64_t, int>(5, 3), {100, 4}}) {
      FfnCase few{rows, 523, 701, 2, true, gated, true, true, gated, false, repavit::kLayerNorm, repavit::kGeluTanh};
      few.threads = threads;
      test_ffn_case<T>(kernels, dtype, few, level);
    }
    if (!gated && dtype != repavit::kFloat64) {  // several chunks of K, and several blocks of rows
      test_ffn_case<T>(kernels, dtype, {9, 1100, 1040, 0, true, true, true, true, false, false, repavit::kNoNorm,
                                        repavit::kGeluErf, true}, level);
      test_ffn_case<T>(kernels, dtype, {1205, 70, 40, 0, true, true, true, true, false, false, repavit::kLayerNorm,
                                        repavit::kGeluErf, true}, level);
    }
    if (!thorough) continue;
    test_ffn_case<T>(kernels, dtype, {331, 160, 48, 0, true, true, true, true, gated, gated, repavit::kLayerNorm,
                                      repavit::kGeluQuick}, level);
  }
}

// The activation itself, through an FFN of one channel: special values, and the error over the range that matters.
// Behind a sum of -4 - 3/256, which 8 bits do not hold, GELU is 5 % of that behind -4: sums are not rounded to T in between.
template <class T>
void test_unrounded_sums(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  if (kernels.partial_gelu_ffn[dtype] == nullptr) return;
  const T zero = Convert<T>::from_double(0.0), one = Convert<T>::from_double(1.0);
  const T w_in[] = {Convert<T>::from_double(-4.0), Convert<T>::from_double(-3.0 / 256)}, w_out[] = {one, zero};
  Guarded<T> packed(static_cast<size_t>(kernels.partial_gelu_ffn_packed_bytes[dtype](2, 1, false)) / sizeof(T));
  kernels.partial_gelu_ffn_pack[dtype]({2, 1, w_in, nullptr, w_out, nullptr}, packed.data(), kSerial);
  const T x[] = {one, one};
  T y[2];
  repavit::PartialGeluFfnArgs args{};
  args.rows = args.active = 1, args.channels = args.x_stride = 2;
  args.x = x, args.packed = packed.data(), args.y = y;
  kernels.partial_gelu_ffn[dtype](args, kSerial);
  const double wanted = reference::activate(-4.0 - 3.0 / 256, repavit::kGeluErf);
  expect(std::fabs(Convert<T>::to_double(y[0]) / wanted - 1.0) < 0.01, "a sum was rounded in front of gelu", level);
}

inline void test_gelu(const repavit::Kernels& kernels, const char* level) {
  const float one = 1.0f, inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  std::vector<char> packed(static_cast<size_t>(kernels.partial_gelu_ffn_packed_bytes[repavit::kFloat32](1, 1, false)));
  kernels.partial_gelu_ffn_pack[repavit::kFloat32]({1, 1, &one, nullptr, &one, nullptr}, packed.data(), kSerial);
  const auto gelu = [&](std::vector<float> x, repavit::Activation form) {
    std::vector<float> y(x.size());
    repavit::PartialGeluFfnArgs args{};
    args.rows = static_cast<int64_t>(x.size()), args.channels = args.active = args.x_stride = 1;
    args.x = x.data(), args.packed = packed.data(), args.y = y.data(), args.activation = form;
    kernels.partial_gelu_ffn[repavit::kFloat32](args, kSerial);
    return y;
  };
  for (const repavit::Activation form : {repavit::kGeluErf, repavit::kGeluTanh, repavit::kGeluQuick}) {
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
      worst = std::max(worst, std::fabs(y[i] - reference::activate(x[i], form)) / scale);
    }
    if (!expect(worst <= 2e-7, "gelu is further than 2e-7 from the truth", level)) std::printf("       %.3g\n", worst);
  }
}

}  // namespace driver
