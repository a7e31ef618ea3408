// A fingerprint of weights: a hash of a few places of each, spread over its rows and columns.
//
// A packed copy keeps that of the weights it was made of, and every call compares. Whoever writes most of a matrix, all of
// a third of its rows or one of its ends is seen; who writes single elements need not be. A place is a page of memory that
// has to be found, 40 ns behind a model; what else there is on its lines costs nothing and is hashed as well.
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
  static constexpr int kPlaces = 4;  // of a matrix, two cache lines each: 128 numbers of it in fp32, 256 in bf16
  static constexpr int kLineBytes = 64, kPlaceBytes = 2 * kLineBytes;
  static constexpr uint64_t kUnknown = 0;    // the fingerprint of no weights: a copy that says so is of unknown ones
  static constexpr uint64_t kOfNothing = 1;  // of a copy whose weights are gone, which is compared with nothing

  // Element, counted row by row, at which a place begins: rows at even distances from the first to the last, columns by
  // multiples of the golden ratio, so that they are spread too.
  static int64_t place(const WeightView& w, int number) {
    const int64_t count = w.rows * w.columns, length = kPlaceBytes / w.element, last = w.rows - 1;
    const int64_t end = count > length ? count - length : 0;
    if (number == kPlaces - 1) return end;
    const int64_t row = last / (kPlaces - 1) * number + last % (kPlaces - 1) * number / (kPlaces - 1);
    const uint32_t turn = static_cast<uint32_t>(number) * 2654435769u;  // of 2^32
    const auto column = static_cast<int64_t>(static_cast<unsigned __int128>(w.columns) * turn >> 32);
    const int64_t line = kLineBytes / w.element, first = (row * w.columns + column) / line * line;
    return first < end ? first : end;
  }

  // Where the places of a matrix stand, for those who ask often; false where they are not each in one piece of memory.
  static bool find(const WeightView& w, const char* (&places)[kPlaces]) {
    if (!in_one_piece(w)) return false;
    for (int i = 0; i < kPlaces; ++i) places[i] = w.data + place(w, i) * w.element;
    return true;
  }
  void add(const char* const (&places)[kPlaces]) {
    for (const char* place : places) mix(place);
  }

  // Adds a matrix. The same numbers in other strides give the same.
  void add(const WeightView& w) {
    if (w.rows <= 0 || w.columns <= 0) return;
    const int64_t count = w.rows * w.columns, length = kPlaceBytes / w.element;
    const bool whole = in_one_piece(w);
    for (int i = 0; i < kPlaces; ++i) {
      const int64_t first = place(w, i);
      if (whole) {
        mix(w.data + first * w.element);
        continue;
      }
      char copy[kPlaceBytes] = {};
      for (int64_t k = 0; k < length && first + k < count; ++k) {
        const int64_t row = (first + k) / w.columns, column = (first + k) % w.columns;
        memcpy(copy + k * w.element, w.data + row * w.row_stride + column * w.column_stride,
               static_cast<size_t>(w.element));
      }
      mix(copy);
    }
  }

  uint64_t value() const {
    uint64_t sum = 0;
    for (const uint64_t lane : lanes_) sum = (turned(sum, 23) ^ lane) * 0x9E3779B97F4A7C15u;
    return sum > kOfNothing ? sum : sum + 2;
  }

 private:
  static uint64_t turned(uint64_t value, int by) { return value << by | value >> (64 - by); }

  // Whether the elements of a place follow each other in memory.
  static bool in_one_piece(const WeightView& w) {
    return w.column_stride == w.element && w.row_stride == w.columns * w.element && w.rows > 0 &&
           w.rows * w.columns * w.element >= kPlaceBytes;
  }

  // One change in one word always changes its lane.
  void mix(const char* bytes) {
    uint64_t words[kPlaceBytes / 8];
    memcpy(words, bytes, kPlaceBytes);
    for (int i = 0; i < kPlaceBytes / 8; ++i) lanes_[i % kLanes] = turned(lanes_[i % kLanes], 11) + words[i];
  }

  static constexpr int kLanes = 8;
  uint64_t lanes_[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
};

}  // namespace repavit
