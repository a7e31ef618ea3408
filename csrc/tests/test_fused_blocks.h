// fused_blocks at one level and dtype: the same bits as its steps one after the other, whoever does which image.
#pragma once

#include <string>

#include "driver.h"
#include "test_ffns.h"

namespace driver {

template <class T>
void test_stack_case(const repavit::Kernels& kernels, repavit::DType dtype, int64_t batch, int64_t tokens, int64_t gap,
                     int ffn_first, const char* level) {
  const std::string name = std::string(level) + " stack B=" + std::to_string(batch) + " T=" + std::to_string(tokens) +
                           " gap=" + std::to_string(gap) + " ffn_first=" + std::to_string(ffn_first);
  constexpr int64_t kChannels = 20, kActive = 12, kHeads = 2, kHead = 10;
  constexpr size_t kWeights = kChannels * kChannels, kFfnWeights = kActive * kChannels;
  const size_t size = static_cast<size_t>(batch * tokens * kChannels);
  Random random(static_cast<uint64_t>(batch * 31 + tokens));
  std::vector<double> unused;
  auto w_qkv = draw<T>(random, 3 * kWeights, 0.2, unused), w_proj = draw<T>(random, kWeights, 0.2, unused);
  auto w_in = draw<T>(random, kFfnWeights, 0.2, unused), w_out = draw<T>(random, kFfnWeights, 0.2, unused);
  const int64_t stride = kChannels + gap;
  auto x = draw<T>(random, static_cast<size_t>(batch * tokens * stride), 1.0, unused);

  const repavit::AttentionShape shape{kChannels, kChannels, kHeads, kHead, kHead};
  Guarded<T> attention(static_cast<size_t>(kernels.rep_attention_packed_bytes[dtype](shape)) / sizeof(T));
  kernels.rep_attention_pack[dtype]({shape, w_qkv.data(), w_proj.data()}, attention.data(), kSerial);
  const int64_t ffn_bytes = kernels.partial_gelu_ffn_packed_bytes[dtype](kChannels, kActive, false);
  Guarded<T> ffn(static_cast<size_t>(ffn_bytes) / sizeof(T));
  kernels.partial_gelu_ffn_pack[dtype]({kChannels, kActive, w_in.data(), nullptr, w_out.data(), nullptr}, ffn.data(), kSerial);

  repavit::StackStep steps[4]{};
  for (const int i : {0, 2}) {
    repavit::RepAttentionArgs& args = steps[i + ffn_first].attention;
    args.shape = shape, args.packed = attention.data();
    args.scale = i == 0 ? -0.3 : 0.3, args.norm_eps = 1e-6, args.norm = repavit::kLayerNorm, args.residual = true;
    args.inner_norm = i == 2, args.inner_norm_eps = 1e-3;
  }
  for (const int i : {1, 3}) {
    repavit::PartialGeluFfnArgs& args = steps[i - ffn_first].ffn;
    args.channels = kChannels, args.active = kActive, args.packed = ffn.data();
    args.norm_eps = 1e-6, args.norm = repavit::kLayerNorm, args.residual = true;
  }

  Guarded<T> wanted(size);
  const T* from = x.data();
  int64_t from_stride = stride;
  for (const repavit::StackStep& step : steps) {
    Guarded<T> y(size);
    if (step.attention.packed != nullptr) {
      repavit::RepAttentionArgs args = step.attention;
      args.batch = batch, args.tokens = tokens, args.x = from, args.x_stride = from_stride, args.y = y.data();
      kernels.rep_attention[dtype](args, kSerial);
    } else {
      repavit::PartialGeluFfnArgs args = step.ffn;
      args.rows = batch * tokens, args.x = from, args.x_stride = from_stride, args.y = y.data();
      kernels.partial_gelu_ffn[dtype](args, kSerial);
    }
    for (size_t i = 0; i < size; ++i) wanted[i] = y[i];
    from = wanted.data();
    from_stride = kChannels;
  }

  for (const repavit::Pool& pool : {kSerial, kThreaded}) {
    Guarded<T> y(size);
    kernels.fused_blocks[dtype]({batch, tokens, kChannels, steps, 4, x.data(), stride, y.data()}, pool);
    expect(y.intact() && x.intact(), "wrote outside the output", name.c_str());
    expect(std::memcmp(y.data(), wanted.data(), size * sizeof(T)) == 0, "is not its steps", name.c_str());
  }
}

template <class T>
void test_stack(const repavit::Kernels& kernels, repavit::DType dtype, const char* level) {
  if (kernels.rep_attention[dtype] == nullptr || kernels.partial_gelu_ffn[dtype] == nullptr) return;
  for (const int64_t batch : {0, 1, 2, 3, 4, 7}) {
    for (const int64_t tokens : {1, 9, 34}) {
      for (const int ffn_first : {0, 1}) {
        test_stack_case<T>(kernels, dtype, batch, tokens, batch % 2 * 3, ffn_first, level);
      }
    }
  }
}

}  // namespace driver
