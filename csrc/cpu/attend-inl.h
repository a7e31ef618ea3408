// o = softmax(scale · q kᵀ + bias) v for query rows of one head, a tile of rows at a time.
//
// 1. A tile of queries meets all packed keys: the scores stay in L1. Up to kSinglePassKeys keys that is one softmax; more
//    go in blocks with a running maximum and sum (online softmax), each block's o added to the rescaled sum so far.
// 2. Without a bias scores are q kᵀ: scale · log2 e is applied in the exponential's own multiplication. With one they are
//    scale · q kᵀ + bias, so that a bias may be any number: times log2 e, the greatest would be infinite.
// 3. A row's result depends on nothing but its own operands, in a fixed order: same bits in any tile, block of rows,
//    batch and number of threads.
#pragma once

#include "fetch_rows-inl.h"
#include "gemm-inl.h"
#include "pack_keys-inl.h"
#include "softmax-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

constexpr ptrdiff_t kSinglePassKeys = 512, kOnlineKeys = 256;
// Queries at a time. Narrow register tiles share each panel of keys and values that comes from L2 among several.
constexpr int kAttendRows = REPAVIT_ISA_LEVEL < 2 ? 4 * kTileRows : kTileRows;

REPAVIT_INLINE ptrdiff_t keys_per_block(ptrdiff_t tokens) {
  return tokens <= kSinglePassKeys ? tokens : kOnlineKeys;
}

// What is added to the scores of one head: one of a table, rows of T, or nothing.
template <class T>
struct ScoreBias {
  const Accumulator<T>* table = nullptr;  // row i at table + i * table_stride, padding -Inf
  ptrdiff_t table_stride = 0;
  const Accumulator<T>* mask = nullptr;   // added to the table where there is one, same strides
  const T* rows = nullptr;                // as given: element (i, j) at rows + i * row_stride + j * column_stride
  ptrdiff_t row_stride = 0, column_stride = 0;  // column_stride: 0 or 1

  // The same from row i on.
  REPAVIT_INLINE ScoreBias from(ptrdiff_t i) const {
    return {table != nullptr ? table + i * table_stride : nullptr, table_stride,
            mask != nullptr ? mask + i * table_stride : nullptr,
            rows != nullptr ? rows + i * row_stride : nullptr, row_stride, column_stride};
  }
};

// row[j] = bias[j] for j < columns, -Inf for the rest of the last vector.
template <class T>
void widen_bias_row(const T* bias, ptrdiff_t column_stride, ptrdiff_t columns, Accumulator<T>* row) {
  using S = SimdOf<T>;
  using E = Accumulator<T>;
  E first[S::kLanes];
  S::store(first, S::load(bias, 1));
  for (ptrdiff_t j = 0; j < columns; j += S::kLanes) {
    const int n = static_cast<int>(least(columns - j, S::kLanes));
    if (n < S::kLanes) {
      for (int i = n; i < S::kLanes; ++i) row[j + i] = kMasked<E>;
    }
    if (column_stride == 0) {
      S::store(row + j, S::broadcast(first[0]), n);
    } else if (n < S::kLanes) {
      S::store(row + j, S::load(bias + j, n), n);
    } else {
      S::store(row + j, S::load(bias + j));
    }
  }
}

// Addends that mask the lanes from n on: load at kTailMask + kLanes - n.
template <class E>
struct TailMask {
  static constexpr int kLanes = Simd<E>::kLanes;
  E addends[2 * kLanes];
  constexpr TailMask() : addends{} {
    for (int i = kLanes; i < 2 * kLanes; ++i) addends[i] = kMasked<E>;
  }
};
template <class E>
constexpr TailMask<E> kTailMask{};

// Store to scores: acc, or acc · factor + table [+ mask], with -Inf for keys that do not exist.
template <class E>
struct ScoresToScratch {
  using S = Simd<E>;
  using V = typename S::V;
  E* scores;
  ptrdiff_t stride;
  const E* table;  // of the tile's first row and the block's first key, or null
  ptrdiff_t table_stride;
  const E* mask;   // same place in the mask, or null
  E factor;

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    E* out = scores + row * stride + col;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      V v = acc[i];
      const int n = valid - i * S::kLanes;
      if (table != nullptr) {
        const ptrdiff_t at = row * table_stride + col + i * S::kLanes;
        v = S::fma(v, S::broadcast(factor), S::load(table + at));
        if (mask != nullptr) v += S::load(mask + at);
      } else if (n < S::kLanes) {
        v += S::load(kTailMask<E>.addends + S::kLanes - n);
      }
      S::store(out + i * S::kLanes, v);
    }
  }
};

