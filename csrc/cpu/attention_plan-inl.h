// One call of (window_)rep_attention as every thread sees it: shapes, who does what, and how scratch is divided.
//
// A sequence is what attends to itself: an image or a window. An item is a sequence with all its heads or, without
// weights, which all heads would share, with one of them. As long as there are enough items, a thread takes them whole,
// with nothing shared ("whole"). The remaining few are split by rows ("split"): first every block of rows adds its keys
// and values to shared panels, then every block attends and projects. Where blocks would be of few rows, whose products do
// not outlast the reading of the weights, blocks are larger, and threads have a part of the heads and columns each.
#pragma once

#include "arena.h"
#include "owners-inl.h"
#include "rep_attention_pack-inl.h"
#include "windows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Rows of short sequences that meet each panel of weights together: seven tiles of 14 of windows, and of images about as
// many as most models have in one.
constexpr ptrdiff_t kWindowRows = 98, kImageRows = 200;

// Asks for every sequence to be split into so many blocks.
struct SplitByRows {
  ptrdiff_t blocks;
};

template <class T>
struct AttentionPlan {
  using E = Operand<T>;  // of all that is kept between the products: z, q, k, v, the softmax's weights and o
  using A = Accumulator<T>;

  const RepAttentionArgs& args;
  AttentionLayout<T> layout;
  const T* panels;                // of weights of T; null: of int8, or the attention alone
  AttentionLayout<int8_t> int8_layout;
  const int8_t* int8_panels;      // of weights of int8, or null
  Windows<T> windows;             // read when args.windows
  ptrdiff_t length;               // tokens of a sequence
  ptrdiff_t heads;                // of an item
  ptrdiff_t whole, split;         // items done whole, and by rows
  ptrdiff_t group;                // whole items done together
  ptrdiff_t blocks;               // blocks of rows of a split item
  ptrdiff_t parts = 1;            // of its heads, and of the projection's columns; more than one: threads share z and o
  ptrdiff_t z_stride, qkv_stride, q_stride, o_stride;

  // Shared by the threads: a row of zeros, z and o of split items, and per split item and head q and panels.
  A* zeros = nullptr;
  E* z = nullptr;
  E* o = nullptr;
  E* q = nullptr;
  E* keys = nullptr;
  E* values = nullptr;

  AttentionPlan(const RepAttentionArgs& a, int threads) : AttentionPlan(a, SplitByRows{1}) { share_work(threads); }

  AttentionPlan(const RepAttentionArgs& a, SplitByRows by_rows)
      : args(a), layout(a.shape),
        panels(a.packed != nullptr && !a.int8 ? AttentionLayout<T>::panels(a.packed) : nullptr), int8_layout(a.shape),
        int8_panels(a.packed != nullptr && a.int8 ? AttentionLayout<int8_t>::panels(a.packed) : nullptr),
        windows(a.windows != nullptr ? *a.windows : kNoWindows),
        length(a.windows != nullptr ? windows.tokens : static_cast<ptrdiff_t>(a.tokens)),
        heads(projects() ? layout.heads : 1), whole(0), split(items()), group(1), blocks(by_rows.blocks) {
    z_stride = scratch_stride<E>(layout.channels);
    qkv_stride = scratch_stride<E>(layout.head_columns);
    q_stride = scratch_stride<E>(layout.d_qk);
    o_stride = scratch_stride<E>(layout.heads * layout.d_v);
  }

  // Whether there are weights, of either kind, and not the attention alone.
  bool projects() const { return args.packed != nullptr; }

