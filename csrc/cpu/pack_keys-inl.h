// K and V of one head as panels (kernels.h): K as the right operand of q Kᵀ, its columns the keys; V as that of P V, its
// columns the head's. Any range of keys can be packed by itself, so that threads share the work of one head.
//
// Where one key is left over by whole vectors of scores (7 x 7 windows; a class token beside 16 x 16 patches), it stays a
// row: as a column it would take the time of a vector of them.
#pragma once

#include "pack-inl.h"
#include "scratch-inl.h"
#include "token_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Keys that are columns of panels: all, or all but the odd one, the last.
template <class E>
REPAVIT_INLINE ptrdiff_t columns_of_keys(ptrdiff_t tokens) {
  return tokens > 1 && tokens % SimdOf<E>::kLanes == 1 ? tokens - 1 : tokens;
}

// One head's packed keys and values; sizes in elements.
template <class E>
struct HeadPanels {
  ptrdiff_t tokens, d_qk, d_v;
  E* keys;    // ceil(columns / 32) panels of depth d_qk, then the row of the odd key
  E* values;  // ceil(d_v / 32) panels of depth tokens

  ptrdiff_t columns() const { return columns_of_keys<E>(tokens); }
  bool has_odd() const { return columns() != tokens; }
  E* odd() const { return keys + whole_panels(columns()) / kPanelColumns * key_stride(); }
  ptrdiff_t key_stride() const { return panel_elements<E>(d_qk); }
  ptrdiff_t value_stride() const { return panel_elements<E>(tokens); }
  static ptrdiff_t key_elements(ptrdiff_t tokens, ptrdiff_t d_qk) {
    const ptrdiff_t columns = columns_of_keys<E>(tokens);
    return whole_panels(columns) / kPanelColumns * panel_elements<E>(d_qk) + (columns != tokens ? d_qk : 0);
  }
  static ptrdiff_t value_elements(ptrdiff_t tokens, ptrdiff_t d_v) {
    return whole_panels(d_v) / kPanelColumns * panel_elements<E>(tokens);
  }
};

// Column `column` of a panel from one row, element by element; an odd depth is filled up with a zero.
template <class E>
REPAVIT_INLINE void pack_column(const E* row, ptrdiff_t begin, ptrdiff_t depth, ptrdiff_t column, E* panel) {
  ptrdiff_t k = begin;
  for (; k < depth; ++k) panel[panel_index<E>(k, column)] = row[k];
  for (; k % kInterleave<E> != 0; ++k) panel[panel_index<E>(k, column)] = E{};
}

constexpr int kKeysAtOnce = 16;

#if REPAVIT_ISA_LEVEL >= 2

// 16 rows → 16 columns of a panel, in units of 4 bytes (a float or a bf16 pair) from the first group on; returns how
// many elements of the depth are done. Four units of four rows each fill a register, so that transposing within 128-bit
// lanes is all there is to do.
template <class E>
REPAVIT_INLINE ptrdiff_t transpose_16_rows(const E* const (&rows)[kKeysAtOnce], ptrdiff_t depth, E* columns) {
  static_assert(sizeof(E) * kInterleave<E> == sizeof(float), "a unit is 4 bytes");
  constexpr ptrdiff_t kStep = 4 * kInterleave<E>, kPanelRow = kPanelColumns * kInterleave<E>;
  ptrdiff_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    __m512 a[4];
    REPAVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto four = [&](int r) __attribute__((always_inline)) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(rows[r] + k));
      };
      a[i] = _mm512_castps128_ps512(four(i));
      a[i] = _mm512_insertf32x4(a[i], four(i + 4), 1);
      a[i] = _mm512_insertf32x4(a[i], four(i + 8), 2);
      a[i] = _mm512_insertf32x4(a[i], four(i + 12), 3);
    }
    const auto pd = [](__m512 v) __attribute__((always_inline)) { return _mm512_castps_pd(v); };
    const __m512d low01 = pd(_mm512_unpacklo_ps(a[0], a[1])), low23 = pd(_mm512_unpacklo_ps(a[2], a[3]));
    const __m512d high01 = pd(_mm512_unpackhi_ps(a[0], a[1])), high23 = pd(_mm512_unpackhi_ps(a[2], a[3]));
    const __m512d units[4] = {_mm512_unpacklo_pd(low01, low23), _mm512_unpackhi_pd(low01, low23),
                              _mm512_unpacklo_pd(high01, high23), _mm512_unpackhi_pd(high01, high23)};
    E* out = columns + k * kPanelColumns;
    REPAVIT_UNROLL
    for (int u = 0; u < 4; ++u) _mm512_storeu_pd(reinterpret_cast<double*>(out + u * kPanelRow), units[u]);
  }
  return k;
}

#elif REPAVIT_ISA_LEVEL == 1

// The same of floats, 8 rows to a register's lanes; doubles are left to pack_column.
template <class E>
REPAVIT_INLINE ptrdiff_t transpose_16_rows(const E* const (&rows)[kKeysAtOnce], ptrdiff_t depth, E* columns) {
  ptrdiff_t k = 0;
  if constexpr (IsSame<E, float>::value) {
    for (; k + 4 <= depth; k += 4) {
      REPAVIT_UNROLL
      for (int first = 0; first < kKeysAtOnce; first += 8) {
        __m256 a[4];
        REPAVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[first + i] + k)),
                                      _mm_loadu_ps(rows[first + i + 4] + k), 1);
        }
        const auto pd = [](__m256 v) __attribute__((always_inline)) { return _mm256_castps_pd(v); };
        const __m256d low01 = pd(_mm256_unpacklo_ps(a[0], a[1])), low23 = pd(_mm256_unpacklo_ps(a[2], a[3]));
        const __m256d high01 = pd(_mm256_unpackhi_ps(a[0], a[1])), high23 = pd(_mm256_unpackhi_ps(a[2], a[3]));
        const __m256d units[4] = {_mm256_unpacklo_pd(low01, low23), _mm256_unpackhi_pd(low01, low23),
                                  _mm256_unpacklo_pd(high01, high23), _mm256_unpackhi_pd(high01, high23)};
        float* out = columns + k * kPanelColumns + first;
        REPAVIT_UNROLL
        for (int u = 0; u < 4; ++u) _mm256_storeu_ps(out + u * kPanelColumns, _mm256_castpd_ps(units[u]));
      }
    }
  }
  return k;
}

