// When a kernel's result is as near to double's as its dtype allows.
#pragma once

#include <algorithm>
#include <string>

#include "driver.h"

namespace driver {

// Relative error of one rounding to T.
template <class T>
struct Tolerance {
  static constexpr double kRounding = 0.0;
};
template <>
struct Tolerance<double> {
  static constexpr double kRounding = 0x1p-53;
};
template <>
struct Tolerance<float> {
  static constexpr double kRounding = 0x1p-24;
};
template <>
struct Tolerance<repavit::bf16> {
  static constexpr double kRounding = 0x1p-9;
};
template <>
struct Tolerance<repavit::fp16> {
  static constexpr double kRounding = 0x1p-12;
};

// No element is further away than so many roundings to T and `terms` to the accumulator, of the largest element.
template <class T>
void expect_near(const Guarded<T>& y, const std::vector<double>& wanted, double roundings, int64_t terms,
                 repavit::DType dtype, const std::string& name) {
  double worst = 0.0, largest = 1.0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::fabs(Convert<T>::to_double(y[i]) - wanted[i]);
    worst = error >= worst ? error : error == error ? worst : HUGE_VAL;
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  const double accumulation = dtype == repavit::kFloat64 ? 0x1p-53 : 0x1p-24;
  const double bound = largest * (roundings * Tolerance<T>::kRounding + static_cast<double>(terms) * accumulation);
  if (!expect(worst <= bound, "differs from double", name.c_str())) {
    std::printf("       error %.3g, bound %.3g\n", worst, bound);
  }
}

}  // namespace driver
