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
// Queries at a time: all of a short sequence, or else one tile of them. Narrow register tiles share each panel of keys and
// values that comes from L2 among several.
constexpr ptrdiff_t kShortKeys = 64;
constexpr int kAttendRows = (static_cast<int>(kShortKeys) + kTileRows - 1) / kTileRows * kTileRows;
constexpr int kLongRows = REPAVIT_ISA_LEVEL < 2 ? 4 * kTileRows : REPAVIT_ISA_LEVEL < 4 ? kTileRows : 32;
// As numbers in whole vectors, one of each row.
template <class A>
constexpr int kRowNumbers = (kAttendRows + Simd<A>::kLanes - 1) / Simd<A>::kLanes * Simd<A>::kLanes;

REPAVIT_INLINE ptrdiff_t keys_per_block(ptrdiff_t columns) {
  return columns <= kSinglePassKeys ? columns : kOnlineKeys;
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

  template <int kRows, int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[kRows][N], int valid) const {
    const auto store = [&](const auto& score) __attribute__((always_inline)) {
      E* out = scores + row * stride + col;
      ptrdiff_t at = row * table_stride + col;
      REPAVIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        REPAVIT_UNROLL
        for (int i = 0; i < N; ++i) S::store(out + i * S::kLanes, score(acc[r][i], at, i));
        out = opaque(out + stride);
        at = opaque(at + table_stride);
      }
    };
    if (table == nullptr) {
      if (valid >= N * S::kLanes) return store([&](V v, ptrdiff_t, int) { return v; });
      return store([&](V v, ptrdiff_t, int i) {
        const int n = valid - i * S::kLanes;
        return v + S::load(kTailMask<E>.addends + S::kLanes - (n < 0 ? 0 : n < S::kLanes ? n : S::kLanes));
      });
    }
    const V scale = S::broadcast(factor);
    if (mask == nullptr) {
      return store([&](V v, ptrdiff_t at, int i) { return S::fma(v, scale, S::load(table + at + i * S::kLanes)); });
    }
    store([&](V v, ptrdiff_t at, int i) {
      return S::fma(v, scale, S::load(table + at + i * S::kLanes)) + S::load(mask + at + i * S::kLanes);
    });
  }
};
template <class E>
constexpr bool kTakesTiles<ScoresToScratch<E>> = true;

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

  template <int kRows, int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[kRows][N], int valid) const {
    if (partial != nullptr) {
      REPAVIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        E* sum = partial + (row + r) * stride + col;
        REPAVIT_UNROLL
        for (int i = 0; i < N; ++i) {
          E* part = sum + i * S::kLanes;
          S::store(part, fresh ? acc[r][i] : S::fma(S::load(part), S::broadcast(factors[row + r]), acc[r][i]));
        }
      }
      return;
    }
    const bool whole = valid >= N * S::kLanes;
    REPAVIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      O* const to = out[row + r];
      if (to == nullptr) continue;
      const V factor = S::broadcast(factors[row + r]);
      REPAVIT_UNROLL
      for (int i = 0; i < N; ++i) {
        O* const at = to + col + i * S::kLanes;
        const int n = valid - i * S::kLanes;
        if (whole || n >= S::kLanes) {
          S::store(at, acc[r][i] * factor);
        } else if (n > 0) {
          S::store(at, acc[r][i] * factor, n);
        }
      }
    }
  }
};
template <class O>
constexpr bool kTakesTiles<WeightedSum<O>> = true;

// One thread's scratch for tiles of queries; P is stored over S where they have the same type.
template <class E>
struct AttendScratch {
  using A = Accumulator<E>;
  ptrdiff_t rows;  // queries at a time
  ptrdiff_t q_stride, score_stride, weight_stride, partial_stride;
  E* q;
  A* scores;
  E* weights;
  A* bias;     // null unless rows of a bias come as they are
  A* partial;  // null unless the softmax is online
  A* most;     // per row: maximum so far, sum so far, factor of the next epilogue
  A* sum;
  A* factor;
  A* lanes;    // per row and lane, on the way to one number of each row
  A* odd;      // per row: score of the odd key
  FetchRows fetch;

