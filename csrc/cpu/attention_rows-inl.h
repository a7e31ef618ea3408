// What attention does with rows of tokens: where they stand, their norm, q k v of a head, the head's attention, the
// projection back. Who does which rows when is in rep_attention-inl.h.
#pragma once

#include "attention_plan-inl.h"
#include "gemm_int8-inl.h"
#include "query_key_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Store to a head's q | k | v: acc + bias. Scratch rows have whole panels of columns.
template <class T>
struct QkvToScratch {
  using S = SimdOf<T>;
  using V = typename S::V;
  Operand<T>* out;
  ptrdiff_t stride;
  const Accumulator<T>* bias;  // whole panels of columns

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int) const {
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      S::store(out + row * stride + col + i * S::kLanes, acc[i] + S::load(bias + col + i * S::kLanes));
    }
  }
};

// Store to y, wherever the row's token stands: acc [+ bias] [+ x].
template <class T>
struct ProjectionToTokens {
  using S = SimdOf<T>;
  using V = typename S::V;
  TokenRows<T> y;
  TokenRows<const T> residual;  // data null: none
  const T* bias;                // [columns] or null

  template <int N>
  REPAVIT_INLINE void operator()(ptrdiff_t row, ptrdiff_t col, const V (&acc)[N], int valid) const {
    T* out = y[row];
    if (out == nullptr) return;
    const T* shortcut = residual.data != nullptr ? residual[row] : nullptr;
    REPAVIT_UNROLL
    for (int i = 0; i < N; ++i) {
      V v = acc[i];
      const ptrdiff_t at = col + i * S::kLanes;
      const int n = valid - i * S::kLanes;
      if (n >= S::kLanes) {
        if (bias != nullptr) v += S::load(bias + at);
        if (shortcut != nullptr) v += S::load(shortcut + at);
        S::store(out + at, v);
      } else if (n > 0) {
        if (bias != nullptr) v += S::load(bias + at, n);
        if (shortcut != nullptr) v += S::load(shortcut + at, n);
        S::store(out + at, v, n);
      }
    }
  }
};

// Where int8 weights have their rows: z until all heads are projected, then o.
struct QuantizedScratch {
  ptrdiff_t stride;  // whole numbers, of at most two bytes
  float* row;        // one row before it is quantized
  RowScale* scales;  // [rows]
  char* numbers;     // [rows, stride]

  // Of `channels`, and of `values` between the products; nothing where the weights are of another kind.
  QuantizedScratch(Carver& carver, bool wanted, ptrdiff_t rows, ptrdiff_t channels, ptrdiff_t values)
      : stride(scratch_stride<int16_t>(channels > values ? channels : values)),
        row(carver.take<float>(wanted ? stride : 0)),
        scales(carver.take<RowScale>(wanted ? rows : 0)),
        numbers(carver.take<char>(wanted ? rows * stride * static_cast<ptrdiff_t>(sizeof(int16_t)) : 0)) {}

  template <class O>
  O* at(ptrdiff_t r) const {
    return reinterpret_cast<O*>(numbers) + r * stride;
  }
  template <class O>
  Int8Rows<O> rows(ptrdiff_t depth) const {
    return {at<O>(0), stride, depth, scales};
  }
};

// One thread's part of the memory. `rows` is the most it handles at a time.
template <class T>
struct AttentionScratch {
  using Plan = AttentionPlan<T>;
  using E = typename Plan::E;
  using A = typename Plan::A;
  ptrdiff_t* tokens;       // of the rows at hand; unused where they follow each other
  ptrdiff_t* next_tokens;  // of the next sequence's, without weights
  E* z;               // [rows, C]
  A* bias;            // b_qkv of one head
  E* zeros;           // q of a padded token, and its k and v where nothing else is given
  E* qkv;             // [rows, q | k | v of one head]
  E *keys, *values;   // panels of one head of one sequence
  E* o;               // [rows, h d_v]
  A* tables;          // of windows: a bias table per head, a mask per class
  bool* filled;       // which of them are
  QuantizedScratch quantized;
  AttendScratch<E> attend;

