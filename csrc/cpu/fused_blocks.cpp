#include "fused_blocks.h"

namespace repavit {
namespace {

constexpr int64_t kElementBytes[kDTypes] = {4, 2, 2, 8};

void run_serial(int64_t count, Pool::Body body, void* context) { body(context, 0, count); }
constexpr Pool kSerial{1, run_serial};

struct Stack {
  const StackArgs& args;
  const Kernels& kernels;
  int64_t owners, images_each;

  // All steps on `batch` images from `first` on.
  void run(int64_t first, int64_t batch, const Pool& pool) const {
    const int64_t element = kElementBytes[args.dtype], row = first * args.tokens;
    const char* x = static_cast<const char*>(args.x) + row * args.x_stride * element;
    char* y = static_cast<char*>(args.y) + row * args.channels * element;
    const void* from = x;
    int64_t stride = args.x_stride;
    for (int64_t i = 0; i < args.count; ++i, from = y, stride = args.channels) {
      if (args.steps[i].attention.packed != nullptr) {
        RepAttentionArgs step = args.steps[i].attention;
        step.batch = batch;
        step.tokens = args.tokens;
        step.x = from;
        step.x_stride = stride;
        step.y = y;
        kernels.rep_attention[args.dtype](step, pool);
      } else {
        PartialGeluFfnArgs step = args.steps[i].ffn;
        step.rows = batch * args.tokens;
        step.x = from;
        step.x_stride = stride;
        step.y = y;
        kernels.partial_gelu_ffn[args.dtype](step, pool);
      }
    }
  }
};

void run_owners(void* raw, int64_t begin, int64_t end) {
  const Stack& stack = *static_cast<const Stack*>(raw);
  for (int64_t image = begin * stack.images_each; image < end * stack.images_each; ++image) stack.run(image, 1, kSerial);
}

}  // namespace

void fused_blocks(const StackArgs& args, const Kernels& kernels, const Pool& pool) {
  if (args.batch == 0 || args.tokens == 0 || args.channels == 0) return;
  Stack stack{args, kernels, pool.threads, args.batch / pool.threads};
  if (stack.images_each > 0) pool.run(stack.owners, run_owners, &stack);
  const int64_t done = stack.owners * stack.images_each;
  if (done < args.batch) stack.run(done, args.batch - done, pool);
}

}  // namespace repavit
