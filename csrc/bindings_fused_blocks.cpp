// Binding of fused_blocks for the CPU: reads the plan that repavit_ops/stack_plan.py writes (see bindings_common.h).
#include <deque>

#include "bindings_common.h"

namespace {

using namespace repavit_bindings;

// One step of the plan. Fields, and how many tensors a step has, as repavit_ops/stack_plan.py has them.
struct Step {
  static constexpr size_t kTensors = 7, kIntegers = 9, kScalars = 2;
  enum Kind : int64_t { kFfn, kAttention, kWindowAttention, kPatches, kTokens, kHead };
  const MaybeTensor* tensors;
  const int64_t* integers;
  const double* scalars;

  int64_t kind() const { return integers[0]; }
  bool in_block() const { return kind() >= kFfn && kind() <= kWindowAttention; }
  bool residual() const { return integers[1] != 0; }
  // Of an FFN GELU by tanh, of windows roll first, of patches channels last, of tokens as a map.
  bool flag() const { return integers[2] != 0; }
  int64_t heads() const { return integers[3]; }
  int64_t d_qk() const { return integers[4]; }
  std::vector<int64_t> window() const { return {integers[5], integers[6]}; }
  std::vector<int64_t> shift() const { return {integers[7], integers[8]}; }
  std::vector<int64_t> patch() const { return window(); }
  int64_t first() const { return integers[3]; }
  int64_t count() const { return integers[4]; }
  double scale() const { return scalars[0]; }
  std::optional<double> norm_eps() const { return scalars[1] < 0 ? std::nullopt : std::optional<double>(scalars[1]); }

  const Tensor& tensor(int i, const char* name) const {
    STD_TORCH_CHECK(tensors[i].has_value(), "weights: a step of fused_blocks has no ", name);
    return *tensors[i];
  }
};

// The arguments of consecutive steps within blocks, and what they point to.
struct Run {
  std::vector<repavit::StackStep> list;
  std::vector<Tensor> copies;
  std::deque<repavit::WindowGrid> grids;  // does not move them

  void add(const Step& step, const Tensor& x) {
    repavit::StackStep to{};
    if (step.kind() == Step::kFfn) {
      to.ffn = ffn_args(x, step.tensor(0, "w_in"), step.tensors[1], step.tensor(2, "w_out"), step.tensors[3],
                        step.tensors[4], step.tensors[5], step.norm_eps(), step.residual(), step.flag(), copies);
      list.push_back(to);
      return;
    }
    const bool windowed = step.kind() == Step::kWindowAttention;
    STD_TORCH_CHECK(x.dim() == (windowed ? 4 : 3), "x: got shape ", shape_of(x), ", wanted ",
                    windowed ? "[B, H, W, C]" : "[B, T, C]", " for this kind of attention");
    const Tensor &w_qkv = step.tensor(0, "w_qkv"), &w_proj = step.tensor(2, "w_proj");
    const repavit::AttentionShape shape = attention_shape(w_qkv, w_proj, step.heads(), step.d_qk());
    STD_TORCH_CHECK(shape.channels_out == shape.channels, "w_proj: gives ", shape.channels_out, " channels, x has ",
                    shape.channels, "; a stack needs them equal");
    to.attention = block_args(x, w_qkv, step.tensors[1], w_proj, step.tensors[3], step.tensors[4], shape,
                              step.norm_eps(), step.residual(), copies);
    to.attention.scale = step.scale();
    if (windowed) {
      grids.push_back(window_grid(x, step.heads(), step.window(), step.shift(), step.flag(),
                                  step.tensor(5, "rel_bias"), copies));
      if (const MaybeTensor& pad_kv = step.tensors[6]) {
        check_shape("pad_kv", *pad_kv, {step.heads() * (shape.d_qk + shape.d_v)});
        check_same_kind("pad_kv", *pad_kv, x);
        grids.back().padding = ordered_data(*pad_kv, copies);
      }
      to.attention.windows = &grids.back();
    }
    list.push_back(to);
  }
};

// All steps of a run, from x to y; in place where they are one.
void run_blocks(const Run& run, const Tensor& x, const Tensor& y) {
  if (x.numel() == 0) return;
  const RowView rows(x);
  repavit::StackArgs args{};
  args.batch = x.dim() > 2 ? x.size(0) : 1;
  args.tokens = rows.rows / args.batch;
  args.channels = x.size(x.dim() - 1);
  args.steps = run.list.data();
  args.count = static_cast<int64_t>(run.list.size());
  args.x = rows.owner.const_data_ptr();
  args.x_stride = rows.stride;
  args.y = y.mutable_data_ptr();
  repavit::kernels().fused_blocks[dtype_of("x", x)](args, torch_pool());
}

// A step that is no part of a block.
Tensor run_alone(const Step& step, const Tensor& x) {
  const MaybeTensor* t = step.tensors;
  switch (step.kind()) {
    case Step::kPatches:
      return patch_projection(x, step.tensor(0, "weight"), t[1], t[2], step.patch(), step.flag(), step.norm_eps());
    case Step::kTokens:
      return token_embedding(x, step.tensor(0, "weight"), t[1], t[2], t[3], t[4], t[5], t[6], step.patch(), step.flag(),
                             step.norm_eps());
    case Step::kHead:
      return pooled_head(x, t[0], t[1], t[2], t[3], step.first(), step.count(), step.norm_eps());
    default:
      STD_TORCH_CHECK(false, "plan: got a step of kind ", step.kind(), ", wanted 0 to 5");
  }
}

Tensor fused_blocks(const Tensor& x, std::vector<MaybeTensor> weights, std::vector<int64_t> plan,
                    std::vector<double> scalars) {
  const size_t count = plan.size() / Step::kIntegers;
  STD_TORCH_CHECK(count > 0 && plan.size() == count * Step::kIntegers && weights.size() == count * Step::kTensors &&
                      scalars.size() == count * Step::kScalars,
                  "plan: got ", plan.size(), " integers, ", weights.size(), " weights and ", scalars.size(),
                  " scalars, wanted ", Step::kIntegers, ", ", Step::kTensors, " and ", Step::kScalars,
                  " for each step");
  const auto step = [&](size_t i) {
    return Step{&weights[i * Step::kTensors], &plan[i * Step::kIntegers], &scalars[i * Step::kScalars]};
  };
  Tensor y = x;
  for (size_t i = 0; i < count;) {
    if (!step(i).in_block()) {
      y = run_alone(step(i++), y);
      continue;
    }
    const bool own = i > 0;  // y is a step's result, which nobody else sees
    Run run;
    for (; i < count && step(i).in_block(); ++i) run.add(step(i), y);
    const Tensor from = y;
    if (!own) y = new_empty(x.sizes().data(), x.dim(), aoti_dtype_of(x));
    run_blocks(run, from, y);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) { m.impl("fused_blocks", TORCH_BOX(&fused_blocks)); }