  AttentionScratch(Carver& carver, const Plan& plan, ptrdiff_t rows)
      : tokens(carver.take<ptrdiff_t>(plan.windowed() ? rows : 0)),
        next_tokens(carver.take<ptrdiff_t>(plan.windowed() && !plan.projects() ? rows : 0)),
        z(carver.take<E>(plan.panels != nullptr ? rows * plan.z_stride : 0)),
        bias(carver.take<A>(plan.qkv_stride)),
        zeros(carver.take<E>(plan.qkv_stride)),
        qkv(carver.take<E>(plan.in_place() ? 0 : rows * plan.qkv_stride)),
        keys(carver.take<E>(plan.key_elements())),
        values(carver.take<E>(plan.value_elements())),
        o(carver.take<E>(plan.projects() ? rows * plan.o_stride : 0)),
        tables(carver.take<A>(plan.table_count() * plan.table_elements())),
        filled(carver.take<bool>(plan.table_count())),
        quantized(carver, plan.int8_panels != nullptr, rows, plan.layout.channels, plan.layout.heads * plan.layout.d_v),
        attend(carver, plan.length, plan.layout.d_qk, plan.layout.d_v, plan.args.attn_bias != nullptr,
               !plan.projects()) {
    for (ptrdiff_t i = 0; i < plan.qkv_stride && zeros != nullptr; ++i) zeros[i] = E{};
    for (ptrdiff_t i = 0; i < plan.table_count() && filled != nullptr; ++i) filled[i] = false;
  }
};

// This thread's, until it asks its arena again.
template <class T>
AttentionScratch<T> thread_scratch(const AttentionPlan<T>& plan, ptrdiff_t rows) {
  Carver count;
  (void)AttentionScratch<T>(count, plan, rows);
  Carver carver(thread_arena(count.bytes()));
  return {carver, plan, rows};
}

template <class E>
struct HeadRows {
  TokenRows<const E> q, k, v;
};

// Rows of x and of y that `rows` tokens from `row` of a sequence on occupy (several whole sequences: row 0).
template <class T>
struct Tokens {
  ptrdiff_t count;
  ptrdiff_t first;  // of all sequences' tokens; they follow each other unless there are windows
  TokenRows<const T> x;
  TokenRows<T> y;
};

template <class T>
Tokens<T> locate(const AttentionPlan<T>& plan, ptrdiff_t sequence, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t* tokens) {
  const RepAttentionArgs& args = plan.args;
  const ptrdiff_t x_stride = static_cast<ptrdiff_t>(args.x_stride);
  const ptrdiff_t y_stride = plan.projects() ? plan.layout.channels_out : plan.layout.heads * plan.layout.d_v;
  const TokenRows<const T> x{static_cast<const T*>(args.x), x_stride};
  const TokenRows<T> y{static_cast<T*>(args.y), y_stride};
  if (!plan.windowed()) {
    const ptrdiff_t first = sequence * plan.length + row;
    return {rows, first, x.from(first), y.from(first)};
  }
  for (ptrdiff_t done = 0; done < row + rows; done += plan.length) {
    plan.windows.locate(sequence + done / plan.length, tokens + done);
  }
  return {rows, 0, {x.data, x_stride, tokens + row}, {y.data, y_stride, tokens + row}};
}

// z = the rows through their norm; zeros for padded tokens.
template <class T>
void gather_input(const AttentionPlan<T>& plan, const Tokens<T>& at, AttentionScratch<T>& s) {
  const ptrdiff_t channels = plan.layout.channels;
  if constexpr (kHasInt8<T>) {
    if (plan.int8_panels != nullptr) {
      return with_int8_operand([&](auto operand) {
        using O = decltype(operand);
        for (ptrdiff_t r = 0; r < at.count; ++r) {
          O* const to = s.quantized.template at<O>(r);
          const T* x = at.x[r];
          if (x != nullptr) norm_row(x, s.quantized.row, channels, plan.args.norm, plan.args.norm_eps);
          for (ptrdiff_t k = 0; k < channels && x == nullptr; ++k) s.quantized.row[k] = 0.0f;
          s.quantized.scales[r] = quantize_row(s.quantized.row, channels, to);
        }
      });
    }
  }
  Operand<T>* z = s.z;
  for (ptrdiff_t r = 0; r < at.count; ++r, z += plan.z_stride) {
    const T* x = at.x[r];
    for (ptrdiff_t k = x != nullptr ? channels : 0; k < channels || k % kInterleave<T> != 0; ++k) z[k] = Operand<T>{};
    if (x == nullptr) continue;
    norm_row(x, z, channels, plan.args.norm, plan.args.norm_eps);
  }
}

