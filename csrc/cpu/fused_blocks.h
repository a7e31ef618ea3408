// A run of fused blocks in one call, over the kernels of any level.
#pragma once

#include "kernels.h"

namespace repavit {

// Images that threads can share out evenly go through all steps one by one, each on one thread with nothing shared; the
// rest go step by step on the whole pool. Everything happens in place, in y.
void fused_blocks(const StackArgs& args, const Kernels& kernels, const Pool& pool);

}  // namespace repavit
