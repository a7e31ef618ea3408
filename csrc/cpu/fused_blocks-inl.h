// A run of fused blocks in one call, in place in y.
//
// 1. Images that threads can share out evenly go through all steps one by one, each on one thread with nothing shared.
// 2. The rest, fewer than threads, are split by rows, which keep their owner from step to step: other rows are needed
//    for keys and values alone. Between two forks an owner attends, projects, goes through the FFN and adds its keys and
//    values to the next attention's: one fork per attention, and one more.
// 3. Windows do not follow rows: with them the rest goes step by step.
#pragma once

#include "gated_ffn-inl.h"
#include "partial_gelu_ffn-inl.h"
#include "rep_attention-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

inline void run_serial(int64_t count, Pool::Body body, void* context) { body(context, 0, count); }
constexpr Pool kSerial{1, run_serial};

// The steps, on any images or rows of the call: the first reads x, all others y.
template <class T>
struct Stack {
  const StackArgs& args;

  bool attends(int64_t step) const { return args.steps[step].attention.packed != nullptr; }
  RepAttentionArgs attention(int64_t step, int64_t image, int64_t images) const {
    RepAttentionArgs to = args.steps[step].attention;
    to.batch = images;
    to.tokens = args.tokens;
    const auto skip = [image](const void*& rows, int64_t stride, size_t element) {
      if (rows != nullptr) rows = static_cast<const char*>(rows) + image * stride * static_cast<int64_t>(element);
    };
    skip(to.attn_bias, to.attn_bias_strides[0], sizeof(T));
    skip(to.qk.cos, to.qk.cos_strides[0], sizeof(Accumulator<T>));
    skip(to.qk.sin, to.qk.sin_strides[0], sizeof(Accumulator<T>));
    place(step, image * args.tokens, to);
    return to;
  }
  void run_ffn(int64_t step, int64_t row, int64_t rows, const Pool& pool) const {
    const StackStep& of = args.steps[step];
    if (of.ffn.packed != nullptr) {
      partial_gelu_ffn<T>(ffn(of.ffn, step, row, rows), pool);
    } else {
      gated_ffn<T>(ffn(of.gated, step, row, rows), pool);
    }
  }
  // Whether threads would share the columns of a step's products rather than their rows alone.
  bool splits_columns(int64_t step, int64_t image, int64_t images, int threads) const {
    const StackStep& of = args.steps[step];
    if (attends(step)) {
      const RepAttentionArgs one = attention(step, image, images);
      return AttentionPlan<T>(one, threads).parts > 1;
    }
    if (of.ffn.packed != nullptr ? of.ffn.int8 : of.gated.int8) return false;
    const int64_t rows = images * args.tokens;
    return of.ffn.packed != nullptr ? parts<FfnKind::kPlain>(ffn(of.ffn, step, 0, rows), threads) > 1
                                    : parts<FfnKind::kGated>(ffn(of.gated, step, 0, rows), threads) > 1;
  }
  // Elements of a step's weights.
  double weights(int64_t step) const {
    const StackStep& of = args.steps[step];
    if (attends(step)) return attention_elements(of.attention);
    if (of.ffn.packed != nullptr) return ffn_elements<FfnKind::kPlain>(of.ffn);
    return ffn_elements<FfnKind::kGated>(of.gated);
  }

 private:
  template <FfnKind kKind, class Args>
  static ptrdiff_t parts(const Args& args, int threads) {
    return FfnPlan<T, kKind, Args>(args, threads).parts;
  }
  static double attention_elements(const RepAttentionArgs& of) {
    const auto bytes = static_cast<double>(of.int8 ? AttentionLayout<int8_t>(of.shape).bytes() : AttentionLayout<T>(of.shape).bytes());
    return of.int8 ? bytes : bytes / sizeof(T);
  }
  template <FfnKind kKind>
  static double ffn_elements(const FfnArgs& ffn) {
    if (ffn.int8) return static_cast<double>(FfnLayout<int8_t, kKind>(ffn.channels, ffn.active, ffn.has_merged).bytes());
    return static_cast<double>(FfnLayout<T, kKind>(ffn.channels, ffn.active, ffn.has_merged).bytes()) / sizeof(T);
  }
  template <class Args>
  Args ffn(Args to, int64_t step, int64_t row, int64_t rows) const {
    to.rows = rows;
    place(step, row, to);
    return to;
  }
  template <class Args>
  void place(int64_t step, int64_t row, Args& to) const {
    T* y = static_cast<T*>(args.y) + row * args.channels;
    to.x = step == 0 ? static_cast<const T*>(args.x) + row * args.x_stride : y;
    to.x_stride = step == 0 ? args.x_stride : args.channels;
    to.y = y;
  }
};

template <class T>
void step_by_step(const Stack<T>& stack, int64_t image, int64_t images, const Pool& pool) {
  const int64_t tokens = stack.args.tokens;
  for (int64_t i = 0; i < stack.args.count; ++i) {
    if (stack.attends(i)) {
      rep_attention<T>(stack.attention(i, image, images), pool);
    } else {
      stack.run_ffn(i, image * tokens, images * tokens, pool);
    }
  }
}