// Whether the weights are of int8; then the product of the quantized rows with those from `offset` on is done.
template <class T, class Epilogue>
bool int8_product(const AttentionPlan<T>& plan, const AttentionScratch<T>& s, ptrdiff_t rows, ptrdiff_t depth,
                  ptrdiff_t offset, ptrdiff_t stride, ptrdiff_t columns, const Epilogue& epilogue) {
  if constexpr (kHasInt8<T>) {
    if (plan.int8_panels == nullptr) return false;
    with_int8_operand([&](auto operand) {
      const auto left = s.quantized.template rows<decltype(operand)>(depth);
      gemm_int8(&left, 1, rows, plan.int8_panels + offset, stride, columns, epilogue);
    });
    return true;
  }
  return false;
}

// q | k | v of one head and padded token; q is never used.
template <class T>
void padded_row(const AttentionPlan<T>& plan, ptrdiff_t head, Operand<T>* row) {
  const AttentionLayout<T>& layout = plan.layout;
  const T* padding = static_cast<const T*>(plan.args.windows->padding);
  convert_row(padding + head * layout.d_qk, row + layout.d_qk, layout.d_qk);
  convert_row(padding + layout.heads * layout.d_qk + head * layout.d_v, row + 2 * layout.d_qk, layout.d_v);
}

// The product of z with one head's weights in qkv, queries and keys normed and turned.
template <class T>
void project_head(const AttentionPlan<T>& plan, ptrdiff_t head, const Tokens<T>& at, AttentionScratch<T>& s,
                  Operand<T>* qkv) {
  const AttentionLayout<T>& layout = plan.layout;
  Accumulator<T>* const bias = s.bias;
  for (ptrdiff_t i = 0; i < plan.qkv_stride; ++i) bias[i] = 0;
  if (const T* b = static_cast<const T*>(plan.args.b_qkv)) {
    convert_row(b + layout.qkv_row(head, 0), bias, layout.d_qk);
    convert_row(b + layout.qkv_row(head, layout.d_qk), bias + layout.d_qk, layout.d_qk);
    convert_row(b + layout.qkv_row(head, 2 * layout.d_qk), bias + 2 * layout.d_qk, layout.d_v);
  }
  const QkvToScratch<T> epilogue{qkv, plan.qkv_stride, bias};
  const auto& int8 = plan.int8_layout;
  if (!int8_product(plan, s, at.count, layout.channels, head * int8.head_stride, int8.qkv_stride, layout.head_columns,
                    epilogue)) {
    const Rows<T> rows{s.z, plan.z_stride, layout.channels};
    gemm(&rows, 1, at.count, plan.panels + head * layout.head_stride, layout.qkv_stride, layout.head_columns, epilogue);
  }
  if (!plan.windowed()) {
    return turn_rows<T>(plan.args.qk, layout.d_qk, plan.length, head, at.first, at.count, qkv, plan.qkv_stride);
  }
  if (plan.args.windows->padding == nullptr) return;
  for (ptrdiff_t r = 0; r < at.count; ++r) {
    if (at.x.tokens[r] == kPaddedToken) padded_row(plan, head, qkv + r * plan.qkv_stride);
  }
}

