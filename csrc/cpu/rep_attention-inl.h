// rep_attention and window_rep_attention: norm, q k v, attention, projection and residual in one call.
//
// 1. One head at a time goes from its product through packing to its attention, so that q, k and v are still in cache.
// 2. LayerNorm gathers the rows of a sequence into scratch and the projection's epilogue scatters them back: windows need
//    no other copy.
// 3. Threads own sequences, or blocks of rows of one, or parts of its heads and columns (attention_plan-inl.h); forks follow
//    each other, nothing waits.
// 4. Without weights q, k and v come from outer memory and o goes there: while one head attends, the lines of the next are
//    asked for.
#pragma once

#include "attention_rows-inl.h"

namespace repavit {
namespace REPAVIT_ISA {

// `count` whole sequences from `sequence` on, with weights.
template <class T>
void attend_whole(const AttentionPlan<T>& plan, ptrdiff_t sequence, ptrdiff_t count, AttentionScratch<T>& s) {
  const Tokens<T> at = locate(plan, sequence, 0, count * plan.length, s.tokens);
  gather_input(plan, at, s);
  const auto panels = plan.head_panels(s.keys, s.values);
  for (ptrdiff_t head = 0; head < plan.layout.heads; ++head) {
    const auto rows = head_rows(plan, head, at, s, s.qkv);
    for (ptrdiff_t i = 0; i < count; ++i) {
      const ptrdiff_t first = i * plan.length;
      pack_keys(rows.k.from(first), 0, plan.length, panels);
      pack_values(rows.v.from(first), 0, plan.length, panels);
      const ScoreBias<T> bias = score_bias(plan, sequence + i, head, s);
      attend_rows(plan, head, panels, rows.q.from(first), plan.length, bias, at, first, s);
    }
  }
  project_output(plan, at, s);
}

// Asks for q, k and v of a head and for where its o goes.
template <class T>
void fetch_head(const AttentionLayout<T>& layout, ptrdiff_t head, FetchRows& fetch) {
  const auto want = [&](FetchRows::Side side, ptrdiff_t column, ptrdiff_t columns) {
    constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));
    fetch.want(side, column * kSize, columns * kSize);
  };
  for (ptrdiff_t i = 0; i < 2; ++i) want(FetchRows::kInput, layout.qkv_row(head, i * layout.d_qk), layout.d_qk);
  want(FetchRows::kInput, layout.qkv_row(head, 2 * layout.d_qk), layout.d_v);
  want(FetchRows::kResult, head * layout.d_v, layout.d_v);
}

// Whole items [begin, end) without weights: a head each.
template <class T>
void attend_heads(const AttentionPlan<T>& plan, ptrdiff_t begin, ptrdiff_t end, AttentionScratch<T>& s) {
  const auto panels = plan.head_panels(s.keys, s.values);
  FetchRows& fetch = s.attend.fetch;
  Tokens<T> at = locate(plan, plan.sequence_of(begin), 0, plan.length, s.tokens);
  fetch.follow(at.x, at.y, at.count);
  for (ptrdiff_t item = begin; item < end; ++item) {
    const ptrdiff_t sequence = plan.sequence_of(item), head = plan.first_head(item);
    Tokens<T> next = at;
    fetch.forget();
    if (item + 1 < end) {
      if (plan.sequence_of(item + 1) != sequence) {
        next = locate(plan, sequence + 1, 0, plan.length, s.next_tokens);
        fetch.follow(next.x, next.y, next.count);
        ptrdiff_t* const tokens = s.tokens;
        s.tokens = s.next_tokens;
        s.next_tokens = tokens;
      }
      fetch_head(plan.layout, plan.first_head(item + 1), fetch);
    }
    const auto rows = head_rows(plan, head, at, s, s.qkv);
    pack_keys(rows.k, 0, plan.length, panels);
    pack_values(rows.v, 0, plan.length, panels);
    attend_rows(plan, head, panels, rows.q, plan.length, score_bias(plan, sequence, head, s), at, 0, s);
    at = next;
  }
}

// Heads [first, last) of an item.
struct HeadRange {
  ptrdiff_t first, last;
};

