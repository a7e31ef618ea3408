// Binding of fused_blocks for the CPU: reads the plan that repavit_ops/stack_plan.py writes (see bindings_common.h).
//
// A plan names a hundred tensors and more. To take them over from Python and read them again costs a call of a small model
// several percent, behind blocks that leave nothing in the caches; so Python may keep a plan here for many calls.
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "bindings_packed.h"

namespace {

using namespace repavit_bindings;

// One step of the plan. Fields, and how many tensors a step has, as repavit_ops/stack_plan.py has them.
struct Step {
  static constexpr size_t kTensors = 10, kIntegers = 11, kScalars = 4;
  enum Kind : int64_t { kFfn, kGatedFfn, kAttention, kWindowAttention, kPatches, kTokens, kHead };
  const MaybeTensor* tensors;
  const int64_t* integers;
  const double* scalars;

  int64_t kind() const { return integers[0]; }
  bool in_block() const { return kind() >= kFfn && kind() <= kWindowAttention; }
  bool residual() const { return integers[1] != 0; }
  repavit::Activation activation() const {
    const int64_t forms = kind() == kFfn ? repavit::kGeluForms : repavit::kActivations;
    STD_TORCH_CHECK(0 <= integers[2] && integers[2] < forms, "plan: got an activation of form ", integers[2],
                    ", wanted 0 to ", forms - 1);
    return static_cast<repavit::Activation>(integers[2]);
  }
  // Of windows roll first, of patches channels last, of tokens as a map.
  bool flag() const { return integers[2] != 0; }
  int64_t heads() const { return integers[3]; }
  int64_t d_qk() const { return integers[4]; }
  std::vector<int64_t> window() const { return {integers[5], integers[6]}; }
  std::vector<int64_t> shift() const { return {integers[7], integers[8]}; }
  std::vector<int64_t> patch() const { return window(); }
  int64_t first() const { return integers[3]; }
  int64_t count() const { return integers[4]; }
  double scale() const { return scalars[0]; }
  static std::optional<double> eps(double scalar) { return scalar < 0 ? std::nullopt : std::optional<double>(scalar); }
  std::optional<double> norm_eps() const { return eps(scalars[1]); }
  std::optional<double> inner_norm_eps() const { return eps(scalars[2]); }
  AttentionExtras extras() const {
    STD_TORCH_CHECK(integers[5] == 0 || integers[5] == 1, "plan: got a QK-norm of form ", integers[5], ", wanted 0 or 1");
    return {tensors[5], tensors[6], tensors[7], tensors[8], tensors[9], eps(scalars[3]),
            integers[5] == 1 ? repavit::kRmsNorm : repavit::kLayerNorm, integers[6] != 0, inner_norm_eps()};
  }
  NormArgs norm() const {
    STD_TORCH_CHECK(integers[9] == 0 || integers[9] == 1, "plan: got a norm of form ", integers[9], ", wanted 0 or 1");
    return {integers[9] == 1 ? repavit::kRmsNorm : repavit::kLayerNorm, norm_eps()};
  }

  bool int8() const {
    STD_TORCH_CHECK(integers[10] == 0 || integers[10] == 1, "plan: got a form ", integers[10], " of quantize, wanted 0 or 1");
    return integers[10] == 1;
  }

  const Tensor& tensor(int i, const char* name) const {
    STD_TORCH_CHECK(tensors[i].has_value(), "weights: a step of fused_blocks has no ", name);
    return *tensors[i];
  }
};

// The arguments of consecutive steps within blocks, read for x of one kind and size, and what they point to.
class Run {
 public:
  explicit Run(const Tensor& x) : dtype_(check_input("x", x)), sizes_(x.sizes().begin(), x.sizes().end()) {}

