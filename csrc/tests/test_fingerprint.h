// The fingerprint of weights: what it reads lies within them, strides do not matter, and what it promises to see.
#pragma once

#include "../cpu/fingerprint.h"
#include "driver.h"

namespace driver {

inline uint64_t fingerprint_of(const std::vector<float>& w, int64_t rows, int64_t columns, bool transposed = false) {
  const int64_t row = 4 * (transposed ? 1 : columns), column = 4 * (transposed ? rows : 1);
  repavit::Fingerprint fingerprint;
  fingerprint.add({reinterpret_cast<const char*>(w.data()), rows, columns, row, column, 4});
  return fingerprint.value();
}

inline void test_fingerprint() {
  const char* where = "fingerprint";
  constexpr int64_t kSizes[][2] = {{1, 1}, {1, 5}, {5, 1}, {3, 15}, {8, 16}, {7, 17}, {40, 48}, {31, 100}, {192, 193}};
  for (const auto& size : kSizes) {
    const int64_t rows = size[0], columns = size[1];
    std::vector<float> w(static_cast<size_t>(rows * columns)), t(w.size());  // as long as they are: sanitizers watch
    for (size_t i = 0; i < w.size(); ++i) w[i] = 1.0f + static_cast<float>(i);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        t[static_cast<size_t>(c * rows + r)] = w[static_cast<size_t>(r * columns + c)];
      }
    }
    const uint64_t now = fingerprint_of(w, rows, columns);
    expect(now > repavit::Fingerprint::kOfNothing && now == fingerprint_of(w, rows, columns), "it repeats", where);
    expect(now == fingerprint_of(t, rows, columns, true), "the same in other strides", where);
    for (const float factor : {-1.0f, 0.5f, 1.0f + 0x1p-23f}) {
      std::vector<float> other = w;
      for (float& value : other) value *= factor;
      expect(now != fingerprint_of(other, rows, columns), "all numbers changed", where);
    }
    for (const size_t at : {size_t{0}, w.size() - 1}) {
      std::vector<float> other = w;
      other[at] = -other[at];
      expect(now != fingerprint_of(other, rows, columns), "the first or the last number changed", where);
    }
    const int64_t part = (rows + 2) / 3 + 1;  // a range of rows that is longer than from one place to the next
    for (int64_t first = 0; first + part <= rows; first += part) {
      std::vector<float> other = w;
      for (int64_t i = first * columns; i < (first + part) * columns; ++i) other[static_cast<size_t>(i)] += 1.0f;
      expect(now != fingerprint_of(other, rows, columns), "a range of rows changed", where);
    }
  }
  expect(fingerprint_of({}, 0, 4) == fingerprint_of({}, 4, 0), "nothing to read", where);
}

}  // namespace driver