// One block of rows of the split item `index`: its keys and values of some heads join the shared panels. z is in scratch.
template <class T>
void prepare_heads(const AttentionPlan<T>& plan, ptrdiff_t index, ptrdiff_t block, HeadRange heads, const Tokens<T>& at,
                   AttentionScratch<T>& s) {
  const ptrdiff_t begin = plan.block_begin(block), end = begin + at.count, item = plan.whole + index;
  for (ptrdiff_t i = heads.first; i < heads.last; ++i) {
    const auto rows = head_rows(plan, plan.first_head(item) + i, at, s, s.qkv);
    pack_keys(rows.k, begin, end, plan.shared_panels(index, i));
    pack_values(rows.v, begin, end, plan.shared_panels(index, i));
    if (auto* q = plan.shared_q(index, i)) {  // k and v are not wanted any more
      for (ptrdiff_t r = 0; r < end - begin; ++r) {
        copy_elements(rows.q[r], q + (begin + r) * plan.q_stride, plan.layout.d_qk);
      }
    }
  }
}

// One block of rows of the split item `index` attends by some heads, once all their panels are there. o is in scratch.
template <class T>
void attend_split_heads(const AttentionPlan<T>& plan, ptrdiff_t index, ptrdiff_t block, HeadRange heads,
                        const Tokens<T>& at, AttentionScratch<T>& s) {
  using E = typename AttentionPlan<T>::E;
  const ptrdiff_t begin = plan.block_begin(block), item = plan.whole + index, sequence = plan.sequence_of(item);
  for (ptrdiff_t i = heads.first; i < heads.last; ++i) {
    const ptrdiff_t head = plan.first_head(item) + i;
    TokenRows<const E> q;
    if (const E* shared = plan.shared_q(index, i)) {
      q = {shared + begin * plan.q_stride, plan.q_stride};
    } else {
      q = head_rows(plan, head, at, s, static_cast<E*>(nullptr)).q;
    }
    attend_rows(plan, head, plan.shared_panels(index, i), q, at.count, score_bias(plan, sequence, head, s).from(begin), at,
                0, s);
  }
}

// The rows of a block of the split item `index`.
template <class T>
Tokens<T> locate_block(const AttentionPlan<T>& plan, ptrdiff_t index, ptrdiff_t block, AttentionScratch<T>& s) {
  const ptrdiff_t begin = plan.block_begin(block), end = plan.block_begin(block + 1);
  return locate(plan, plan.sequence_of(plan.whole + index), begin, end - begin, s.tokens);
}

// What the owner of a block of rows does before all blocks' keys and values are there, and then.
template <class T>
void prepare_block(const AttentionPlan<T>& plan, ptrdiff_t index, ptrdiff_t block, AttentionScratch<T>& s) {
  const Tokens<T> at = locate_block(plan, index, block, s);
  if (plan.projects()) gather_input(plan, at, s);
  prepare_heads(plan, index, block, {0, plan.heads}, at, s);
}
template <class T>
void attend_block(const AttentionPlan<T>& plan, ptrdiff_t index, ptrdiff_t block, AttentionScratch<T>& s) {
  const Tokens<T> at = locate_block(plan, index, block, s);
  attend_split_heads(plan, index, block, {0, plan.heads}, at, s);
  project_output(plan, at, s);
}

// The same in steps of which each wants what others did in the one before: z of some rows, a part of the heads, the norm of
// some rows of o, a part of the columns.
enum class SharedStep { kInput, kPrepare, kAttend, kNorm, kProject };

template <class T>
void shared_step(const AttentionPlan<T>& plan, SharedStep step, ptrdiff_t index, ptrdiff_t block, ptrdiff_t part,
                 AttentionScratch<T>& s) {
  if (step == SharedStep::kInput || step == SharedStep::kNorm) {
    const ptrdiff_t pieces = plan.blocks * plan.parts, piece = block * plan.parts + part;
    const ptrdiff_t begin = plan.length * piece / pieces, end = plan.length * (piece + 1) / pieces;
    s.z = plan.z + (index * plan.length + begin) * plan.z_stride;
    s.o = plan.o + (index * plan.length + begin) * plan.o_stride;
    if (step == SharedStep::kNorm) return norm_values(plan, end - begin, s);
    gather_input(plan, locate(plan, plan.sequence_of(plan.whole + index), begin, end - begin, s.tokens), s);
    return finish_groups(plan, s.o, end - begin);
  }
  const Tokens<T> at = locate_block(plan, index, block, s);
  const ptrdiff_t row = index * plan.length + plan.block_begin(block), each = plan.heads / plan.parts;
  const HeadRange heads{part * each, (part + 1) * each};
  s.z = plan.z + row * plan.z_stride;
  s.o = plan.o + row * plan.o_stride;
  if (step == SharedStep::kPrepare) prepare_heads(plan, index, block, heads, at, s);
  if (step == SharedStep::kAttend) attend_split_heads(plan, index, block, heads, at, s);
  if (step == SharedStep::kProject) project_panels(plan, at, panels_of(plan.layout.proj_panels, plan.parts, part), s);
}