  void add(const Step& step, const Tensor& x, Reading& reading) {
    repavit::StackStep to{};
    const MaybeTensor* t = step.tensors;
    if (step.kind() == Step::kFfn) {
      const FfnWeightTensors weights{step.tensor(0, "w_in"), t[1], nullptr, std::nullopt, step.tensor(2, "w_out"),
                                     t[3], t[4], t[5], step.int8()};
      int8_ |= step.int8();
      to.ffn = partial_gelu_ffn_args(x, weights, step.norm(), step.residual(), step.activation(), reading, copies_);
      list_.push_back(to);
      read_from({t[1], t[4]}, {t[0], t[2], t[3]}, t[5], to.ffn.packed);
      return;
    }
    if (step.kind() == Step::kGatedFfn) {
      const FfnWeightTensors weights{step.tensor(0, "w_gate"), t[1], &step.tensor(2, "w_up"), t[3],
                                     step.tensor(4, "w_out"), t[5], t[6], t[7], step.int8()};
      int8_ |= step.int8();
      to.gated = gated_ffn_args(x, weights, step.norm(), step.inner_norm_eps(), step.residual(), step.activation(),
                                reading, copies_);
      list_.push_back(to);
      read_from({t[1], t[3], t[6]}, {t[0], t[2], t[4], t[5]}, t[7], to.gated.packed);
      return;
    }
    const bool windowed = step.kind() == Step::kWindowAttention;
    STD_TORCH_CHECK(x.dim() == (windowed ? 4 : 3), "x: got shape ", shape_of(x), ", wanted ",
                    windowed ? "[B, H, W, C]" : "[B, T, C]", " for this kind of attention");
    const Tensor &w_qkv = step.tensor(0, "w_qkv"), &w_proj = step.tensor(2, "w_proj");
    const repavit::AttentionShape shape = attention_shape(
        w_qkv, w_proj, step.heads(), windowed ? std::nullopt : std::optional<int64_t>(step.d_qk()));
    STD_TORCH_CHECK(shape.channels_out == shape.channels, "w_proj: gives ", shape.channels_out, " channels, x has ",
                    shape.channels, "; a stack needs them equal");
    to.attention =
        block_args(x, w_qkv, t[1], w_proj, t[3], t[4], shape, step.norm(), step.residual(), step.int8(), reading, copies_);
    int8_ |= step.int8();
    to.attention.scale = step.scale();
    if (windowed) {
      grids_.push_back(window_grid(x, step.heads(), step.window(), step.shift(), step.flag(),
                                   step.tensor(5, "rel_bias"), copies_));
      if (const MaybeTensor& pad_kv = t[6]) {
        check_shape("pad_kv", *pad_kv, {padding_elements(shape)});
        check_same_kind("pad_kv", *pad_kv, x);
        grids_.back().padding = ordered_data(*pad_kv, copies_);
      }
      to.attention.windows = &grids_.back();
    } else {
      set_extras(step.extras(), x, copies_, to.attention);
      for (int i = 5; i < 8; ++i) per_image_ |= t[i] && t[i]->dim() == 4 && t[i]->size(0) > 1;
      for (int i = 6; i < 8; ++i) copied_ |= t[i] && t[i]->element_size() == 2;
    }
    list_.push_back(to);
    read_from({t[1], t[3], t[5], t[6], t[7], t[8], t[9]}, {t[0], t[2]}, t[4], to.attention.packed);
  }

  // Whether a new reading for this x would find everything where this one did. Of values only the packed copies were
  // taken (packed_holds()), of all else pointers. A copy of another kind, which had to be made, may be out of date.
  bool holds(const Tensor& x) const {
    if (copied_ || check_input("x", x) != dtype_ || x.dim() != static_cast<int64_t>(sizes_.size())) return false;
    for (int64_t i = per_image_ ? 0 : 1; i < x.dim(); ++i) {
      if (x.size(i) != sizes_[static_cast<size_t>(i)]) return false;
    }
    // One question to all tensors after the other: behind a model none is in the caches, and the shorter a step of such a
    // loop is, the more of them the processor waits for at once. It takes half the time of one loop with all questions.
    bool same = true;
    for (const Source& source : sources_) same &= source.tensor.numel() == source.elements;
    for (const Source& source : sources_) same &= source.tensor.const_data_ptr() == source.data;
    for (const Source& source : sources_) same &= source.tensor.scalar_type() == source.type;
    for (const Source& source : sources_) same &= source.tensor.is_contiguous();
    return same;
  }

  // Whether the packed copies hold the weights; asked where holds(), while no call writes any.
  bool packed_holds() const {
    for (const Found& weight : places_) {  // each in a page of its own: they come together
      for (const char* place : weight.at) {
        __builtin_prefetch(place);
        __builtin_prefetch(place + Fingerprint::kLineBytes);
      }
    }
    const Found* places = places_.data();
    for (const Copy& copy : packed_) {
      Fingerprint now;
      for (int i = 0; i < copy.found; ++i) now.add((places++)->at);
      for (const WeightView& w : copy.others) now.add(w);
      const uint64_t known = fingerprint_in(copy.packed);
      if (known != now.value() && known != Fingerprint::kOfNothing) return false;
    }
    return true;
  }

