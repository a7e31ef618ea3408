// Rows that will be wanted soon, asked for one cache line at a time in front of groups of products (gemm-inl.h).
//
// Spread over the products before they are wanted, lines that miss cost nothing. Asked for all at once they fill the queue
// of misses, and whatever is loaded behind them waits as long as if nobody had asked.
#pragma once

#include "scratch-inl.h"
#include "token_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

class FetchRows {
 public:
  enum Side { kInput, kResult };
  // Asked for where nothing is wanted: an address that is mapped, or each time the page tables would be walked in vain.
  static constexpr char kNowhere[1] = {};

  FetchRows(Carver& carver, ptrdiff_t most_rows) : rows_(carver.take<const char*>(2 * most_rows)) { forget(); }

  // Rows `x` are read and rows `y` written next, `count` of each; nothing of them is wanted yet.
  template <class E>
  void follow(const TokenRows<const E>& x, const TokenRows<E>& y, ptrdiff_t count) {
    for (ptrdiff_t r = 0; r < count; ++r) {
      const ptrdiff_t token = x.tokens == nullptr ? r : x.tokens[r] == kPaddedToken ? 0 : x.tokens[r];
      rows_[2 * r + kInput] = reinterpret_cast<const char*>(x.data + token * x.stride);
      rows_[2 * r + kResult] = reinterpret_cast<const char*>(y.data + token * y.stride);
    }
    count_ = count;
    forget();
  }

  void forget() {
    row_ = last_ = kNothing;
    column_ = columns_ = 0;
    lines_[0] = {kInput, 0};
  }

  // Bytes [begin, begin + bytes) of each row of one side, behind what was wanted before; at most kMostLines lines in all.
  void want(Side side, ptrdiff_t begin, ptrdiff_t bytes) {
    row_ = rows_;
    last_ = rows_ + 2 * (count_ - 1);
    for (ptrdiff_t at = 0; at < bytes && columns_ < kMostLines; at += kLine) lines_[columns_++] = {side, begin + at};
    const size_t skew = reinterpret_cast<size_t>(rows_[side] + begin) % kLine;  // of the first row, as of most
    const bool straddles = skew + static_cast<size_t>(bytes - 1) % kLine >= kLine;
    if (bytes > 0 && straddles && columns_ < kMostLines) lines_[columns_++] = {side, begin + bytes - 1};
  }

  // In front of a group of products: asks for the next line. Without a branch, at which gcc would move the accumulators of
  // the tile: behind the last row its lines are asked for again.
  template <int kBytes>
  REPAVIT_INLINE void ahead_of(const void*, int left) {
    if (left % kGroupsPerLine == 0) __builtin_prefetch(next_line(), 0, 2);  // known to the compiler
  }

  REPAVIT_INLINE const char* next_line() {
    const Line& line = lines_[column_++];
    const char* const at = row_[line.side] + line.offset;
    const ptrdiff_t wrap = -static_cast<ptrdiff_t>(column_ >= columns_), more = -static_cast<ptrdiff_t>(row_ < last_);
    column_ &= ~wrap;
    row_ += 2 & wrap & more;
    return at;
  }

 private:
  static constexpr int kLine = 64, kMostLines = 48;
  static constexpr int kGroupsPerLine = kTileRows <= 6 ? 4 : 1;  // small tiles have short groups, and few slots to spare
  static constexpr const char* kNothing[2] = {kNowhere, kNowhere};

  struct Line {
    ptrdiff_t side, offset;
  };

  const char** rows_;  // of both sides in turn
  const char *const *row_, *const *last_;
  ptrdiff_t count_ = 0, column_, columns_;
  Line lines_[kMostLines];
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