// Store of P V: rescaled to the rows of o (of O), or added to a sum over blocks of keys.
template <class O>
struct WeightedSum {
  using S = SimdOf<O>;
  using V = typename S::V;
  using E = Accumulator<O>;
  TokenRows<O> out;   // the tile's rows
  const E* factors;   // per row: 1 / sum of the weights; with `partial`, what the sum so far is multiplied by
  E* partial;         // [rows][stride] or null
  ptrdiff_t stride;
  bool fresh;         // there is no sum so far

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    const V factor = S::broadcast(factors[row]);
    if (partial != nullptr) {
      E* sum = partial + row * stride + col;
      REPAVIT_UNROLL
      for (int i = 0; i < N; ++i) {
        E* part = sum + i * S::kLanes;
        S::store(part, fresh ? acc[i] : S::fma(S::load(part), factor, acc[i]));
      }
      return;
    }
    O* to = out[row];
    if (to == nullptr) return;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      const int n = valid - i * S::kLanes;
      if (n >= S::kLanes) {
        S::store(to + col + i * S::kLanes, acc[i] * factor);
      } else if (n > 0) {
        S::store(to + col + i * S::kLanes, acc[i] * factor, n);
      }
    }
  }
};

// One thread's scratch for tiles of queries; P is stored over S where they have the same type.
template <class E>
struct AttendScratch {
  using A = Accumulator<E>;
  ptrdiff_t q_stride, score_stride, weight_stride, partial_stride;
  E* q;
  A* scores;
  E* weights;
  A* bias;     // null unless rows of a bias come as they are
  A* partial;  // null unless the softmax is online
  A* most;     // per row: maximum so far, sum so far, factor of the next epilogue
  A* sum;
  A* factor;
  A* lane_sums;  // per row and lane
  FetchRows fetch;

  AttendScratch(Carver& carver, ptrdiff_t tokens, ptrdiff_t d_qk, ptrdiff_t d_v, bool raw_bias, bool fetches)
      : fetch(carver, fetches ? tokens : 0) {
    const ptrdiff_t keys = keys_per_block(tokens);
    q_stride = scratch_stride<E>(d_qk);
    score_stride = scratch_stride<A>(keys);
    weight_stride = sizeof(E) == sizeof(A) ? score_stride : scratch_stride<E>(keys);
    partial_stride = scratch_stride<A>(d_v);
    q = carver.take<E>(kAttendRows * q_stride);
    scores = carver.take<A>(kAttendRows * score_stride);
    if constexpr (sizeof(E) == sizeof(A)) {
      weights = reinterpret_cast<E*>(scores);
    } else {
      weights = carver.take<E>(kAttendRows * weight_stride);
    }
    bias = raw_bias ? carver.take<A>(kAttendRows * score_stride) : nullptr;
    partial = keys < tokens ? carver.take<A>(kAttendRows * partial_stride) : nullptr;
    most = carver.take<A>(kAttendRows);
    sum = carver.take<A>(kAttendRows);
    factor = carver.take<A>(kAttendRows);
    lane_sums = carver.take<A>(kAttendRows * Simd<A>::kLanes);
  }
};

// 2^x of one number, as the vectors compute it.
template <class E>
REPAVIT_INLINE E exp2_one(E x) {
  using S = Simd<E>;
  E lanes[S::kLanes];
  S::store(lanes, Exp2<E, 5>::of(S::broadcast(x)));
  return lanes[0];
}

// Softmax of one block of keys: scores → weights, running maximum and sum, and what the sum so far shrinks by. Each step is
// a loop over all rows: a row is one long chain of dependencies, and the next one would wait behind it. Scores times unit
// are exponents of two.
template <class E>
REPAVIT_INLINE void softmax_block(AttendScratch<E>& s, ptrdiff_t rows, ptrdiff_t keys, Accumulator<E> unit,
                                  bool fresh) {
  using A = Accumulator<E>;
  using S = Simd<A>;
  const int vectors = static_cast<int>((keys + S::kLanes - 1) / S::kLanes);
  A subtracted[kAttendRows], before[kAttendRows];
  for (ptrdiff_t r = 0; r < rows; ++r) {
    A most = greatest(s.scores + r * s.score_stride, vectors);
    if (!fresh && s.most[r] > most) most = s.most[r];
    before[r] = s.most[r];
    s.most[r] = most;
    subtracted[r] = most == kMasked<A> ? A{0} : most;  // a row wholly -Inf: weights are zeros, not NaN
  }
  for (ptrdiff_t r = 0; r < rows; ++r) {
    const A* scores = s.scores + r * s.score_stride;
    E* weights = s.weights + r * s.weight_stride;
    const auto sums = may_subtract_product(subtracted[r] * unit)
                          ? exponentials<true>(scores, weights, vectors, unit, subtracted[r])
                          : exponentials<false>(scores, weights, vectors, unit, subtracted[r]);
    S::store(s.lane_sums + r * S::kLanes, sums);
  }
  for (ptrdiff_t r = 0; r < rows; ++r) {
    const A sum = S::sum(S::load(s.lane_sums + r * S::kLanes));
    if (fresh) {
      s.sum[r] = sum;
    } else {
      const A product = subtracted[r] * unit;
      s.factor[r] = exp2_one(may_subtract_product(product) ? before[r] * unit - product
                                                           : (before[r] - subtracted[r]) * unit);
      s.sum[r] = s.sum[r] * s.factor[r] + sum;
    }
  }
}