  // All steps, from x to y; in place where they are one. Tables, if there are any, turn q and k of every attention.
  void operator()(const Tensor& x, const Tensor& y, const MaybeTensor& rotary_cos, const MaybeTensor& rotary_sin) const {
    if (x.numel() == 0) return;
    const RowView rows(x);
    std::vector<repavit::StackStep> turned;
    std::vector<Tensor> tables;
    if (rotary_cos || rotary_sin) turned = list_;
    const repavit::RepAttentionArgs* like = nullptr;  // most models' attentions are of one shape
    for (repavit::StackStep& step : turned) {
      repavit::RepAttentionArgs& args = step.attention;
      if (args.packed == nullptr || args.windows != nullptr) continue;
      if (like != nullptr && like->shape.heads == args.shape.heads && like->shape.d_qk == args.shape.d_qk) {
        const repavit::QueryKeyArgs own = args.qk;
        args.qk = like->qk;
        args.qk.norm = own.norm, args.qk.norm_eps = own.norm_eps, args.qk.interleaved = own.interleaved;
        args.qk.q_norm = own.q_norm, args.qk.k_norm = own.k_norm;
        continue;
      }
      set_rotary(rotary_cos, rotary_sin, x, tables, args);
      like = &args;
    }
    repavit::StackArgs args{};
    args.batch = x.dim() > 2 ? x.size(0) : 1;
    args.tokens = rows.rows / args.batch;
    args.channels = x.size(x.dim() - 1);
    args.steps = turned.empty() ? list_.data() : turned.data();
    args.count = static_cast<int64_t>(list_.size());
    args.x = rows.owner.const_data_ptr();
    args.x_stride = rows.stride;
    args.y = y.mutable_data_ptr();
    kernels_for(int8_).fused_blocks[dtype_](args, torch_pool());
  }

 private:
  // A tensor that steps point into, and what it was then: through .data it may have become another.
  struct Source {
    Tensor tensor;
    const void* data;
    int64_t elements;
    ScalarType type;

    explicit Source(const Tensor& t)
        : tensor(t), data(t.const_data_ptr()), elements(t.numel()), type(t.scalar_type()) {}
  };

  // A packed copy and the weights that it must be of: so many of places_, or views of them all.
  struct Copy {
    const void* packed;
    int found;
    std::vector<WeightView> others;
  };
  struct Found {
    const char* at[Fingerprint::kPlaces];
  };

  void read_from(std::initializer_list<MaybeTensor> vectors, std::initializer_list<MaybeTensor> weights,
                 const MaybeTensor& packed, const void* used) {
    if (!packed || packed->const_data_ptr() != used) copied_ = true;
    for (const MaybeTensor& t : vectors) note(t);
    note(packed);
    Copy copy{used, 0, {}};
    std::vector<Found> found;
    for (const MaybeTensor& w : weights) {
      if (!w) continue;
      note(w);
      copy.others.push_back(view_of(*w));
      Found places{};
      if (Fingerprint::find(copy.others.back(), places.at)) found.push_back(places);
    }
    if (found.size() == copy.others.size()) {
      places_.insert(places_.end(), found.begin(), found.end());
      copy.found = static_cast<int>(found.size());
      copy.others.clear();
    }
    packed_.push_back(std::move(copy));
  }
  void note(const MaybeTensor& t) {
    if (!t) return;
    if (!t->is_contiguous()) copied_ = true;
    sources_.emplace_back(*t);
  }

  DType dtype_;
  std::vector<int64_t> sizes_;  // of x; the batch may be another
  std::vector<repavit::StackStep> list_;
  std::vector<Tensor> copies_;
  std::deque<repavit::WindowGrid> grids_;  // does not move them
  std::vector<Source> sources_;
  std::vector<Copy> packed_;
  std::vector<Found> places_;
  bool int8_ = false;  // a step has weights of int8
  bool copied_ = false;
  bool per_image_ = false;  // something has a row for each image, so that the batch must be the same
};

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
      STD_TORCH_CHECK(false, "plan: got a step of kind ", step.kind(), ", wanted 0 to 6");
  }
}

// A plan and its tensors. Safe to call from several threads.
class Plan {
 public:
  Plan(std::vector<MaybeTensor> weights, std::vector<int64_t> plan, std::vector<double> scalars)
      : weights_(std::move(weights)), plan_(std::move(plan)), scalars_(std::move(scalars)),
        count_(plan_.size() / Step::kIntegers) {
    STD_TORCH_CHECK(count_ > 0 && plan_.size() == count_ * Step::kIntegers &&
                        weights_.size() == count_ * Step::kTensors && scalars_.size() == count_ * Step::kScalars,
                    "plan: got ", plan_.size(), " integers, ", weights_.size(), " weights and ", scalars_.size(),
                    " scalars, wanted ", Step::kIntegers, ", ", Step::kTensors, " and ", Step::kScalars,
                    " for each step");
  }

