// The volume integral: rgb = sum_i w_i c_i and depth = sum_i w_i t_i over one or two sets of samples in order of t, with
// w_i = a_i T_i, a_i = 1 - exp(-(t_{i+1} - t_i) density_i), T_i = prod_{j<i} (1 - a_j + 1e-10). On the CPU only.
#pragma once

#include "common.h"
#include "launchers.h"

namespace epigraf {

// density = activation(raw + shift), the activation being relu(x) or log(1 + e^(beta x)) / beta.
struct DensitySettings {
  bool relu;
  double softplus_beta, density_shift, last_interval;
};

struct CompositeArgs {
  const void *t, *values;            // [rays, coarse], [rays, coarse, channels]; every ray's t rises
  const void *t_fine, *values_fine;  // [rays, fine], [rays, fine, channels]
  const void* noise;                 // [rays, coarse + fine], on the raw density of sorted samples; or null
  const void* background;            // [rays, channels - 1], or null
  DType dtype;                       // f32 or f64, of everything
  i64 rays, coarse, fine, channels;  // channels: colours, raw density last
  DensitySettings density;
  bool last_back, white_background;
  // Of the forward; `weights`, [rays, coarse + fine], may be null.
  void *rgb, *depth, *weight_sum, *final_transmittance, *weights;
  // Of the backward: a null pointer stands for zeros, or for what is not computed.
  const void *grad_rgb, *grad_depth, *grad_weight_sum, *grad_transmittance, *grad_weights;
  void* grad_values;  // [rays, coarse + fine, channels]: both sets, one after the other
  void *grad_noise, *grad_background;
};

}  // namespace epigraf

EPIGRAF_CPU_LAUNCHER(composite_fwd, CompositeArgs)
EPIGRAF_CPU_LAUNCHER(composite_bwd, CompositeArgs)
