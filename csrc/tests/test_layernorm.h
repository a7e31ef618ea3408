// LayerNorm's core of rows with an offset far above their spread, at one level and dtype, through a product with the
// identity.
#pragma once

#include <algorithm>
#include <string>

#include "driver.h"
#include "expect_near.h"
#include "reference.h"

namespace driver {

// core(x) of so many rows, as patches of one pixel.
template <class T>
Guarded<T> core_of(const repavit::Kernels& kernels, repavit::DType dtype, Guarded<T>& x, int64_t columns, double eps) {
  Guarded<T> eye(static_cast<size_t>(columns * columns));
  for (int64_t i = 0; i < columns * columns; ++i) {
    eye[static_cast<size_t>(i)] = Convert<T>::from_double(i % (columns + 1) == 0 ? 1.0 : 0.0);
  }
  Guarded<T> packed(static_cast<size_t>(kernels.matrix_packed_bytes[dtype](columns, columns)) / sizeof(T));
  kernels.matrix_pack[dtype](eye.data(), columns, columns, packed.data(), kSerial);
  repavit::PatchProjectionArgs args{};
  args.batch = 1, args.grid[0] = static_cast<int64_t>(x.size()) / columns, args.grid[1] = 1;
  args.planes = args.lines = 1, args.run = args.outputs = columns;
  args.strides[1] = columns;
  args.x = x.data(), args.packed = packed.data(), args.norm_eps = eps, args.normalize = true;
  Guarded<T> y(x.size());
  args.y = y.data();
  kernels.patch_projection[dtype](args, kThreaded);
  expect(y.intact(), "wrote outside the output", "layer norm");
  return y;
}

template <class T>
void test_layer_norm(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  constexpr double kEps = 1e-6;
  constexpr int64_t kRows = 3;
  Random random(29);
  for (const int64_t columns : {1, 2, 7, 8, 9, 15, 16, 17, 33, 192}) {
    const size_t size = static_cast<size_t>(kRows * columns);
    const std::string name = std::string(level) + " layer norm of " + std::to_string(columns);
    Guarded<T> x(size);
    for (const double value : {12.345, 1234.567, 100.0, -3e-5, 0.0}) {
      for (size_t i = 0; i < size; ++i) x[i] = Convert<T>::from_double(value);
      const Guarded<T> y = core_of(kernels, dtype, x, columns, kEps);
      bool zero = true;
      for (size_t i = 0; i < size; ++i) zero = zero && Convert<T>::to_double(y[i]) == 0.0;
      expect(zero, "a constant row is not zero", name.c_str());
    }
    struct Kind {
      double offset, spread, first;  // first: of the row's first element, 0: like the others
    };
    for (const Kind& kind : {Kind{0, 1, 0}, {100, 1, 0}, {1e4, 1, 0}, {-6e4, 100, 0}, {1e4, 1e-2, 0}, {0, 1, 1e4},
                             {1e3, 1, -6e4}}) {
      std::vector<double> wanted, exact;
      for (size_t i = 0; i < size; ++i) {
        const bool first = i % static_cast<size_t>(columns) == 0 && kind.first != 0.0;
        x[i] = Convert<T>::from_double(first ? kind.first : kind.offset + kind.spread * random.normal());
        exact.push_back(Convert<T>::to_double(x[i]));
      }
      for (int64_t r = 0; r < kRows; ++r) {
        const std::vector<double> row = reference::core(exact.data() + r * columns, columns, kEps);
        wanted.insert(wanted.end(), row.begin(), row.end());
      }
      if (dtype == repavit::kFloat64) continue;  // the reference has no more digits
      expect_near(core_of(kernels, dtype, x, columns, kEps), wanted, 3, 8, dtype, name);
    }
  }
}

}  // namespace driver