  Tensor operator()(const Tensor& x, const MaybeTensor& rotary_cos = {}, const MaybeTensor& rotary_sin = {}) {
    Tensor y = x;
    for (size_t i = 0; i < count_;) {
      if (!step(i).in_block()) {
        y = run_alone(step(i++), y);
        continue;
      }
      std::optional<Reading> reading;
      const std::shared_ptr<const Run> run = run_from(i, y, reading);
      const Tensor from = y;
      if (i == 0) y = new_empty(x.sizes().data(), x.dim(), aoti_dtype_of(x));  // others are this call's own
      (*run)(from, y, rotary_cos, rotary_sin);
      i = end_of_run(i);
    }
    return y;
  }

 private:
  Step step(size_t i) const {
    return {&weights_[i * Step::kTensors], &plan_[i * Step::kIntegers], &scalars_[i * Step::kScalars]};
  }
  size_t end_of_run(size_t i) const {
    while (i < count_ && step(i).in_block()) ++i;
    return i;
  }
  // Starts `reading`, which the run wants as long as it runs.
  std::shared_ptr<const Run> run_from(size_t first, const Tensor& x, std::optional<Reading>& reading) {
    const std::lock_guard<std::mutex> lock(mutex_);
    reading.emplace();
    std::shared_ptr<const Run>& run = runs_[first];
    const bool same = run != nullptr && run->holds(x);
    if (same && run->packed_holds()) return run;
    reading->anew = same;  // one of the weights was written, so the others will have been
    for (int i = 0; i < kReadings && (i == 0 || reading->written); ++i) {
      reading->written = false;
      auto fresh = std::make_shared<Run>(x);
      for (size_t k = first; k < end_of_run(first); ++k) fresh->add(step(k), x, *reading);
      run = std::move(fresh);
      reading->anew = false;
    }
    return run;
  }

  // While a copy is written, calls of other threads may write those that were met before, each for weights of its own.
  static constexpr int kReadings = 3;

  std::vector<MaybeTensor> weights_;
  std::vector<int64_t> plan_;
  std::vector<double> scalars_;
  size_t count_;  // of steps
  std::mutex mutex_;
  std::map<size_t, std::shared_ptr<const Run>> runs_;  // by their first step
};

// Plans that Python keeps, by number. Never destroyed: Python may let go of one as late as it likes.
class Keeper {
 public:
  static Keeper& instance() {
    static auto* const keeper = new Keeper;
    return *keeper;
  }
  int64_t keep(std::shared_ptr<Plan> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_[++last_] = std::move(plan);
    return last_;
  }
  std::shared_ptr<Plan> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(number);
    STD_TORCH_CHECK(found != plans_.end(), "kept: got ", number, ", which is no plan that is kept");
    return found->second;
  }
  void drop(int64_t number) {
    std::shared_ptr<Plan> last;  // its tensors go when the lock is gone
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(number);
    if (found == plans_.end()) return;
    last = std::move(found->second);
    plans_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Plan>> plans_;
  int64_t last_ = 0;
};

Tensor fused_blocks(const Tensor& x, std::vector<MaybeTensor> weights, std::vector<int64_t> plan,
                    std::vector<double> scalars) {
  return Plan(std::move(weights), std::move(plan), std::move(scalars))(x);
}

int64_t fused_blocks_keep(std::vector<MaybeTensor> weights, std::vector<int64_t> plan, std::vector<double> scalars) {
  return Keeper::instance().keep(std::make_shared<Plan>(std::move(weights), std::move(plan), std::move(scalars)));
}

Tensor fused_blocks_kept(const Tensor& x, int64_t kept, const MaybeTensor& rotary_cos, const MaybeTensor& rotary_sin) {
  return (*Keeper::instance().find(kept))(x, rotary_cos, rotary_sin);
}

void fused_blocks_drop(int64_t kept) { Keeper::instance().drop(kept); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CPU, m) {
  m.impl("fused_blocks", TORCH_BOX(&fused_blocks));
  m.impl("fused_blocks_keep", TORCH_BOX(&fused_blocks_keep));
  m.impl("fused_blocks_kept", TORCH_BOX(&fused_blocks_kept));
}

STABLE_TORCH_LIBRARY_IMPL(repavit_ops, CompositeExplicitAutograd, m) {
  m.impl("fused_blocks_drop", TORCH_BOX(&fused_blocks_drop));
}
