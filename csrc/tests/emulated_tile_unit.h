// AMX's tile unit on machines without it: `run.sh avx512` compiles isa_amx.cpp with this header before all else (-include).
// Each instruction by its definition in Intel's manual, but that bf16 numbers below the normal range stay what they are.
#pragma once

#include <stdint.h>
#include <string.h>

#include <cstdlib>

namespace emulated {

struct TileUnit {
  struct Tile {
    char bytes[16][64];
  };
  struct State {
    bool configured = false;
    int rows[8] = {}, row_bytes[8] = {};
    Tile tiles[8] = {};
  };
  static State& state() {
    static thread_local State of_this_thread;
    return of_this_thread;
  }

  // What the processor refuses (#UD) ends the driver.
  static void refuse_unless(bool allowed) {
    if (!allowed) abort();
  }
  static Tile& tile(int index) {
    State& s = state();
    refuse_unless(s.configured && s.rows[index] > 0 && s.row_bytes[index] > 0);
    return s.tiles[index];
  }

  template <class Configuration>
  static void configure(const Configuration& shapes) {
    State& s = state();
    s = State();
    s.configured = shapes.palette == 1;
    for (int i = 0; i < 8; ++i) {
      s.rows[i] = shapes.rows[i], s.row_bytes[i] = shapes.row_bytes[i];
      refuse_unless(s.rows[i] <= 16 && s.row_bytes[i] <= 64);
    }
  }
  static void release() { state() = State(); }

  template <int kTile>
  static void zero() {
    memset(&tile(kTile), 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(const char* rows, ptrdiff_t stride) {
    Tile& t = tile(kTile);
    memset(&t, 0, sizeof(Tile));
    for (int r = 0; r < state().rows[kTile]; ++r) memcpy(t.bytes[r], rows + r * stride, state().row_bytes[kTile]);
  }
  template <int kTile>
  static void store(void* rows, ptrdiff_t stride) {
    const Tile& t = tile(kTile);
    for (int r = 0; r < state().rows[kTile]; ++r) {
      memcpy(static_cast<char*>(rows) + r * stride, t.bytes[r], state().row_bytes[kTile]);
    }
  }

  static float widened(const char* bf16) {
    uint16_t half;
    memcpy(&half, bf16, sizeof(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }

  template <class T, int kSums, int kLeft, int kRight>
  static void multiply() {
    Tile &sums = tile(kSums), &left = tile(kLeft), &right = tile(kRight);
    const State& s = state();
    const int depth = s.row_bytes[kLeft] / 4, columns = s.row_bytes[kSums] / 4;
    refuse_unless(s.rows[kSums] == s.rows[kLeft] && s.rows[kRight] == depth && s.row_bytes[kRight] == 4 * columns);
    for (int r = 0; r < s.rows[kSums]; ++r) {
      for (int c = 0; c < columns; ++c) {
        char* const to = sums.bytes[r] + 4 * c;
        if constexpr (sizeof(T) == 2) {
          float even = 0.0f, odd = 0.0f, sum;
          for (int k = 0; k < depth; ++k) {
            const char *a = left.bytes[r] + 4 * k, *b = right.bytes[k] + 4 * c;
            even += widened(a) * widened(b);
            odd += widened(a + 2) * widened(b + 2);
          }
          memcpy(&sum, to, sizeof(sum));
          sum += even + odd;
          memcpy(to, &sum, sizeof(sum));
        } else {
          int32_t sum;
          memcpy(&sum, to, sizeof(sum));
          for (int k = 0; k < 4 * depth; ++k) {
            const auto a = static_cast<uint8_t>(left.bytes[r][k]);
            const auto b = static_cast<int8_t>(right.bytes[k / 4][4 * c + k % 4]);
            sum += a * b;
          }
          memcpy(to, &sum, sizeof(sum));
        }
      }
    }
  }
};

}  // namespace emulated

#define REPAVIT_TILE_UNIT emulated::TileUnit
