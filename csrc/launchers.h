// How the binding reaches a launcher: the CPU's in the instruction set that this machine has, the GPU's on a stream.
#pragma once

#include <stdint.h>

namespace epigraf {

// v3 and v4: x86-64-v3, which is AVX2, FMA and F16C, and x86-64-v4, which is AVX-512 with that.
enum class CpuLevel : int { base = 0, v3 = 1, v4 = 2 };

// What a build holds beside plain x86-64: setup.py says so.
#if defined(EPIGRAF_HAS_V3)
constexpr bool kHasV3 = true;
#define EPIGRAF_IF_V3(...) __VA_ARGS__
#else
constexpr bool kHasV3 = false;
#define EPIGRAF_IF_V3(...)
#endif
#if defined(EPIGRAF_HAS_V4)
constexpr bool kHasV4 = true;
#define EPIGRAF_IF_V4(...) __VA_ARGS__
#else
constexpr bool kHasV4 = false;
#define EPIGRAF_IF_V4(...)
#endif

constexpr bool is_built(CpuLevel level) {
  return level == CpuLevel::base || (level == CpuLevel::v3 ? kHasV3 : kHasV4);
}

// The best level of the processor, built or not.
CpuLevel processor_level();
// Whether a level can be used: the processor has it, and the build holds it.
bool has_cpu_level(CpuLevel level);
// The level in use: at first the best that can be.
CpuLevel cpu_level();
void set_cpu_level(CpuLevel level);

}  // namespace epigraf

// Declares `name`, compiled for every level from one .cpp, and `name_cpu`, which takes the level in use.
#define EPIGRAF_CPU_LAUNCHER(name, Args)                                          \
  namespace epigraf {                                                             \
  namespace base { void name(const Args& args, int threads); }                    \
  EPIGRAF_IF_V3(namespace v3 { void name(const Args& args, int threads); })       \
  EPIGRAF_IF_V4(namespace v4 { void name(const Args& args, int threads); })       \
  inline void name##_cpu(const Args& args, int threads) {                         \
    switch (cpu_level()) {                                                        \
      EPIGRAF_IF_V4(case CpuLevel::v4 : return v4::name(args, threads);)          \
      EPIGRAF_IF_V3(case CpuLevel::v3 : return v3::name(args, threads);)          \
      default: return base::name(args, threads);                                  \
    }                                                                             \
  }                                                                               \
  }

// Declares `name_cuda`, which throws std::runtime_error when the launch fails.
#if defined(EPIGRAF_CUDA)
#define EPIGRAF_CUDA_LAUNCHER(name, Args) \
  namespace epigraf { void name##_cuda(const Args& args, uintptr_t stream); }
#else
#define EPIGRAF_CUDA_LAUNCHER(name, Args)
#endif

#define EPIGRAF_LAUNCHER(name, Args) \
  EPIGRAF_CPU_LAUNCHER(name, Args)   \
  EPIGRAF_CUDA_LAUNCHER(name, Args)
