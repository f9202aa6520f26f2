// Which instruction set the kernels run on. Every kernel file is compiled once per level with FASTDIFF_ISA set to its
// name, so that each level has its own namespace: fastdiff::baseline, fastdiff::avx2, fastdiff::avx512, fastdiff::amx. Only
// what multiplies matrices has an amx copy (FASTDIFF_TILE_KERNEL); the rest runs its avx512 code there.
#pragma once

namespace fastdiff {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// What this CPU and this operating system can run.
Isa isa_detected();

// isa_detected(), lowered by FASTDIFF_CPU_ISA. Throws std::invalid_argument on an unknown name.
Isa isa();

const char* isa_name(Isa);

}  // namespace fastdiff

// Levels that the compiler knew: setup.py leaves out the others.
#if !defined(FASTDIFF_LEVELS)
#define FASTDIFF_LEVELS 4
#endif
#if FASTDIFF_LEVELS > 1
#define FASTDIFF_IF_AVX2(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AVX2(...)
#endif
#if FASTDIFF_LEVELS > 2
#define FASTDIFF_IF_AVX512(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AVX512(...)
#endif

#if FASTDIFF_LEVELS > 3
#define FASTDIFF_IF_AMX(...) __VA_ARGS__
#else
#define FASTDIFF_IF_AMX(...)
#endif

// Declares a kernel at every level but amx, and `name`, which calls the level in use.
#define FASTDIFF_KERNEL(name, parameters, ...)                                       \
  namespace baseline { void name parameters; }                                       \
  namespace avx2 { void name parameters; }                                           \
  namespace avx512 { void name parameters; }                                         \
  inline void name parameters {                                                      \
    FASTDIFF_IF_AVX512(if (isa() >= kAvx512) return avx512::name(__VA_ARGS__);)       \
    FASTDIFF_IF_AVX2(if (isa() >= kAvx2) return avx2::name(__VA_ARGS__);)             \
    baseline::name(__VA_ARGS__);                                                     \
  }

// The same for a kernel with an amx copy: its file is listed in TILED in setup.py.
#define FASTDIFF_TILE_KERNEL(name, parameters, ...)                                  \
  namespace baseline { void name parameters; }                                       \
  namespace avx2 { void name parameters; }                                           \
  namespace avx512 { void name parameters; }                                         \
  namespace amx { void name parameters; }                                            \
  inline void name parameters {                                                      \
    FASTDIFF_IF_AMX(if (isa() == kAmx) return amx::name(__VA_ARGS__);)                \
    FASTDIFF_IF_AVX512(if (isa() >= kAvx512) return avx512::name(__VA_ARGS__);)       \
    FASTDIFF_IF_AVX2(if (isa() >= kAvx2) return avx2::name(__VA_ARGS__);)             \
    baseline::name(__VA_ARGS__);                                                     \
  }