// One tile: the first `rows` of q, bias and out, rows <= kAttendRows.
template <class T, class O, class E>
void attend_tile(const HeadPanels<E>& head, const TokenRows<const E>& q, ptrdiff_t rows, double scale,
                 const ScoreBias<T>& bias, const TokenRows<O>& out, AttendScratch<E>& s) {
  using A = Accumulator<E>;
  for (ptrdiff_t r = 0; r < rows; ++r) {
    E* to = s.q + r * s.q_stride;
    copy_elements(q[r], to, head.d_qk);
    for (ptrdiff_t k = head.d_qk; k % kInterleave<E> != 0; ++k) to[k] = E{};
  }
  const Rows<E> queries{s.q, s.q_stride, head.d_qk};
  const bool biased = bias.table != nullptr || bias.rows != nullptr;
  const A unit = static_cast<A>(biased ? kLog2EExact : scale * kLog2EExact);

  const ptrdiff_t block = keys_per_block(head.tokens);
  for (ptrdiff_t key = 0; key < head.tokens; key += block) {
    const ptrdiff_t keys = least(block, head.tokens - key);
    const A* table = bias.table != nullptr ? bias.table + key : nullptr;
    ptrdiff_t table_stride = bias.table_stride;
    if (bias.rows != nullptr) {
      for (ptrdiff_t r = 0; r < rows; ++r) {
        const T* from = bias.rows + r * bias.row_stride + key * bias.column_stride;
        widen_bias_row(from, bias.column_stride, keys, s.bias + r * s.score_stride);
      }
      table = s.bias;
      table_stride = s.score_stride;
    }
    const A* mask = bias.mask != nullptr ? bias.mask + key : nullptr;
    gemm_direct(&queries, 1, rows, head.keys + key / kPanelColumns * head.key_stride(), head.key_stride(), keys,
                ScoresToScratch<A>{s.scores, s.score_stride, table, table_stride, mask, static_cast<A>(scale)}, s.fetch);
    softmax_block(s, rows, keys, unit, key == 0);

    if (s.partial == nullptr) {
      for (ptrdiff_t r = 0; r < rows; ++r) s.factor[r] = s.sum[r] == A{0} ? A{0} : A{1} / s.sum[r];
    }
    const Rows<E> weights{s.weights, s.weight_stride, keys};
    gemm_direct(&weights, 1, rows, head.values + key * kPanelColumns, head.value_stride(), head.d_v,
                WeightedSum<O>{out, s.factor, s.partial, s.partial_stride, key == 0}, s.fetch);
  }
  if (s.partial == nullptr) return;

  using S = Simd<A>;
  for (ptrdiff_t r = 0; r < rows; ++r) {
    O* to = out[r];
    if (to == nullptr) continue;
    const auto factor = S::broadcast(s.sum[r] == A{0} ? A{0} : A{1} / s.sum[r]);
    const A* from = s.partial + r * s.partial_stride;
    for (ptrdiff_t c = 0; c < head.d_v; c += S::kLanes) {
      const int n = static_cast<int>(least(head.d_v - c, S::kLanes));
      S::store(to + c, S::load(from + c) * factor, n);
    }
  }
}

// The first `rows` of q, bias and out. scale: positive unless there is a bias.
template <class T, class O, class E>
void attend(const HeadPanels<E>& head, const TokenRows<const E>& q, ptrdiff_t rows, double scale,
            const ScoreBias<T>& bias, const TokenRows<O>& out, AttendScratch<E>& scratch) {
  const ptrdiff_t tiles = (rows + kAttendRows - 1) / kAttendRows;
  for (ptrdiff_t t = 0; t < tiles; ++t) {
    const ptrdiff_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
    attend_tile(head, q.from(first), last - first, scale, bias.from(first), out.from(first), scratch);
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
