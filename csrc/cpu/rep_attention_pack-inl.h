// The packed attention block: where its panels stand, and how they are written and read back.
#pragma once

#include "pack-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// Panels of a packed attention block; sizes in elements, offsets from the first panel. The shape may be of any numbers:
// bytes() is kNoSize where they are none of an attention block.
template <class T>
struct AttentionLayout {
  ptrdiff_t channels, channels_out, heads, d_qk, d_v;
  ptrdiff_t head_columns;                // 2 d_qk + d_v: a head's q | k | v
  ptrdiff_t head_panels, qkv_stride;     // ceil(head_columns / 32) panels of depth C per head
  ptrdiff_t proj_panels, proj_stride;    // ceil(C_out / 32) panels of depth h d_v
  ptrdiff_t head_stride, proj_offset;    // from head to head; of the first panel of w_proj

  explicit AttentionLayout(const AttentionShape& shape)
      : channels(static_cast<ptrdiff_t>(shape.channels)),
        channels_out(static_cast<ptrdiff_t>(shape.channels_out)),
        heads(static_cast<ptrdiff_t>(shape.heads)),
        d_qk(static_cast<ptrdiff_t>(shape.d_qk)),
        d_v(static_cast<ptrdiff_t>(shape.d_v)) {
    head_columns = size_sum(size_product(2, d_qk), d_v);
    qkv_stride = checked_panel_elements<T>(channels);
    head_panels = checked_panels(head_columns, qkv_stride);
    proj_stride = checked_panel_elements<T>(size_product(heads, d_v));
    proj_panels = checked_panels(channels_out, proj_stride);
    head_stride = size_product(head_panels, qkv_stride);
    proj_offset = size_product(heads, head_stride);
  }

  int64_t bytes() const {
    const int64_t elements = size_sum(proj_offset, size_product(proj_panels, proj_stride));
    return size_sum(sizeof(PackedAttentionHeader), size_product(sizeof(T), elements));
  }

  // Row of w_qkv, or element of b_qkv, that is column `column` of a head.
  ptrdiff_t qkv_row(ptrdiff_t head, ptrdiff_t column) const {
    if (column < d_qk) return head * d_qk + column;
    if (column < 2 * d_qk) return (heads + head) * d_qk + column - d_qk;
    return 2 * heads * d_qk + head * d_v + column - 2 * d_qk;
  }

  // The rows of w that panel `panel` of w_qkv's holds.
  template <class W>
  void qkv_panel_rows(W* w, ptrdiff_t panel, W* (&rows)[kPanelColumns]) const {
    const ptrdiff_t head = panel / head_panels, first = panel % head_panels * kPanelColumns;
    for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
      rows[c] = first + c < head_columns ? w + qkv_row(head, first + c) * channels : nullptr;
    }
  }

  static const T* panels(const void* packed) {
    return reinterpret_cast<const T*>(static_cast<const char*>(packed) + sizeof(PackedAttentionHeader));
  }
};

template <class T>
int64_t rep_attention_packed_bytes(const AttentionShape& shape) {
  return AttentionLayout<T>(shape).bytes();
}

// Weights of T to panels of P.
template <class T, class P = T>
void rep_attention_pack(const AttentionWeights& weights, void* destination, const Pool& pool) {
  struct Context {
    AttentionLayout<P> layout;
    const T *w_qkv, *w_proj;
    P* panels;
  } context{AttentionLayout<P>(weights.shape), static_cast<const T*>(weights.w_qkv),
            static_cast<const T*>(weights.w_proj), const_cast<P*>(AttentionLayout<P>::panels(destination))};

  PackedAttentionHeader header{};
  const auto& magic = IsSame<P, int8_t>::value ? kPackedInt8AttentionMagic : kPackedAttentionMagic;
  __builtin_memcpy(header.magic, magic, sizeof(header.magic));
  header.dtype = kDTypeOf<T>;
  header.heads = static_cast<int32_t>(weights.shape.heads);
  header.channels = weights.shape.channels;
  header.d_qk = weights.shape.d_qk;
  header.d_v = weights.shape.d_v;
  header.channels_out = weights.shape.channels_out;
  header.bytes = context.layout.bytes();
  __builtin_memcpy(destination, &header, sizeof(header));

  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    const AttentionLayout<P>& l = c.layout;
    const ptrdiff_t qkv_panels = l.heads * l.head_panels;
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      if (p < qkv_panels) {
        const T* rows[kPanelColumns];
        l.qkv_panel_rows(c.w_qkv, p, rows);
        pack_rows(rows, l.channels, c.panels + p * l.qkv_stride);
      } else {
        pack_panel(c.w_proj, l.channels_out, l.heads * l.d_v, (p - qkv_panels) * kPanelColumns,
                   c.panels + l.proj_offset + (p - qkv_panels) * l.proj_stride);
      }
    }
  };
  pool.run(context.layout.heads * context.layout.head_panels + context.layout.proj_panels, body, &context);
}

template <class T, class P = T>
void rep_attention_unpack(const void* packed, const AttentionMutableWeights& weights, const Pool& pool) {
  PackedAttentionHeader header;
  __builtin_memcpy(&header, packed, sizeof(header));
  struct Context {
    AttentionLayout<P> layout;
    T *w_qkv, *w_proj;
    const P* panels;
  } context{AttentionLayout<P>({header.channels, header.channels_out, header.heads, header.d_qk, header.d_v}),
            static_cast<T*>(weights.w_qkv), static_cast<T*>(weights.w_proj), AttentionLayout<P>::panels(packed)};

  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    const AttentionLayout<P>& l = c.layout;
    const ptrdiff_t qkv_panels = l.heads * l.head_panels;
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      if (p < qkv_panels) {
        T* rows[kPanelColumns];
        l.qkv_panel_rows(c.w_qkv, p, rows);
        unpack_rows(c.panels + p * l.qkv_stride, l.channels, rows);
      } else {
        unpack_panel(c.panels + l.proj_offset + (p - qkv_panels) * l.proj_stride, l.channels_out, l.heads * l.d_v,
                     (p - qkv_panels) * kPanelColumns, c.w_proj);
      }
    }
  };
  pool.run(context.layout.heads * context.layout.head_panels + context.layout.proj_panels, body, &context);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
