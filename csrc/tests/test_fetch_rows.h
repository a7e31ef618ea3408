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
  FetchRows fetch;
  expect(fetch.done(), "wants something before it was told", "fetch_rows");

  alignas(64) float memory[512];
  const ptrdiff_t tokens[] = {2, repavit::driver_scalar::kPaddedToken, 0};
  fetch.want(TokenRows<const float>{memory, 100}, 0, 20);  // nothing: no rows, no elements
  fetch.want(TokenRows<const float>{memory, 100}, 5, 0);
  fetch.want(TokenRows<const float>{memory + 12, 100, tokens}, 3, 20);  // bytes 848-927, none, 48-127
  fetch.want(TokenRows<float>{memory + 16, 160}, 2, 16);                // bytes 64-127, 704-767
  std::vector<ptrdiff_t> lines;
  while (!fetch.done() && lines.size() < 99) {
    const char* line = fetch.next_line();
    lines.push_back(line == nullptr ? -1 : line - reinterpret_cast<const char*>(memory));
  }
  expect(lines == std::vector<ptrdiff_t>{832, 896, -1, 0, 64, 64, 704}, "lines", "fetch_rows");

  fetch.want(TokenRows<float>{memory, 16}, 1, 16);
  expect(!fetch.done(), "wants more", "fetch_rows");
  fetch.forget();
  expect(fetch.done(), "forgets", "fetch_rows");
}

}  // namespace driver
