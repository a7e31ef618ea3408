// y = mean over tokens of norm(x) [Wᵀ + bias] per image: a classifier's end, on the tokens that it looks at.
//
// As many rows as images meet the weights, far fewer than a tile of the product has: so the weights are read where they
// stand, once, each by the thread that owns its output.
#pragma once

#include "arena.h"
#include "layernorm-inl.h"
#include "owners-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

template <class T>
struct PooledHead {
  using S = SimdOf<T>;
  using V = typename S::V;
  using A = Accumulator<T>;
  const PooledHeadArgs& args;
  ptrdiff_t channels;
  A* pooled;  // [batch, channels]

  // The mean of one image, in its row of `pooled`.
  void pool(ptrdiff_t image, A* row) const {
    A* const mean = pooled + image * channels;
    const T* x = static_cast<const T*>(args.x) + (image * args.tokens + args.first) * channels;
    for (int64_t t = 0; t < args.count; ++t, x += channels) {
      A* const out = t == 0 ? mean : row;
      if (args.normalize) {
        layer_norm_row(x, out, channels, args.norm_eps);
      } else {
        convert_row(x, out, channels);
      }
      if (t == 0) continue;
      for_each_vector(row, channels, [&](V v, ptrdiff_t i, int n)
                                         __attribute__((always_inline)) { add(mean + i, v, n); });
    }
    finish(mean);
  }

  // Outputs [begin, end) of all images.
  void project(ptrdiff_t begin, ptrdiff_t end) const {
    ptrdiff_t n = begin;
    for (; n + 4 <= end; n += 4) each_image<4>(n);
    for (; n < end; ++n) each_image<1>(n);
  }

 private:
  static REPAVIT_INLINE void add(A* sum, V v, int n) { store_some<S>(sum, S::load(sum, n) + v, n); }

  void finish(A* mean) const {
    const V share = S::broadcast(A{1} / static_cast<A>(args.count));
    const Affine<T> affine{static_cast<const T*>(args.norm_weight), static_cast<const T*>(args.norm_bias)};
    for_each_vector(mean, channels, [&](V v, ptrdiff_t i, int n) __attribute__((always_inline)) {
      v *= share;
      store_some<S>(mean + i, args.normalize ? affine(v, i, n) : v, n);
    });
  }

  template <int kOutputs>
  void each_image(ptrdiff_t n) const {
    const ptrdiff_t images = static_cast<ptrdiff_t>(args.batch);
    ptrdiff_t image = 0;
    for (; image + 4 <= images; image += 4) dots<4, kOutputs>(image, n);
    for (; image < images; ++image) dots<1, kOutputs>(image, n);
  }

  template <int kImages, int kOutputs>
  void dots(ptrdiff_t image, ptrdiff_t n) const {
    const T* w = static_cast<const T*>(args.weight) + n * channels;
    const A* z = pooled + image * channels;
    V sums[kImages][kOutputs];
    REPAVIT_UNROLL
    for (int m = 0; m < kImages; ++m) {
      REPAVIT_UNROLL
      for (int o = 0; o < kOutputs; ++o) sums[m][o] = S::zero();
    }
    const auto step = [&](ptrdiff_t k, const auto& load) __attribute__((always_inline)) {
      V right[kOutputs];
      REPAVIT_UNROLL
      for (int o = 0; o < kOutputs; ++o) right[o] = load(w + o * channels + k);
      REPAVIT_UNROLL
      for (int m = 0; m < kImages; ++m) {
        const V left = load(z + m * channels + k);
        REPAVIT_UNROLL
        for (int o = 0; o < kOutputs; ++o) sums[m][o] = S::fma(left, right[o], sums[m][o]);
      }
    };
    ptrdiff_t k = 0;
    for (; k + S::kLanes <= channels; k += S::kLanes) {
      step(k, [](const auto* p) __attribute__((always_inline)) { return S::load(p); });
    }
    const int rest = static_cast<int>(channels - k);
    if (rest > 0) step(k, [rest](const auto* p) __attribute__((always_inline)) { return S::load(p, rest); });

    for (int m = 0; m < kImages; ++m) {
      for (int o = 0; o < kOutputs; ++o) {
        A sum = S::sum(sums[m][o]);
        if (args.bias != nullptr) sum += element(static_cast<const T*>(args.bias) + n + o);
        S::store(static_cast<T*>(args.y) + (image + m) * args.outputs + n + o, S::broadcast(sum), 1);
      }
    }
  }

  static A element(const T* p) {
    A lanes[S::kLanes];
    S::store(lanes, S::load(p, 1));
    return lanes[0];
  }
};

// pooled_head_<T>: see PooledHeadArgs.
template <class T>
void pooled_head(const PooledHeadArgs& args, const Pool& pool) {
  if (args.batch == 0) return;
  using A = Accumulator<T>;
  const ptrdiff_t channels = static_cast<ptrdiff_t>(args.channels);
  const size_t bytes = sizeof(A) * static_cast<size_t>(args.batch * channels);
  const PooledHead<T> head{args, channels, static_cast<A*>(shared_arena(bytes))};
  struct Context {
    const PooledHead<T>& head;
    int64_t items, owners;
  };
  const auto share = [&](int64_t items, double operations, Pool::Body body) {
    if (items == 0) return;
    const ptrdiff_t useful = useful_threads(operations, pool.threads);
    Context context{head, items, least(useful, static_cast<ptrdiff_t>(items))};
    pool.run(context.owners, body, &context);
  };
  const double elements = static_cast<double>(args.batch) * static_cast<double>(channels);
  const int64_t pooled_images = channels > 0 ? args.batch : 0;  // or all their tokens would be visited for nothing
  share(pooled_images, 8.0 * elements * static_cast<double>(args.count), [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    A* row = static_cast<A*>(thread_arena(sizeof(A) * static_cast<size_t>(c.head.channels)));
    for (int64_t i = c.items * begin / c.owners; i < c.items * end / c.owners; ++i) c.head.pool(i, row);
  });
  if (args.weight == nullptr) {
    for (int64_t i = 0; i < args.batch; ++i) {
      convert_row(head.pooled + i * channels, static_cast<T*>(args.y) + i * channels, channels);
    }
    return;
  }
  if (args.outputs == 0) return;
  share(args.outputs, 2.0 * elements * static_cast<double>(args.outputs), [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    c.head.project(c.items * begin / c.owners, c.items * end / c.owners);
  });
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
