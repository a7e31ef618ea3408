// Rows that will be wanted soon, asked for one cache line at a time in front of groups of products (gemm-inl.h).
//
// Spread over the products before they are wanted, lines that miss cost nothing. Asked for all at once they fill the queue
// of misses, and whatever is loaded behind them waits as long as if nobody had asked.
#pragma once

#include "gemm-inl.h"
#include "token_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

class FetchRows {
 public:
  void forget() { parts_ = part_ = 0; }

  // `elements` of each of `count` rows, behind those that were asked for before; at most kParts times.
  template <class E>
  void want(const TokenRows<E>& rows, ptrdiff_t count, ptrdiff_t elements) {
    constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(E));
    if (count == 0 || elements == 0) return;
    wanted_[parts_++] = {reinterpret_cast<const char*>(rows.data), rows.tokens, rows.stride * kSize, elements * kSize,
                         count};
    if (parts_ == 1) enter_row(0);
  }

  bool done() const { return part_ == parts_; }

  // The next line; null for a padded token, which has none. Only while not done().
  REPAVIT_INLINE const char* next_line() {
    const char* const line = line_ < end_ ? line_ : nullptr;
    line_ += kLine;
    if (line_ < end_) return line;
    if (row_ + 1 < wanted_[part_].count) {
      enter_row(row_ + 1);
    } else if (++part_ < parts_) {
      enter_row(0);
    }
    return line;
  }

  // In front of a group of products: the next line or, when all have been asked for, what the panel goes on with.
  template <int kBytes>
  REPAVIT_INLINE void ahead_of(const void* panel, int left) {
    if (done()) {
      FetchPanel().ahead_of<kBytes>(panel, left);
    } else if (left % kGroupsPerLine == 0) {
      if (const char* line = next_line()) __builtin_prefetch(line, 0, 2);
    }
  }

 private:
  static constexpr int kParts = 4, kLine = 64;
  static constexpr int kGroupsPerLine = kTileRows <= 6 ? 4 : 1;  // small tiles have short groups, and few slots to spare

  struct Part {
    const char* data;
    const ptrdiff_t* tokens;
    ptrdiff_t stride, bytes, count;
  };

  REPAVIT_INLINE void enter_row(ptrdiff_t row) {
    const Part& part = wanted_[part_];
    const ptrdiff_t token = part.tokens != nullptr ? part.tokens[row] : row;
    row_ = row;
    line_ = end_ = part.data + (token == kPaddedToken ? 0 : token * part.stride);
    if (token == kPaddedToken) return;
    end_ += part.bytes;
    line_ -= reinterpret_cast<size_t>(line_) % kLine;
  }

  Part wanted_[kParts];
  int parts_ = 0, part_ = 0;
  ptrdiff_t row_ = 0;
  const char *line_ = nullptr, *end_ = nullptr;
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