// q, k and v of one head: computed from z, or taken from rows of q | k | v as they are or converted.
template <class T>
HeadRows<Operand<T>> head_rows(const AttentionPlan<T>& plan, ptrdiff_t head, const Tokens<T>& at,
                               AttentionScratch<T>& s, Operand<T>* qkv) {
  using E = Operand<T>;
  const AttentionLayout<T>& layout = plan.layout;
  const ptrdiff_t k = layout.d_qk, v = 2 * layout.d_qk;
  if (plan.projects()) {
    project_head(plan, head, at, s, qkv);
  } else {
    const bool padded = plan.windowed() && plan.args.windows->padding != nullptr;
    if (padded) padded_row(plan, head, s.zeros);
    const ptrdiff_t columns[3] = {layout.qkv_row(head, 0), layout.qkv_row(head, k), layout.qkv_row(head, v)};
    if constexpr (IsSame<T, E>::value) {
      const auto part = [&](int i, ptrdiff_t offset) {
        return TokenRows<const E>{at.x.data + columns[i], at.x.stride, at.x.tokens, s.zeros + offset};
      };
      return {part(0, 0), part(1, k), part(2, v)};
    } else {
      for (ptrdiff_t r = 0; r < at.count; ++r) {
        E* row = qkv + r * plan.qkv_stride;
        if (const T* x = at.x[r]) {
          convert_row(x + columns[0], row, k);
          convert_row(x + columns[1], row + k, k);
          convert_row(x + columns[2], row + v, layout.d_v);
        } else {
          __builtin_memcpy(row, s.zeros, sizeof(E) * static_cast<size_t>(layout.head_columns));
        }
      }
    }
  }
  return {{qkv, plan.qkv_stride}, {qkv + k, plan.qkv_stride}, {qkv + v, plan.qkv_stride}};
}

// Table i of this thread, filled when it is first wanted: one for all threads would travel from core to core, which takes
// ten times as long as filling it.
template <class T>
const Accumulator<T>* window_table(const AttentionPlan<T>& plan, ptrdiff_t i, AttentionScratch<T>& s) {
  Accumulator<T>* table = s.tables + i * plan.table_elements();
  if (s.filled[i]) return table;
  s.filled[i] = true;
  const ptrdiff_t heads = plan.layout.heads;
  if (i < heads) {
    plan.windows.fill_table(i, table);
  } else {
    plan.windows.fill_mask(static_cast<int>(i - heads) + 1, table);
  }
  return table;
}

template <class T>
ScoreBias<T> score_bias(const AttentionPlan<T>& plan, ptrdiff_t sequence, ptrdiff_t head, AttentionScratch<T>& s) {
  ScoreBias<T> bias;
  if (plan.windowed()) {
    bias.table_stride = plan.table_stride();
    bias.table = window_table(plan, head, s);
    const int window_class = plan.windows.class_of(sequence);
    if (window_class > 0) bias.mask = window_table(plan, plan.layout.heads + window_class - 1, s);
  } else if (plan.args.attn_bias != nullptr) {
    const int64_t* strides = plan.args.attn_bias_strides;
    bias.rows = static_cast<const T*>(plan.args.attn_bias) + sequence * strides[0] + head * strides[1];
    bias.row_stride = static_cast<ptrdiff_t>(strides[2]);
    bias.column_stride = static_cast<ptrdiff_t>(strides[3]);
  } else if (plan.zero_table()) {
    bias.table = plan.zeros;
  }
  return bias;
}

// The rows from `first` of `at` on attend to one head's panels; o goes to scratch for the projection, or to y itself.
template <class T>
void attend_rows(const AttentionPlan<T>& plan, ptrdiff_t head, const HeadPanels<Operand<T>>& panels,
                 const TokenRows<const Operand<T>>& q, ptrdiff_t rows, const ScoreBias<T>& bias, const Tokens<T>& at,
                 ptrdiff_t first, AttentionScratch<T>& s) {
  const ptrdiff_t column = head * plan.layout.d_v;
  if (plan.projects()) {
    const TokenRows<Operand<T>> o{s.o + first * plan.o_stride + column, plan.o_stride};
    attend(panels, q, rows, plan.args.scale, bias, o, s.attend);
  } else {
    const TokenRows<T> o{at.y.data + column, at.y.stride, at.y.tokens};
    attend(panels, q, rows, plan.args.scale, bias, o.from(first), s.attend);
  }
}

