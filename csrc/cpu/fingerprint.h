// A fingerprint of weights: a hash of a few lines of each, spread over its rows and columns.
//
// A packed copy keeps that of the weights it was made of, and every call compares. Whoever writes most of a matrix, all of
// a range of its rows or one of its ends is seen; who writes single elements need not be, since only so many lines are
// read. They cost little else than the cache misses (10 to 40 ns a line), so a whole line of each is hashed.
#pragma once

#include <stdint.h>
#include <string.h>

namespace repavit {

// A matrix of any strides, its elements read as bits.
struct WeightView {
  const char* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // bytes
  int64_t element;                    // bytes of one
};

class Fingerprint {
 public:
  static constexpr int kLines = 8;       // of a matrix, 64 bytes each: 128 numbers in fp32, 256 in bf16
  static constexpr int kLineBytes = 64;
  static constexpr uint64_t kUnknown = 0;    // the fingerprint of no weights: a copy that says so is of unknown ones
  static constexpr uint64_t kOfNothing = 1;  // of a copy whose weights are gone, which is compared with nothing

  // Adds a matrix. The same numbers in other strides give the same.
  void add(const WeightView& w) {
    if (w.rows <= 0 || w.columns <= 0) return;
    const int64_t per_line = kLineBytes / w.element, width = w.columns < per_line ? w.columns : per_line;
    const int64_t blocks = (w.columns + per_line - 1) / per_line;
    const char* lines[kLines];
    for (int i = 0; i < kLines; ++i) {
      // Rows at even distances from the first to the last; blocks of columns by multiples of the golden ratio, likewise.
      const int64_t last = w.rows - 1, row = last / (kLines - 1) * i + last % (kLines - 1) * i / (kLines - 1);
      const uint32_t turn = static_cast<uint32_t>(i) * 2654435769u;  // of 2^32
      const auto scaled = static_cast<unsigned __int128>(blocks) * turn >> 32;
      const int64_t block = i == kLines - 1 ? blocks - 1 : static_cast<int64_t>(scaled);
      const int64_t first = block * per_line < w.columns - width ? block * per_line : w.columns - width;
      lines[i] = w.data + row * w.row_stride + first * w.column_stride;
      __builtin_prefetch(lines[i]);
    }
    const bool whole = w.column_stride == w.element && width == per_line;
    for (const char* line : lines) {
      char copy[kLineBytes] = {};
      for (int64_t c = 0; c < width && !whole; ++c) {
        memcpy(copy + c * w.element, line + c * w.column_stride, static_cast<size_t>(w.element));
      }
      mix(whole ? line : copy);
    }
  }

  uint64_t value() const {
    uint64_t sum = 0;
    for (const uint64_t lane : lanes_) sum = (turned(sum, 23) ^ lane) * 0x9E3779B97F4A7C15u;
    return sum > kOfNothing ? sum : sum + 2;
  }

 private:
  static uint64_t turned(uint64_t value, int by) { return value << by | value >> (64 - by); }

  // One change in one word always changes its lane.
  void mix(const char* line) {
    uint64_t words[kLineBytes / 8];
    memcpy(words, line, kLineBytes);
    for (int i = 0; i < kLineBytes / 8; ++i) lanes_[i] = turned(lanes_[i], 11) + words[i];
  }

  uint64_t lanes_[kLineBytes / 8] = {1, 2, 3, 4, 5, 6, 7, 8};
};

}  // namespace repavit
