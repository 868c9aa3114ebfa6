// Fine depths where the coarse samples saw something: the inverted CDF of their weights, over the midpoints of their
// depths. On the CPU only.
#pragma once

#include "composite.h"

namespace epigraf {

struct SampleImportanceArgs {
  const void* t;              // [rays, samples], every ray's rises
  const void* raw;            // [rays, samples], raw densities, each `stride` numbers behind the one before
  const void* u;              // [rays, fine], in [0, 1]
  void* t_fine;               // [rays, fine], sorted or in the order of u
  DType dtype;                // f32 or f64, of everything
  i64 rays, samples, fine, stride;
  DensitySettings density;
  bool sorted;
};

}  // namespace epigraf

EPIGRAF_CPU_LAUNCHER(sample_importance, SampleImportanceArgs)