// Rows of o, once all heads are there, through the norm in front of the projection. int8 takes it on the way to its own
// rows, which are of floats at every level.
template <class T>
void norm_values(const AttentionPlan<T>& plan, ptrdiff_t rows, AttentionScratch<T>& s) {
  if (!plan.args.inner_norm || plan.int8_panels != nullptr) return;
  const ptrdiff_t depth = plan.layout.heads * plan.layout.d_v;
  for (ptrdiff_t r = 0; r < rows; ++r) {
    Operand<T>* o = s.o + r * plan.o_stride;
    layer_norm_row(o, o, depth, plan.args.inner_norm_eps);
  }
}

// Rows of o quantized, behind their norm, in the place of z, which nobody wants any more.
template <class T>
void quantize_values(const AttentionPlan<T>& plan, ptrdiff_t rows, AttentionScratch<T>& s) {
  const ptrdiff_t depth = plan.layout.heads * plan.layout.d_v;
  const Norm norm = plan.args.inner_norm ? kLayerNorm : kNoNorm;
  with_int8_operand([&](auto operand) {
    using O = decltype(operand);
    for (ptrdiff_t r = 0; r < rows; ++r) {
      norm_row(s.o + r * plan.o_stride, s.quantized.row, depth, norm, plan.args.inner_norm_eps);
      s.quantized.scales[r] = quantize_row(s.quantized.row, depth, s.quantized.template at<O>(r));
    }
  });
}

// What the projection's columns from `col` on become of the rows at hand.
template <class T>
ProjectionToTokens<T> to_tokens(const AttentionPlan<T>& plan, const Tokens<T>& at, ptrdiff_t col) {
  TokenRows<T> y = at.y;
  TokenRows<const T> residual = at.x;
  y.data += col;
  residual.data = plan.args.residual ? residual.data + col : nullptr;
  const T* bias = static_cast<const T*>(plan.args.b_proj);
  return {y, residual, bias != nullptr ? bias + col : nullptr};
}

// Some panels of the projection of o.
template <class T>
void project_panels(const AttentionPlan<T>& plan, const Tokens<T>& at, PanelRange panels, AttentionScratch<T>& s) {
  const AttentionLayout<T>& layout = plan.layout;
  const ptrdiff_t col = panels.first * kPanelColumns;
  const ptrdiff_t columns = least(layout.channels_out - col, (panels.last - panels.first) * kPanelColumns);
  const Rows<T> rows{s.o, plan.o_stride, layout.heads * layout.d_v};
  const T* weights = plan.panels + layout.proj_offset + panels.first * layout.proj_stride;
  gemm(&rows, 1, at.count, weights, layout.proj_stride, columns, to_tokens(plan, at, col));
}

// A last group of k of rows of o is whole.
template <class T>
void finish_groups(const AttentionPlan<T>& plan, Operand<T>* o, ptrdiff_t rows) {
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t k = plan.layout.heads * plan.layout.d_v; k % kInterleave<T> != 0; ++k) o[r * plan.o_stride + k] = {};
  }
}

template <class T>
void project_output(const AttentionPlan<T>& plan, const Tokens<T>& at, AttentionScratch<T>& s) {
  if (!plan.projects()) return;
  norm_values(plan, at.count, s);
  const AttentionLayout<T>& layout = plan.layout;
  if constexpr (kHasInt8<T>) {
    if (plan.int8_panels != nullptr) {
      quantize_values(plan, at.count, s);
      const auto& int8 = plan.int8_layout;
      int8_product(plan, s, at.count, layout.heads * layout.d_v, int8.proj_offset, int8.proj_stride, layout.channels_out,
                   to_tokens(plan, at, 0));
      return;
    }
  }
  finish_groups(plan, s.o, at.count);
  const ptrdiff_t panels = whole_panels(layout.channels_out) / kPanelColumns;  // proj_panels is 0 where they are empty
  project_panels(plan, at, {0, panels}, s);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
