// patch_projection at one level and dtype against double, over hostile shapes and both layouts.
#pragma once

#include <algorithm>
#include <string>

#include "driver.h"
#include "reference.h"
#include "test_ffns.h"

namespace driver {

struct PatchCase {
  int64_t batch, channels, grid[2], patch[2], outputs;
  bool channels_last, bias, normalize;

  std::string name(const char* level) const {
    std::string text = std::string(level) + " patches";
    for (const auto& [key, value] : {std::pair(" B=", batch), {" C=", channels}, {" down=", grid[0]},
                                     {" across=", grid[1]}, {" ph=", patch[0]}, {" pw=", patch[1]}, {" N=", outputs}}) {
      text += key + std::to_string(value);
    }
    return text + (channels_last ? " channels-last" : "") + (bias ? " bias" : "") + (normalize ? " norm" : "");
  }
};

template <class T>
void test_patch_case(const repavit::Kernels& kernels, repavit::DType dtype, const PatchCase& t, const char* level) {
  const std::string name = t.name(level);
  const int64_t height = t.grid[0] * t.patch[0] + 1, width = t.grid[1] * t.patch[1] + 1;  // a rest that is left out
  const int64_t depth = t.channels * t.patch[0] * t.patch[1], patches = t.grid[0] * t.grid[1];
  Random random(static_cast<uint64_t>(depth * 7919 + t.outputs * 104729 + patches));
  std::vector<double> image, w, b;
  auto x = draw<T>(random, static_cast<size_t>(t.batch * t.channels * height * width), 1.0, image);
  auto weight = draw<T>(random, static_cast<size_t>(t.outputs * depth), 1.0 / std::sqrt(std::max<double>(depth, 1)), w);
  auto bias = draw<T>(random, static_cast<size_t>(t.outputs), 1.0, b);

  repavit::PatchProjectionArgs args{};
  args.batch = t.batch, args.grid[0] = t.grid[0], args.grid[1] = t.grid[1], args.outputs = t.outputs;
  const int64_t pixel = t.channels_last ? t.channels : 1, line = width * pixel;
  args.planes = t.channels_last ? 1 : t.channels, args.lines = t.patch[0], args.run = t.patch[1] * pixel;
  const int64_t strides[5] = {t.channels * height * width, t.patch[0] * line, t.patch[1] * pixel, height * width, line};
  std::copy(strides, strides + 5, args.strides);
  args.x = x.data(), args.bias = t.bias ? bias.data() : nullptr;
  args.norm_eps = 1e-5, args.normalize = t.normalize;

  Guarded<T> packed(static_cast<size_t>(kernels.matrix_packed_bytes[dtype](t.outputs, depth)) / sizeof(T));
  kernels.matrix_pack[dtype](weight.data(), t.outputs, depth, packed.data(), kThreaded);
  expect(packed.intact(), "packing wrote outside its buffer", name.c_str());
  Guarded<T> back(weight.size());
  kernels.matrix_unpack[dtype](packed.data(), back.data(), kSerial);
  expect(back.intact() && std::memcmp(weight.data(), back.data(), back.size() * sizeof(T)) == 0,
         "unpack is not pack's inverse", name.c_str());
  if (kernels.patch_projection[dtype] == nullptr) return;

  args.packed = packed.data();
  Guarded<T> y(static_cast<size_t>(t.batch * patches * t.outputs)), again(y.size());
  args.y = y.data();
  kernels.patch_projection[dtype](args, kThreaded);
  expect(y.intact() && packed.intact(), "wrote outside the output", name.c_str());
  args.y = again.data();
  kernels.patch_projection[dtype](args, kSerial);
  expect(std::memcmp(y.data(), again.data(), y.size() * sizeof(T)) == 0, "depends on the threads", name.c_str());

  std::vector<double> elements(static_cast<size_t>(depth)), wanted;
  for (int64_t row = 0; row < t.batch * patches; ++row) {
    const double* origin = image.data() + row / patches * strides[0] + row % patches / t.grid[1] * strides[1] +
                           row % t.grid[1] * strides[2];
    size_t k = 0;
    for (int64_t plane = 0; plane < args.planes; ++plane) {
      for (int64_t l = 0; l < args.lines; ++l) {
        for (int64_t i = 0; i < args.run; ++i) elements[k++] = origin[plane * strides[3] + l * strides[4] + i];
      }
    }
    const std::vector<double> z = t.normalize ? reference::core(elements.data(), depth, 1e-5) : elements;
    for (int64_t n = 0; n < t.outputs; ++n) {
      wanted.push_back(reference::dot(z.data(), w.data() + n * depth, depth) +
                       (t.bias ? b[static_cast<size_t>(n)] : 0.0));
    }
  }
  expect_near(y, wanted, 8, 2 * (depth + 16), dtype, name);
}

template <class T>
void test_patches(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  int flags = 0;
  for (const int64_t channels : {1, 3, 7}) {
    for (const int64_t side : {1, 2, 5}) {
      for (const int64_t outputs : {1, 17, 33, 64}) {
        for (const int64_t batch : {0, 1, 3}) {
          flags = (flags + 5) % 8;  // every combination of options comes by: 5 is coprime to 8
          test_patch_case<T>(kernels, dtype,
                             {batch, channels, {3, 1 + outputs % 4}, {side, side + 1}, outputs, (flags & 1) != 0,
                              (flags & 2) != 0, (flags & 4) != 0},
                             level);
        }
      }
    }
  }
  test_patch_case<T>(kernels, dtype, {1, 3, {2, 0}, {4, 4}, 8, false, true, false}, level);
}

}  // namespace driver