  bool windowed() const { return args.windows != nullptr; }
  ptrdiff_t items() const {
    return static_cast<ptrdiff_t>(args.batch) * (windowed() ? windows.per_image() : 1) * (layout.heads / heads);
  }
  ptrdiff_t sequence_of(ptrdiff_t item) const { return item * heads / layout.heads; }
  ptrdiff_t first_head(ptrdiff_t item) const { return item * heads % layout.heads; }
  // q, k and v are read where they stand, with no scratch of their own.
  bool in_place() const { return !projects() && IsSame<T, E>::value; }
  // Without a bias, a scale that is not positive would make the least score the greatest.
  bool zero_table() const { return !windowed() && args.attn_bias == nullptr && !(static_cast<A>(args.scale * kLog2EExact) > 0); }

  ptrdiff_t table_stride() const { return windowed() ? windows.table_stride : scratch_stride<A>(length); }
  // Bias tables of the heads, then masks of the classes but the first, which has none.
  ptrdiff_t table_count() const { return windowed() ? layout.heads + windows.classes() - 1 : 0; }
  ptrdiff_t table_elements() const { return length * table_stride(); }
  ptrdiff_t block_begin(ptrdiff_t block) const { return row_begin<E>(length, blocks, block); }

  HeadPanels<E> head_panels(E* k, E* v) const { return {length, layout.d_qk, layout.d_v, k, v}; }
  ptrdiff_t key_elements() const { return HeadPanels<E>::key_elements(length, layout.d_qk); }
  ptrdiff_t value_elements() const { return HeadPanels<E>::value_elements(length, layout.d_v); }

  // Panels and q of split item `index`, of head `i` of its heads.
  HeadPanels<E> shared_panels(ptrdiff_t index, ptrdiff_t i) const {
    const ptrdiff_t at = index * heads + i;
    return head_panels(keys + at * key_elements(), values + at * value_elements());
  }
  E* shared_q(ptrdiff_t index, ptrdiff_t i) const {
    return q != nullptr ? q + (index * heads + i) * length * q_stride : nullptr;
  }

  void carve_shared(Carver& carver) {
    const ptrdiff_t count = split * heads;
    zeros = carver.take<A>(zero_table() ? table_stride() : 0);
    keys = carver.take<E>(count * key_elements());
    values = carver.take<E>(count * value_elements());
    q = in_place() ? nullptr : carver.take<E>(count * length * q_stride);
    if (parts == 1) return;
    z = carver.take<E>(split * length * z_stride);
    o = carver.take<E>(split * length * o_stride);
  }

  void fill_zero_table() const {
    if (!zero_table()) return;
    for (ptrdiff_t j = 0; j < table_stride(); ++j) zeros[j] = j < length ? 0 : kMasked<A>;
  }

 private:
  static constexpr WindowGrid kNoWindows{{0, 0}, {1, 1}, {0, 0}, false, nullptr, nullptr};

  void share_work(int threads) {
    constexpr ptrdiff_t kManyPerThread = 8;               // one item more or less is then no imbalance
    const ptrdiff_t n = items();
    const double width = static_cast<double>(heads * layout.head_columns);
    const double depth = static_cast<double>((projects() ? layout.channels : 0) + length);
    const double projected = static_cast<double>(layout.channels_out) * static_cast<double>(heads * layout.d_v);
    const double rows = static_cast<double>(length) * static_cast<double>(n);
    const ptrdiff_t owners = useful_threads(2.0 * rows * (width * depth + projected), threads);
    split = n >= kManyPerThread * owners ? 0 : n % owners;
    whole = n - split;
    const ptrdiff_t each = whole / owners;
    group = projects() ? least((windowed() ? kWindowRows : kImageRows) / length, each) : 1;
    while (group > 1 && each < kManyPerThread && each % group != 0) --group;
    if (group < 1) group = 1;
    const auto fits = [&](ptrdiff_t n) { return n == 1 || (layout.heads % n == 0 && n <= layout.proj_panels); };
    if (split > 0 && panels != nullptr) parts = column_parts(layout.bytes(), split * length, owners, fits);
    blocks = row_blocks<E>(length, split, owners / parts);
  }
};

}  // namespace REPAVIT_ISA
}  // namespace repavit