  AttendScratch(Carver& carver, ptrdiff_t tokens, ptrdiff_t d_qk, ptrdiff_t d_v, bool raw_bias, bool fetches)
      : fetch(carver, fetches ? tokens : 0) {
    const ptrdiff_t columns = columns_of_keys<E>(tokens), keys = keys_per_block(columns) + (tokens - columns);
    rows = keys <= kShortKeys ? kAttendRows : kLongRows;
    q_stride = scratch_stride<E>(d_qk);
    score_stride = scratch_stride<A>(keys);
    weight_stride = sizeof(E) == sizeof(A) ? score_stride : scratch_stride<E>(keys);
    partial_stride = scratch_stride<A>(d_v);
    q = carver.take<E>(rows * q_stride);
    scores = carver.take<A>(rows * score_stride);
    if constexpr (sizeof(E) == sizeof(A)) {
      weights = reinterpret_cast<E*>(scores);
    } else {
      weights = carver.take<E>(rows * weight_stride);
    }
    bias = raw_bias ? carver.take<A>(rows * score_stride) : nullptr;
    partial = keys_per_block(columns) < columns ? carver.take<A>(rows * partial_stride) : nullptr;
    most = carver.take<A>(kRowNumbers<A>);
    sum = carver.take<A>(kRowNumbers<A>);
    factor = carver.take<A>(kRowNumbers<A>);
    lanes = carver.take<A>(kRowNumbers<A> * Simd<A>::kLanes);
    odd = carver.take<A>(kRowNumbers<A>);
  }
};

// Scores of the odd key, one of each row, like those of the others: scale times the sum where there is a bias, whose rows
// begin with that of the odd key.
template <class E>
REPAVIT_INLINE void odd_scores(const E* key, const Rows<E>& queries, ptrdiff_t rows, Accumulator<E> scale,
                               const Accumulator<E>* table, ptrdiff_t table_stride, const Accumulator<E>* mask,
                               Accumulator<E>* scores) {
  using A = Accumulator<E>;
  using S = Simd<A>;
  const ptrdiff_t depth = queries.depth;
  for (ptrdiff_t r = 0; r < rows; ++r) {
    const E* q = queries.data + r * queries.stride;
    auto sum = S::zero();
    ptrdiff_t k = 0;
    for (; k + S::kLanes <= depth; k += S::kLanes) sum = S::fma(S::load(q + k), S::load(key + k), sum);
    if (const int n = static_cast<int>(depth - k)) sum = S::fma(S::load(q + k, n), S::load(key + k, n), sum);
    A score = S::sum(sum);
    if (table != nullptr) {
      score = score * scale + table[r * table_stride];
      if (mask != nullptr) score += mask[r * table_stride];
    }
    scores[r] = score;
  }
}

// Weights of the odd key, added to the sums and put behind the others, `keys` of each row.
template <class E>
REPAVIT_INLINE void odd_weights(AttendScratch<E>& s, ptrdiff_t rows, ptrdiff_t keys, Accumulator<E> unit,
                                const Accumulator<E>* subtracted) {
  using A = Accumulator<E>;
  using S = Simd<A>;
  for (ptrdiff_t r = 0; r < rows; r += S::kLanes) {
    const auto exponent = (S::load(s.odd + r) - S::load(subtracted + r)) * S::broadcast(unit);
    S::store(s.odd + r, Exp2<A, 5>::of(exponent));
  }
  for (ptrdiff_t r = 0; r < rows; ++r) {
    E* weight = s.weights + r * s.weight_stride + keys;
    if constexpr (IsSame<E, A>::value) {
      *weight = s.odd[r];
    } else {
      S::store(weight, S::broadcast(s.odd[r]), 1);
    }
    for (int i = 1; i < kInterleave<E>; ++i) weight[i] = E{};
    s.sum[r] += s.odd[r];
  }
}

// Softmax of one block of keys: scores → weights, running maximum and sum, and what the sum so far shrinks by. Each step is
// a loop over all rows: a row is one long chain of dependencies, and the next one would wait behind it. Scores times unit
// are exponents of two. with_odd: the odd key is of this block.
template <class E>
REPAVIT_INLINE void softmax_block(AttendScratch<E>& s, ptrdiff_t rows, ptrdiff_t keys, Accumulator<E> unit,
                                  bool fresh, bool with_odd) {
  using A = Accumulator<E>;
  using S = Simd<A>;
  using V = typename S::V;
  const int vectors = static_cast<int>((keys + S::kLanes - 1) / S::kLanes);
  A subtracted[kRowNumbers<A>];
  for (ptrdiff_t r = 0; r < rows; ++r) {
    S::store(s.lanes + r * S::kLanes, greatest(s.scores + r * s.score_stride, vectors));
  }
  for (ptrdiff_t r = 0; r < rows; r += S::kLanes) {
    V most = across_rows(s.lanes + r * S::kLanes, [](V a, V b) { return S::max(a, b); });
    if (with_odd) most = S::max(S::load(s.odd + r), most);
    const V before = S::load(s.most + r);
    if (!fresh) most = S::max(before, most);
    const V masked = S::broadcast(kMasked<A>), taken = most == masked ? S::zero() : most;  // else NaN where all are -Inf
    S::store(s.most + r, most);
    S::store(subtracted + r, taken);
    if (fresh) continue;
    const V factor = S::broadcast(unit), product = taken * factor;
    const V low = S::broadcast(A{kLeastProduct}), high = S::broadcast(A{kMostProduct});
    const V apart = (before - taken) * factor, fused = S::fma(before, factor, -product);
    S::store(s.factor + r, Exp2<A, 5>::of(product < low ? apart : product > high ? apart : fused));
  }
  exponentials_of_rows(rows, s.scores, s.score_stride, s.weights, s.weight_stride, vectors, unit, subtracted, s.lanes);
  for (ptrdiff_t r = 0; r < rows; r += S::kLanes) {
    const V sum = across_rows(s.lanes + r * S::kLanes, [](V a, V b) { return a + b; });
    S::store(s.sum + r, fresh ? sum : S::fma(S::load(s.sum + r), S::load(s.factor + r), sum));
  }
  if (with_odd) odd_weights(s, rows, keys, unit, subtracted);
}