// Runs `step(plan, begin, end, scratch)` for ranges of `count`; a thread asks for its scratch once.
template <class T, class Step>
void for_ranges(const AttentionPlan<T>& plan, const Pool& pool, ptrdiff_t count, ptrdiff_t rows, const Step& step) {
  struct Context {
    const AttentionPlan<T>& plan;
    ptrdiff_t rows;
    const Step& step;
  } context{plan, rows, step};
  const auto body = [](void* raw, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(raw);
    AttentionScratch<T> scratch = thread_scratch(c.plan, c.rows);
    c.step(c.plan, static_cast<ptrdiff_t>(begin), static_cast<ptrdiff_t>(end), scratch);
  };
  if (count > 0) pool.run(count, body, &context);
}

// All split items by shared steps; steps `first` to `last` follow each other in one fork.
template <class T>
void run_shared_steps(const AttentionPlan<T>& plan, const Pool& pool) {
  const auto run = [&](SharedStep first, SharedStep last) {
    const auto fork = [=](const AttentionPlan<T>& p, ptrdiff_t begin, ptrdiff_t end, AttentionScratch<T>& s) {
      for (ptrdiff_t i = begin; i < end; ++i) {
        const ptrdiff_t block = i / p.parts;
        for (int step = static_cast<int>(first); step <= static_cast<int>(last); ++step) {
          shared_step(p, static_cast<SharedStep>(step), block / p.blocks, block % p.blocks, i % p.parts, s);
        }
      }
    };
    for_ranges(plan, pool, plan.split * plan.blocks * plan.parts, plan.length, fork);
  };
  run(SharedStep::kInput, SharedStep::kInput);
  if (plan.blocks == 1) {  // then a head's keys and values have one owner
    run(SharedStep::kPrepare, SharedStep::kAttend);
  } else {
    run(SharedStep::kPrepare, SharedStep::kPrepare);
    run(SharedStep::kAttend, SharedStep::kAttend);
  }
  if (plan.args.inner_norm) run(SharedStep::kNorm, SharedStep::kNorm);
  run(SharedStep::kProject, SharedStep::kProject);
}

// (window_)rep_attention_<T>: see RepAttentionArgs.
template <class T>
void rep_attention(const RepAttentionArgs& args, const Pool& pool) {
  if (args.batch == 0 || args.tokens == 0) return;
  AttentionPlan<T> plan(args, pool.threads);
  Carver count;
  plan.carve_shared(count);
  Carver carver(shared_arena(count.bytes()));
  plan.carve_shared(carver);
  plan.fill_zero_table();

  const auto whole = [](const AttentionPlan<T>& p, ptrdiff_t begin, ptrdiff_t end, AttentionScratch<T>& s) {
    if (!p.projects()) return attend_heads(p, begin, end, s);
    for (ptrdiff_t i = begin; i < end; ++i) attend_whole(p, i * p.group, least(p.group, p.whole - i * p.group), s);
  };
  const auto prepare = [](const AttentionPlan<T>& p, ptrdiff_t begin, ptrdiff_t end, AttentionScratch<T>& s) {
    for (ptrdiff_t i = begin; i < end; ++i) prepare_block(p, i / p.blocks, i % p.blocks, s);
  };
  const auto finish = [](const AttentionPlan<T>& p, ptrdiff_t begin, ptrdiff_t end, AttentionScratch<T>& s) {
    for (ptrdiff_t i = begin; i < end; ++i) attend_block(p, i / p.blocks, i % p.blocks, s);
  };
  const ptrdiff_t blocks = plan.split * plan.blocks;
  for_ranges(plan, pool, (plan.whole + plan.group - 1) / plan.group, plan.group * plan.length, whole);
  if (plan.parts > 1) return run_shared_steps(plan, pool);
  for_ranges(plan, pool, blocks, plan.length, prepare);
  for_ranges(plan, pool, blocks, plan.length, finish);
}

}  // namespace REPAVIT_ISA
}  // namespace repavit
