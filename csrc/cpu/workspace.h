// Scratch memory that lives as long as its thread, so that no call pays for fresh pages.
#pragma once
#include <stddef.h>

namespace fastdiff {

// At least `bytes` of memory, aligned to 64, with undefined contents. The same slot of the same calling thread gives the
// same memory again: ask before a parallel region, and keep the slots of one kernel apart. Throws std::bad_alloc.
void* workspace(int slot, size_t bytes);

// Returns all memory of this thread.
void release_workspace();

}  // namespace fastdiff
