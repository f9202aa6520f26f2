#include "cpu/workspace.h"

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <new>

namespace fastdiff {
namespace {

constexpr size_t kPage = size_t(2) << 20;  // of a huge page: a tenth of the translation misses of small ones
constexpr int kSlots = 8;

struct Region {
  void* memory = nullptr;
  size_t bytes = 0;

  ~Region() { release(); }

  void release() {
    if (memory) munmap(memory, bytes);
    memory = nullptr;
    bytes = 0;
  }

  void grow(size_t wanted) {
    release();
    const size_t size = (wanted + wanted / 4 + kPage - 1) / kPage * kPage;
    void* fresh = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    madvise(fresh, size, MADV_HUGEPAGE);
    memory = fresh;
    bytes = size;
  }
};

std::array<Region, kSlots>& regions() {
  static thread_local std::array<Region, kSlots> all;
  return all;
}

}  // namespace

void* workspace(int slot, size_t bytes) {
  Region& region = regions()[size_t(slot)];
  if (region.bytes < bytes) region.grow(bytes);
  return region.memory;
}

void release_workspace() {
  for (Region& region : regions()) region.release();
}

}  // namespace fastdiff
