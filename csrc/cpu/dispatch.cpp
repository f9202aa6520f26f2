#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "amx"};

bool bit(unsigned word, int position) { return (word >> position) & 1; }

Isa read_limit(Isa detected) {
  const char* wanted = std::getenv("FASTDIFF_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return detected;
  for (int level = kBaseline; level <= kAmx; ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return level < detected ? Isa(level) : detected;
  throw std::invalid_argument(std::string("FASTDIFF_CPU_ISA must be baseline, avx2, avx512 or amx, got ") + wanted);
}

#if defined(__x86_64__)
// Linux hands out the tile registers on request only
bool tiles_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa machine_isa() {
#if defined(__x86_64__)
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return kBaseline;
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kBaseline;
  if (!(bit(b, 5) && fma && f16c)) return kBaseline;
  const bool foundation = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  const bool vnni = bit(c, 11);
  if ((saved & 0xe6) != 0xe6 || !foundation || !vnni) return kAvx2;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
  if (!bf16) return kAvx2;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool tiles = bit(d, 24) && bit(d, 25) && bit(d, 22) && (saved & 0x60000) == 0x60000;
  return tiles && tiles_permitted() ? kAmx : kAvx512;
#else
  return kBaseline;
#endif
}

}  // namespace

Isa isa_detected() {
  const Isa machine = machine_isa(), built = Isa(FASTDIFF_LEVELS - 1);
  return machine < built ? machine : built;
}

Isa isa() {
  static const Isa level = read_limit(isa_detected());
  return level;
}

const char* isa_name(Isa level) { return kNames[level]; }

}  // namespace fastdiff