// What each row of P V is to be multiplied by: 1 / sum, or 0 where nothing has a weight.
template <class E>
REPAVIT_INLINE void inverse_sums(AttendScratch<E>& s) {
  using S = Simd<Accumulator<E>>;
  for (ptrdiff_t r = 0; r < kRowNumbers<Accumulator<E>>; r += S::kLanes) {
    const auto sum = S::load(s.sum + r);
    S::store(s.factor + r, sum == S::zero() ? S::zero() : S::broadcast(1) / sum);
  }
}

// One tile: the first `rows` of q, bias and out, rows <= s.rows.
template <class T, class O, class E>
void attend_tile(const HeadPanels<E>& head, const TokenRows<const E>& q, ptrdiff_t rows, double scale,
                 const ScoreBias<T>& bias, const TokenRows<O>& out, AttendScratch<E>& s) {
  using A = Accumulator<E>;
  const bool in_place = q.tokens == nullptr && head.d_qk % kInterleave<E> == 0;
  for (ptrdiff_t r = 0; r < rows && !in_place; ++r) {
    E* to = s.q + r * s.q_stride;
    copy_elements(q[r], to, head.d_qk);
    for (ptrdiff_t k = head.d_qk; k % kInterleave<E> != 0; ++k) to[k] = E{};
  }
  const Rows<E> queries{in_place ? q.data : s.q, in_place ? q.stride : s.q_stride, head.d_qk};
  const bool biased = bias.table != nullptr || bias.rows != nullptr;
  const A unit = static_cast<A>(biased ? kLog2EExact : scale * kLog2EExact);

  const ptrdiff_t columns = head.columns(), block = keys_per_block(columns);
  for (ptrdiff_t key = 0; key < columns; key += block) {
    const ptrdiff_t keys = least(block, columns - key);
    const bool with_odd = head.has_odd() && key + keys == columns;
    const ptrdiff_t all_keys = keys + with_odd;
    const A* table = bias.table != nullptr ? bias.table + key : nullptr;
    ptrdiff_t table_stride = bias.table_stride;
    if (bias.rows != nullptr) {
      for (ptrdiff_t r = 0; r < rows; ++r) {
        const T* from = bias.rows + r * bias.row_stride + key * bias.column_stride;
        widen_bias_row(from, bias.column_stride, all_keys, s.bias + r * s.score_stride);
      }
      table = s.bias;
      table_stride = s.score_stride;
    }
    const A* mask = bias.mask != nullptr ? bias.mask + key : nullptr;
    gemm_direct(&queries, 1, rows, head.keys + key / kPanelColumns * head.key_stride(), head.key_stride(), keys,
                ScoresToScratch<A>{s.scores, s.score_stride, table, table_stride, mask, static_cast<A>(scale)}, s.fetch);
    if (with_odd) {
      odd_scores(head.odd(), queries, rows, static_cast<A>(scale), table != nullptr ? table + keys : nullptr,
                 table_stride, mask != nullptr ? mask + keys : nullptr, s.odd);
    }
    softmax_block(s, rows, keys, unit, key == 0, with_odd);

    if (s.partial == nullptr) inverse_sums(s);
    const Rows<E> weights{s.weights, s.weight_stride, all_keys};
    gemm_direct(&weights, 1, rows, head.values + key * kPanelColumns, head.value_stride(), head.d_v,
                WeightedSum<O>{out, s.factor, s.partial, s.partial_stride, key == 0}, s.fetch);
  }
  if (s.partial == nullptr) return;

  using S = Simd<A>;
  inverse_sums(s);
  for (ptrdiff_t r = 0; r < rows; ++r) {
    O* to = out[r];
    if (to == nullptr) continue;
    const auto factor = S::broadcast(s.factor[r]);
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
  const ptrdiff_t tiles = (rows + scratch.rows - 1) / scratch.rows;
  for (ptrdiff_t t = 0; t < tiles; ++t) {
    const ptrdiff_t first = rows * t / tiles, last = rows * (t + 1) / tiles;
    attend_tile(head, q.from(first), last - first, scale, bias.from(first), out.from(first), scratch);
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
