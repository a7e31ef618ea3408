// Scratch memory that its thread owns and keeps: no allocation in steady state, freed when the thread ends.
#pragma once

#include <stddef.h>

namespace repavit {

// At least `bytes` of this thread's memory, 64-byte aligned, content undefined. Valid until the next call on the same
// thread: a kernel asks once for all it needs and divides it. Throws std::runtime_error.
void* thread_arena(size_t bytes);

// The same of another block, which stays valid while the kernel's forks use thread_arena(), also on this thread: for what
// the caller shares with them.
void* shared_arena(size_t bytes);

// A third one, for the sums of a product: the products of a kernel follow each other. Null for 0 bytes until the first.
void* product_arena(size_t bytes);

// Bytes that the arenas of all living threads hold now.
size_t arena_bytes();

// Ask for huge pages behind [data, data + bytes) where the system has them; a hint, never an error.
void advise_huge_pages(void* data, size_t bytes);

// Bytes of one core's second-level cache (1 MiB where the system does not say), asked once.
size_t l2_cache_bytes();

}  // namespace repavit
