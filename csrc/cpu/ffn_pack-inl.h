// The packed FFN, plain or gated: where its panels stand, and how they are written and read back.
#pragma once

#include "pack-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

enum class FfnKind { kPlain, kGated };

// Panels of a packed FFN; sizes in elements, offsets from the first panel. C and m may be any numbers: bytes() is kNoSize
// where they are none of an FFN.
template <class T, FfnKind kKind>
struct FfnLayout {
  // Hidden channels of an input panel.
  static constexpr ptrdiff_t kHiddenColumns = kKind == FfnKind::kGated ? kPanelColumns / 2 : kPanelColumns;

  ptrdiff_t channels, active;
  bool has_merged;
  ptrdiff_t in_panels, in_stride;    // w_in, or w_gate and w_up: panels of depth C
  ptrdiff_t out_panels, out_stride;  // [w_out; w_merged]: ceil(C / 32) panels of depth m, then C
  ptrdiff_t merged_offset;           // of w_merged's part within an output panel
  ptrdiff_t out_offset;              // of the first output panel

  FfnLayout(int64_t c, int64_t m, bool merged)
      : channels(static_cast<ptrdiff_t>(c)), active(static_cast<ptrdiff_t>(m)), has_merged(merged) {
    in_stride = checked_panel_elements<T>(channels);
    const int64_t panels = size_quotient(active, kHiddenColumns);
    in_panels = in_stride == 0 && panels >= 0 ? 0 : static_cast<ptrdiff_t>(panels);
    merged_offset = checked_panel_elements<T>(active);
    out_stride = size_sum(merged_offset, merged ? checked_panel_elements<T>(channels) : 0);
    out_panels = checked_panels(channels, out_stride);
    out_offset = size_product(in_panels, in_stride);
  }

  int64_t bytes() const {
    const int64_t elements = size_sum(out_offset, size_product(out_panels, out_stride));
    return size_sum(sizeof(PackedFfnHeader), size_product(sizeof(T), elements));
  }

  // The rows of w_in, or of w_gate and w_up, that are the columns of input panel p.
  template <class W>
  void input_rows(W* w_in, W* w_up, ptrdiff_t p, W* (&rows)[kPanelColumns]) const {
    for (ptrdiff_t c = 0; c < kPanelColumns; ++c) {
      W* w = w_in;
      ptrdiff_t hidden = p * kHiddenColumns + c;
      if constexpr (kKind == FfnKind::kGated) {
        constexpr ptrdiff_t kRun = kGateRun<T>;
        w = c / kRun % 2 == 0 ? w_in : w_up;
        hidden = p * kHiddenColumns + c / (2 * kRun) * kRun + c % kRun;
      }
      rows[c] = hidden < active ? w + hidden * channels : nullptr;
    }
  }
};

template <class T>
REPAVIT_INLINE T* first_panel(void* packed) {
  return reinterpret_cast<T*>(static_cast<char*>(packed) + sizeof(PackedFfnHeader));
}
template <class T>
REPAVIT_INLINE const T* first_panel(const void* packed) {
  return reinterpret_cast<const T*>(static_cast<const char*>(packed) + sizeof(PackedFfnHeader));
}

template <class T, FfnKind kKind>
int64_t ffn_packed_bytes(int64_t channels, int64_t active, bool has_merged) {
  return FfnLayout<T, kKind>(channels, active, has_merged).bytes();
}

// Weights of T to panels of P.
template <class T, FfnKind kKind, class P = T>
void ffn_pack(const FfnWeights& weights, void* destination, const Pool& pool) {
  using Layout = FfnLayout<P, kKind>;
  struct Context {
    Layout layout;
    const T *w_in, *w_up, *w_out, *w_merged;
    P* panels;
  } context{{weights.channels, weights.active, weights.w_merged != nullptr},
            static_cast<const T*>(weights.w_in),
            static_cast<const T*>(weights.w_up),
            static_cast<const T*>(weights.w_out),
            static_cast<const T*>(weights.w_merged),
            first_panel<P>(destination)};
  const Layout& layout = context.layout;

  PackedFfnHeader header{};
  constexpr bool kInt8 = IsSame<P, int8_t>::value, kGated = kKind == FfnKind::kGated;
  const auto& magic = kGated ? (kInt8 ? kPackedInt8GatedFfnMagic : kPackedGatedFfnMagic)
                             : (kInt8 ? kPackedInt8FfnMagic : kPackedFfnMagic);
  __builtin_memcpy(header.magic, magic, sizeof(header.magic));
  header.dtype = kDTypeOf<T>;
  header.has_merged = layout.has_merged;
  header.channels = weights.channels;
  header.active = weights.active;
  header.bytes = layout.bytes();
  __builtin_memcpy(destination, &header, sizeof(header));

  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    const Layout& l = c.layout;
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      if (p < l.in_panels) {
        const T* rows[kPanelColumns];
        l.input_rows(c.w_in, c.w_up, p, rows);
        pack_rows(rows, l.channels, c.panels + p * l.in_stride);
        continue;
      }
      const ptrdiff_t first = (p - l.in_panels) * kPanelColumns;
      P* panel = c.panels + l.out_offset + (p - l.in_panels) * l.out_stride;
      pack_panel(c.w_out, l.channels, l.active, first, panel);
      if (l.has_merged) pack_panel(c.w_merged, l.channels, l.channels, first, panel + l.merged_offset);
    }
  };
  pool.run(layout.in_panels + layout.out_panels, body, &context);
}

template <class T, FfnKind kKind, class P = T>
void ffn_unpack(const void* packed, const FfnMutableWeights& weights, const Pool& pool) {
  using Layout = FfnLayout<P, kKind>;
  PackedFfnHeader header;
  __builtin_memcpy(&header, packed, sizeof(header));
  struct Context {
    Layout layout;
    T *w_in, *w_up, *w_out, *w_merged;
    const P* panels;
  } context{{header.channels, header.active, header.has_merged != 0},
            static_cast<T*>(weights.w_in),
            static_cast<T*>(weights.w_up),
            static_cast<T*>(weights.w_out),
            static_cast<T*>(weights.w_merged),
            first_panel<P>(packed)};

  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    const Layout& l = c.layout;
    for (ptrdiff_t p = static_cast<ptrdiff_t>(begin); p < end; ++p) {
      if (p < l.in_panels) {
        T* rows[kPanelColumns];
        l.input_rows(c.w_in, c.w_up, p, rows);
        unpack_rows(c.panels + p * l.in_stride, l.channels, rows);
        continue;
      }
      const ptrdiff_t first = (p - l.in_panels) * kPanelColumns;
      const P* panel = c.panels + l.out_offset + (p - l.in_panels) * l.out_stride;
      unpack_panel(panel, l.channels, l.active, first, c.w_out);
      if (l.has_merged) unpack_panel(panel + l.merged_offset, l.channels, l.channels, first, c.w_merged);
    }
  };
  pool.run(context.layout.in_panels + context.layout.out_panels, body, &context);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
