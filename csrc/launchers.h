// How the binding reaches a launcher: the CPU's in the instruction set that this machine has, the GPU's on a stream.
#pragma once

#include <stdint.h>

namespace epigraf {

enum class CpuLevel : int { base = 0, v3 = 1 };  // v3: x86-64-v3, which is AVX2, FMA and F16C

// The level in use: at first the best that the processor has and the build holds.
CpuLevel cpu_level();
CpuLevel best_cpu_level();
void set_cpu_level(CpuLevel level);

}  // namespace epigraf

// Declares `name`, compiled for every level from one .cpp, and `name_cpu`, which takes the level in use.
#if defined(EPIGRAF_HAS_V3)
#define EPIGRAF_CPU_LAUNCHER(name, Args)                                                    \
  namespace epigraf {                                                                       \
  namespace base { void name(const Args& args, int threads); }                              \
  namespace v3 { void name(const Args& args, int threads); }                                \
  inline void name##_cpu(const Args& args, int threads) {                                   \
    (cpu_level() == CpuLevel::v3 ? v3::name : base::name)(args, threads);                   \
  }                                                                                         \
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