// What the owners of some images' rows do between two forks.
template <class T>
struct RowPhase {
  const Stack<T>& stack;
  int64_t image, images;
  ptrdiff_t blocks;        // of rows, of each image
  bool ready;              // step `begin` is an attention whose keys and values are there
  int64_t begin, end;      // steps; `end` is the attention to prepare, or there is none left
  char *memory, *next;     // shared memory of that attention, and of `end`

  // Up to the attention behind `begin`.
  void find_end() {
    end = begin + (ready ? 1 : 0);
    while (end < stack.args.count && !stack.attends(end)) ++end;
  }

  void advance() {
    char* const done = memory;
    memory = next;
    next = done;
    begin = end;
    ready = true;
    find_end();
  }

  void run(ptrdiff_t item) const {
    const ptrdiff_t index = item / blocks, block = item % blocks;
    if (ready) {
      attention(begin, memory, [&](const AttentionPlan<T>& plan, AttentionScratch<T>& scratch) {
        attend_block(plan, index, block, scratch);
      });
    }
    const ptrdiff_t tokens = static_cast<ptrdiff_t>(stack.args.tokens);
    const ptrdiff_t row = row_begin<Operand<T>>(tokens, blocks, block);
    const ptrdiff_t rows = row_begin<Operand<T>>(tokens, blocks, block + 1) - row;
    for (int64_t step = begin + (ready ? 1 : 0); step < end; ++step) {
      stack.run_ffn(step, (image + index) * tokens + row, rows, kSerial);
    }
    if (end == stack.args.count) return;
    attention(end, next, [&](const AttentionPlan<T>& plan, AttentionScratch<T>& scratch) {
      if (item == 0) plan.fill_zero_table();
      prepare_block(plan, index, block, scratch);
    });
  }

 private:
  template <class Body>
  void attention(int64_t step, char* shared, const Body& body) const {
    const RepAttentionArgs args = stack.attention(step, image, images);
    AttentionPlan<T> plan(args, SplitByRows{blocks});
    Carver carver(shared);
    plan.carve_shared(carver);
    AttentionScratch<T> scratch = thread_scratch(plan, plan.length);
    body(plan, scratch);
  }
};

// Threads that a fork pays for, by the products with the weights between two of them.
template <class T>
ptrdiff_t row_owners(const Stack<T>& stack, int64_t images, int threads) {
  double forks = 1.0, weights = 0.0;
  for (int64_t i = 0; i < stack.args.count; ++i) {
    if (stack.attends(i)) forks += 1.0;
    weights += stack.weights(i);
  }
  const double rows = static_cast<double>(images * stack.args.tokens);
  return useful_threads(2.0 * rows * weights / forks, threads);
}

// Bytes that the threads share for the greatest attention.
template <class T>
size_t most_shared(const Stack<T>& stack, int64_t images, ptrdiff_t blocks) {
  size_t most = 0;
  for (int64_t i = 0; i < stack.args.count; ++i) {
    if (!stack.attends(i)) continue;
    const RepAttentionArgs args = stack.attention(i, 0, images);
    Carver count;
    AttentionPlan<T>(args, SplitByRows{blocks}).carve_shared(count);
    if (count.bytes() > most) most = count.bytes();
  }
  return most;
}

template <class T>
void row_by_row(const Stack<T>& stack, int64_t image, int64_t images, const Pool& pool) {
  const ptrdiff_t owners = row_owners(stack, images, pool.threads);
  const ptrdiff_t blocks = row_blocks<Operand<T>>(static_cast<ptrdiff_t>(stack.args.tokens), images, owners);
  const size_t bytes = most_shared(stack, images, blocks);
  char* const memory = static_cast<char*>(shared_arena(2 * bytes));
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const RowPhase<T>& phase = *static_cast<const RowPhase<T>*>(raw);
    for (int64_t item = begin; item < end; ++item) phase.run(static_cast<ptrdiff_t>(item));
  };
  RowPhase<T> phase{stack, image, images, blocks, false, 0, 0, memory, memory + bytes};
  for (phase.find_end(); phase.begin < stack.args.count; phase.advance()) {
    pool.run(images * blocks, body, &phase);
  }
}

// fused_blocks_<T>: see StackArgs.
template <class T>
void fused_blocks(const StackArgs& args, const Pool& pool) {
  if (args.batch == 0 || args.tokens == 0 || args.channels == 0) return;
  const Stack<T> stack{args};
  struct Context {
    const Stack<T>& stack;
    int64_t images_each, together;
  } context{stack, args.batch / pool.threads, args.tokens < kImageRows ? kImageRows / args.tokens : 1};
  const auto whole = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    const int64_t last = end * c.images_each;
    for (int64_t image = begin * c.images_each; image < last; image += c.together) {
      step_by_step(c.stack, image, c.together < last - image ? c.together : last - image, kSerial);
    }
  };
  if (context.images_each > 0) pool.run(pool.threads, whole, &context);

  const int64_t done = pool.threads * context.images_each, rest = args.batch - done;
  if (rest == 0) return;
  bool apart = false;  // steps whose threads share more than a fork from attention to attention lets them
  for (int64_t i = 0; i < args.count; ++i) {
    apart |= args.steps[i].attention.windows != nullptr || stack.splits_columns(i, done, rest, pool.threads);
  }
  if (apart) {
    step_by_step(stack, done, rest, pool);
  } else {
    row_by_row(stack, done, rest, pool);
  }
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
