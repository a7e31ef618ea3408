// What every test of the C++ driver uses: guarded buffers, pools, seeded numbers and the count of failures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cpu/dispatch.h"

namespace driver {

inline int failures = 0, checks = 0;

inline bool expect(bool good, const char* what, const char* where) {
  ++checks;
  if (good) return true;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", what, where);
  return false;
}

// Conversions through double; bf16 and fp16 round to nearest even, by the definition and not by the kernels' code.
template <class T>
struct Convert {
  static double to_double(T v) { return static_cast<double>(v); }
  static T from_double(double v) { return static_cast<T>(v); }
};
template <>
struct Convert<repavit::bf16> {
  static double to_double(repavit::bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
  }
  static repavit::bf16 from_double(double v) {
    const float f = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(f));
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // finite values only
  }
};
template <>
struct Convert<repavit::fp16> {
  static double to_double(repavit::fp16 v) {
    const int exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
    const double magnitude =
        exponent == 31 ? (mantissa ? std::nan("") : HUGE_VAL)
                       : std::ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return v.bits & 0x8000 ? -magnitude : magnitude;
  }
  static repavit::fp16 from_double(double v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    if (v == 0.0) return {sign};  // has no exponent
    int exponent;
    std::frexp(v, &exponent);
    const int scale = exponent - 11 > -24 ? exponent - 11 : -24;  // exponent of the last bit kept
    const double steps = std::nearbyint(std::ldexp(std::fabs(v), -scale));
    const int biased = scale + 24;  // 0 for subnormals; 1024 steps more carry into the exponent
    const int bits = static_cast<int>(steps) + (biased << 10);
    return {static_cast<uint16_t>(sign | (bits > 0x7c00 ? 0x7c00 : bits))};
  }
};

template <class T>
T poison() {
  if constexpr (std::is_floating_point_v<T>) return std::numeric_limits<T>::quiet_NaN();
  else return T{0x7fff};
}

// n elements at an address with no better alignment than T's, between guard bands. Starts as NaN: reading what nobody
// wrote shows in the result. Its size is exact, so that AddressSanitizer sees the first byte too many.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t n, size_t skew = 1) : memory_(n + 2 * kBand + skew, poison<T>()), n_(n), start_(kBand + skew) {}
  T* data() { return memory_.data() + start_; }
  T& operator[](size_t i) { return memory_[start_ + i]; }
  const T& operator[](size_t i) const { return memory_[start_ + i]; }
  size_t size() const { return n_; }
  bool intact() const {
    const T wanted = poison<T>();
    for (size_t i = 0; i < memory_.size(); ++i) {
      if (i >= start_ && i < start_ + n_) continue;
      if (std::memcmp(&memory_[i], &wanted, sizeof(T)) != 0) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBand = 64;
  std::vector<T> memory_;
  size_t n_, start_;
};

// xorshift64*: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  double uniform() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<double>((state_ * 0x2545f4914f6cdd1du) >> 11) * 0x1p-53;
  }
  double normal() { return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(2.0 * M_PI * uniform()); }

 private:
  uint64_t state_;
};

inline void run_serial(int64_t count, repavit::Pool::Body body, void* context) { body(context, 0, count); }

// One std::thread per range: what ThreadSanitizer watches.
inline void run_on_threads(int64_t count, repavit::Pool::Body body, void* context) {
  std::vector<std::thread> threads;
  constexpr int64_t kThreads = 3;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t begin = count * t / kThreads, end = count * (t + 1) / kThreads;
    if (begin < end) threads.emplace_back([=] { body(context, begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

inline const repavit::Pool kSerial{1, run_serial}, kThreaded{3, run_on_threads};

}  // namespace driver
