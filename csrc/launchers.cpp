#include "launchers.h"

namespace epigraf {

CpuLevel processor_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? CpuLevel::v4
               : CpuLevel::v3;
#endif
  return CpuLevel::base;
}

bool has_cpu_level(CpuLevel level) { return is_built(level) && level <= processor_level(); }

namespace {
CpuLevel best() {
  if (has_cpu_level(CpuLevel::v4)) return CpuLevel::v4;
  return has_cpu_level(CpuLevel::v3) ? CpuLevel::v3 : CpuLevel::base;
}
CpuLevel& level_in_use() {
  static CpuLevel level = best();
  return level;
}
}  // namespace

CpuLevel cpu_level() { return level_in_use(); }
void set_cpu_level(CpuLevel level) { level_in_use() = level; }

}  // namespace epigraf
