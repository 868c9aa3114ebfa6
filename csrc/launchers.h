// How the binding reaches a launcher: the CPU's in the instruction set that this machine has, the GPU's on a stream.
#pragma once

#include <stdint.h>

namespace epigraf {

// v3 and v4: x86-64-v3, which is AVX2, FMA and F16C, and x86-64-v4, which is AVX-512 with that.
enum class CpuLevel : int { base = 0, v3 = 1, v4 = 2 };

// The level in use: at first the best that the processor has and the build holds.
CpuLevel cpu_level();
CpuLevel best_cpu_level();
void set_cpu_level(CpuLevel level);

}  // namespace epigraf

// Declares `name`, compiled for every level from one .cpp, and `name_cpu`, which takes the level in use.
#if defined(EPIGRAF_HAS_LEVELS)
#define EPIGRAF_CPU_LAUNCHER(name, Args)                        \
  namespace epigraf {                                           \
  namespace base { void name(const Args& args, int threads); }  \
  namespace v3 { void name(const Args& args, int threads); }    \
  namespace v4 { void name(const Args& args, int threads); }    \
  inline void name##_cpu(const Args& args, int threads) {       \
    switch (cpu_level()) {                                      \
      case CpuLevel::v4: return v4::name(args, threads);        \
      case CpuLevel::v3: return v3::name(args, threads);        \
      default: return base::name(args, threads);                \
    }                                                           \
  }                                                             \
  }
#else
#define EPIGRAF_CPU_LAUNCHER(name, Args)                                                    \
  namespace epigraf {                                                                       \
  namespace base { void name(const Args& args, int threads); }                              \
  inline void name##_cpu(const Args& args, int threads) { base::name(args, threads); }      \
  }
#endif

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
