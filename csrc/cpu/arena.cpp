#include "arena.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

namespace repavit {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// From here on scratch takes whole huge pages: in small ones, scattered over memory, it would crowd some sets of L2.
constexpr size_t kLargeScratch = size_t{128} << 10;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::atomic<size_t> held{0};

struct Arena {
  std::unique_ptr<void, Free> memory;
  size_t capacity = 0;

  ~Arena() { held -= capacity; }
};

[[noreturn]] void refuse(size_t bytes) {
  throw std::runtime_error("scratch: cannot allocate " + std::to_string(bytes) +
                           " bytes of memory; call with fewer rows or smaller weights");
}

void* reserve(Arena& arena, size_t bytes) {
  if (bytes > arena.capacity) {
    if (bytes > PTRDIFF_MAX / 2) refuse(bytes);  // no rounding below may wrap
    const size_t page = bytes >= kLargeScratch ? kHugePage : kCacheLine;
    const size_t capacity = (bytes + page - 1) / page * page;
    arena.memory.reset();  // before the new one exists: the old content is not wanted
    held -= arena.capacity;
    arena.capacity = 0;
    arena.memory.reset(std::aligned_alloc(page, capacity));
    if (!arena.memory) refuse(bytes);
    arena.capacity = capacity;
    held += capacity;
    advise_huge_pages(arena.memory.get(), capacity);
  }
#if defined(REPAVIT_POISON_SCRATCH)  // the driver: NaN to whoever counts on content
  if (bytes > 0) std::memset(arena.memory.get(), 0xff, bytes);
#endif
  return arena.memory.get();
}

}  // namespace

void* thread_arena(size_t bytes) {
  thread_local Arena arena;
  return reserve(arena, bytes);
}

void* shared_arena(size_t bytes) {
  thread_local Arena arena;
  return reserve(arena, bytes);
}

void* product_arena(size_t bytes) {
  thread_local Arena arena;
  return reserve(arena, bytes);
}

size_t arena_bytes() { return held; }

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

size_t l2_cache_bytes() {
  static const size_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return static_cast<size_t>(known);
#endif
    return size_t{1} << 20;
  }();
  return bytes;
}

}  // namespace repavit
