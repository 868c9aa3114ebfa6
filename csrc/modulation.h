// What comes before the convolution of a modulated layer: styles and demodulation coefficients.
#pragma once

#include "common.h"

namespace epigraf {

// style[b, i] = given[b, i], where it is normalized times scale[b] = 1 / max_i |given[b, i]|;
// demod[b, o] = 1 / sqrt(sum_i style[b, i]^2 energy[o, i] + epsilon), energy[o, i] = sum_k weight[o, i, k]^2.
// The backward takes scale for a constant: demod makes up for it, but for epsilon.
struct ModulationArgs {
  const void* weight;       // [O, I, K], contiguous, as everything else here
  const void* given;        // fwd: [B, I]
  void* style;              // [B, I]; fwd: out, null where it is as given; bwd: in
  void* scale;              // [B]; fwd: out, bwd: in; null: not normalized
  void* energy;             // [O, I]; fwd: out, or in where it is known; bwd: in
  void* demod;              // [B, O]; fwd: out, bwd: in

  const void* grad_demod;       // bwd: [B, O]
  const void* grad_weight;      // bwd: [O, I, K], what else arrives at the weight, with strides; null: nothing
  const void* grad_style;       // bwd: [B, I], what else arrives at the style; null: nothing
  void* grad_weight_out;        // bwd: [O, I, K], the sum of both; null: not wanted
  void* grad_style_out;         // bwd: [B, I], the sum of both, times scale; null: not wanted
  i64 stride_out, stride_in, stride_tap;  // of grad_weight

  bool known;  // fwd: the energy is given, and the weight not read
  DType dtype;  // f32 or f64
  double epsilon, tiny;  // tiny: the least maximum that a style is divided by
  i64 batch, c_out, c_in, taps;
};

}  // namespace epigraf

#if !defined(__CUDACC_RTC__)

#include "launchers.h"

EPIGRAF_LAUNCHER(modulation_fwd, ModulationArgs)
EPIGRAF_LAUNCHER(modulation_bwd, ModulationArgs)

#endif
