#include "launchers.h"

namespace epigraf {

CpuLevel best_cpu_level() {
#if defined(EPIGRAF_HAS_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? CpuLevel::v4
               : CpuLevel::v3;
#endif
  return CpuLevel::base;
}

namespace {
CpuLevel& level_in_use() {
  static CpuLevel level = best_cpu_level();
  return level;
}
}  // namespace

CpuLevel cpu_level() { return level_in_use(); }
void set_cpu_level(CpuLevel level) { level_in_use() = level; }

}  // namespace epigraf
