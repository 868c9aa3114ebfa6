// The tri-plane decoder: out = w1 lrelu(w0 feature + b0) + b1, `feature` the mean of three bilinear samples, one of each
// plane, at points or at (origin + t direction) / cube_scale. lrelu has slope 0.2 and gain sqrt(2). On the CPU only.
#pragma once

#include "common.h"

namespace epigraf {

struct DecodeTriplaneArgs {
  const void* planes;      // [batch, height, width, 3, channels]
  const void* origins;     // [batch, rays, 3]
  const void* directions;  // [batch, rays, 3], or null: the origins are the points
  const void* t;           // [batch, rays, samples], null with the directions
  const void *w0, *b0;     // [hidden, channels], [hidden]
  const void *w1, *b1;     // [outputs, hidden], [outputs]
  void* y;                 // [batch, rays, samples, outputs]
  DType dtype;             // f32 or f64, of everything
  i64 batch, rays, samples, channels, height, width, hidden, outputs;
  double cube_scale;
  const i64* first;  // [batch, 2], row and column in whole planes of the first texel; or null: the planes are whole
  i64 whole_height, whole_width;
  // Of the backward. A gradient that is null is not computed; those of the network are given together or not at all.
  const void* grad_y;                              // as y
  void* grad_planes;                               // as planes, cleared by the launcher
  void *grad_w0, *grad_b0, *grad_w1, *grad_b1;
};

namespace EPIGRAF_ISA {

// Coordinates that each plane is read at: (horizontal, vertical).
constexpr int kPlaneAxes[3][2] = {{0, 1}, {0, 2}, {1, 2}};

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)
#include "launchers.h"

EPIGRAF_CPU_LAUNCHER(decode_triplane_fwd, DecodeTriplaneArgs)
EPIGRAF_CPU_LAUNCHER(decode_triplane_bwd, DecodeTriplaneArgs)
#endif