#else

template <class E>
REPAVIT_INLINE ptrdiff_t transpose_16_rows(const E* const (&)[kKeysAtOnce], ptrdiff_t, E*) {
  return 0;
}

#endif

// dst = src in whole vectors where possible: a call of memcpy costs more than the few lines of one head's row.
template <class E>
REPAVIT_INLINE void copy_elements(const E* src, E* dst, ptrdiff_t count) {
  typedef char Bytes __attribute__((vector_size(sizeof(Simd<float>::V)), aligned(1), may_alias));
  constexpr ptrdiff_t kVector = sizeof(Bytes) / sizeof(E);
  ptrdiff_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    *reinterpret_cast<Bytes*>(dst + i) = *reinterpret_cast<const Bytes*>(src + i);
  }
  for (; i < count; ++i) dst[i] = src[i];
}

// Packs keys [begin, end), the rows of k [end - begin, d_qk]; whoever packs the last key also fills up its panel with
// zeros.
template <class E>
void pack_keys(const TokenRows<const E>& k, ptrdiff_t begin, ptrdiff_t end, const HeadPanels<E>& head) {
  ptrdiff_t key = begin;
  if (head.has_odd() && begin < end && end == head.tokens) copy_elements(k[--end - begin], head.odd(), head.d_qk);
  while (key < end) {
    E* panel = head.keys + key / kPanelColumns * head.key_stride();
    const ptrdiff_t column = key % kPanelColumns;
    if (column % kKeysAtOnce == 0 && key + kKeysAtOnce <= end) {
      const E* rows[kKeysAtOnce];
      for (int i = 0; i < kKeysAtOnce; ++i) rows[i] = k[key - begin + i];
      const ptrdiff_t done = transpose_16_rows(rows, head.d_qk, panel + column * kInterleave<E>);
      for (int i = 0; i < kKeysAtOnce && done < head.d_qk; ++i) {
        pack_column(rows[i], done, head.d_qk, column + i, panel);
      }
      key += kKeysAtOnce;
    } else {
      pack_column(k[key - begin], 0, head.d_qk, column, panel);
      ++key;
    }
  }
  const ptrdiff_t used = end % kPanelColumns;
  if (end != head.tokens || begin == end || used == 0) return;  // beside an odd key there are whole vectors alone
  E* panel = head.keys + end / kPanelColumns * head.key_stride();
  constexpr ptrdiff_t kStep = kInterleave<E>;
  for (ptrdiff_t group = 0; group < groups_of<E>(head.d_qk); ++group) {
    E* row = panel + group * kPanelColumns * kStep;
    for (ptrdiff_t i = used * kStep; i < kPanelColumns * kStep; ++i) row[i] = E{};
  }
}

// One panel's row of V: columns of one key or, for bf16, of two keys interleaved.
template <class E>
REPAVIT_INLINE void interleave(const E* const (&rows)[1], ptrdiff_t columns, E* out) {
  copy_elements(rows[0], out, columns);
}

REPAVIT_INLINE void interleave(const bf16* const (&rows)[2], ptrdiff_t columns, bf16* out) {
  const bf16 *even = rows[0], *odd = rows[1];
  ptrdiff_t c = 0;
#if REPAVIT_ISA_LEVEL >= 2
  for (; c + 16 <= columns && odd != nullptr; c += 16) {
    const auto pairs = [](const bf16* p) __attribute__((always_inline)) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    _mm512_storeu_si512(out + 2 * c, _mm512_or_si512(pairs(even + c), _mm512_slli_epi32(pairs(odd + c), 16)));
  }
#endif
  for (; c < columns; ++c) {
    out[2 * c] = even[c];
    out[2 * c + 1] = odd != nullptr ? odd[c] : bf16{};
  }
}

// Packs keys [begin, end), the rows of v [end - begin, d_v]; begin is a multiple of kInterleave. Columns beyond d_v stay
// undefined: no result comes from them.
template <class E>
void pack_values(const TokenRows<const E>& v, ptrdiff_t begin, ptrdiff_t end, const HeadPanels<E>& head) {
  constexpr ptrdiff_t kStep = kInterleave<E>;
  for (ptrdiff_t key = begin; key < end; key += kStep) {
    const E* rows[kStep];
    for (ptrdiff_t i = 0; i < kStep; ++i) rows[i] = key + i < end ? v[key - begin + i] : nullptr;
    E* out = head.values + key * kPanelColumns;
    for (ptrdiff_t c = 0; c < head.d_v; c += kPanelColumns, out += head.value_stride()) {
      const ptrdiff_t columns = least(kPanelColumns, head.d_v - c);
      const E* part[kStep];
      for (ptrdiff_t i = 0; i < kStep; ++i) part[i] = rows[i] != nullptr ? rows[i] + c : nullptr;
      interleave(part, columns, out);
    }
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
