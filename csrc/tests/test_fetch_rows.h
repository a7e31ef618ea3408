// FetchRows: which lines it asks for, in which order. What it does is invisible otherwise.
#pragma once

#include <string>
#include <vector>

#include "driver.h"

#define REPAVIT_ISA driver_scalar
#define REPAVIT_ISA_LEVEL 0
#include "../cpu/fetch_rows-inl.h"

namespace driver {

inline void test_fetch_rows() {
  using namespace repavit::driver_scalar;
  alignas(64) float memory[512];
  alignas(64) char block[256];
  Carver carver(block);
  FetchRows fetch(carver, 3);
  const auto asked = [&](int times) {
    std::vector<ptrdiff_t> lines;
    for (int i = 0; i < times; ++i) lines.push_back((fetch.next_line() - reinterpret_cast<const char*>(memory)) & -64);
    return lines;
  };
  const auto wants_nothing = [&] {
    for (int i = 0; i < 999; ++i) {
      if (fetch.next_line() != FetchRows::kNowhere) return false;
    }
    return true;
  };
  fetch.forget();
  expect(wants_nothing(), "wants something", "fetch_rows");

  const ptrdiff_t tokens[] = {2, repavit::driver_scalar::kPaddedToken, 1};
  const TokenRows<const float> x{memory, 100, tokens};  // at bytes 800, 0 (instead of none), 400
  const TokenRows<float> y{memory + 256, 32, tokens};   // at bytes 1280, 1024, 1152
  fetch.follow(x, y, 3);
  expect(wants_nothing(), "wants something of these rows", "fetch_rows");
  fetch.want(FetchRows::kInput, 64, 64);
  fetch.want(FetchRows::kInput, 200, 0);
  fetch.want(FetchRows::kResult, 0, 128);
  const std::vector<ptrdiff_t> first{832, 896, 1280, 1344}, second{64, 64, 1024, 1088}, third{448, 512, 1152, 1216};
  expect(asked(4) == first && asked(4) == second && asked(4) == third, "lines", "fetch_rows");
  expect(asked(4) == third && asked(4) == third, "stays at the last row", "fetch_rows");

  fetch.forget();
  expect(wants_nothing(), "forgets", "fetch_rows");
  fetch.want(FetchRows::kInput, 0, 4);
  expect(asked(3) == std::vector<ptrdiff_t>{768, 0, 384}, "the same rows again", "fetch_rows");
  fetch.want(FetchRows::kInput, 0, 1 << 20);
  asked(99);  // within what there is room for: the sanitizer's part
}

}  // namespace driver
