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

// No element is further away than so many roundings to T and `terms` to the accumulator, of the largest element; and by
// `steps` of its own, if there are any.
template <class T>
void expect_near(const Guarded<T>& y, const std::vector<double>& wanted, double roundings, int64_t terms,
                 repavit::DType dtype, const std::string& name, const std::vector<double>& steps = {}) {
  double worst = 0.0, largest = 1.0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double away = std::fabs(Convert<T>::to_double(y[i]) - wanted[i]);
    const double error = away <= (steps.empty() ? 0.0 : steps[i]) ? 0.0 : away;
    worst = error >= worst ? error : error == error ? worst : HUGE_VAL;
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  const double accumulation = dtype == repavit::kFloat64 ? 0x1p-53 : 0x1p-24;
  const double bound = largest * (roundings * Tolerance<T>::kRounding + static_cast<double>(terms) * accumulation);
  if (!expect(worst <= bound, "differs from double", name.c_str())) {
    std::printf("       error %.3g, bound %.3g\n", worst, bound);
  }
}

// Whether b are the weights a as they come back from a packed copy: the same bits, or of int8 a 254th of the greatest away.
template <class T>
bool same_weights(const Guarded<T>& a, const Guarded<T>& b, bool int8) {
  double worst = 0.0, most = 0.0;
  bool bits = b.intact();
  for (size_t i = 0; i < b.size(); ++i) {
    bits = bits && std::memcmp(&a[i], &b[i], sizeof(T)) == 0;
    worst = std::max(worst, std::fabs(Convert<T>::to_double(a[i]) - Convert<T>::to_double(b[i])));
    most = std::max(most, std::fabs(Convert<T>::to_double(a[i])));
  }
  return int8 ? b.intact() && worst <= most * (0.5 / 127.0 + 2.0 * Tolerance<T>::kRounding) * 1.0001 : bits;
}

}  // namespace driver
