// Upsample by zero insertion, pad, filter, downsample:
//   y[oy, ox] = gain sum_ij taps[i, j] x[(oy down + i - pad_y) / up, (ox down + j - pad_x) / up],
// over the taps whose quotients are whole and inside the image. `taps` correlate; flip = false reverses them. Then
//   y[oy, ox] += clamp(added[oy, ox] + bias),
// where there is something to add: bias_act's linear case, which its derivatives come from, too.
#pragma once

#include "bias_act.h"
#include "common.h"

namespace epigraf {

struct UpFirDnArgs {
  const void* x;      // [batch, channels, in_height, in_width]
  const void* taps;   // [taps_y, taps_x], or [taps_x] for both axes, in the type that is computed with
  const void* added;  // as y, in its memory layout; null: nothing
  const void* bias;   // [channels], in the type that is computed with; null: 0
  void* y;            // [batch, channels, out_height, out_width]
  DType dtype, added_dtype;  // that of `added` is the same or f16
  i64 batch, channels, in_height, in_width, out_height, out_width, taps_y, taps_x;
  bool separable, channels_last, flip;
  i64 up, down, pad_x, pad_y;  // the padding in front; what lies behind follows from the sizes
  double gain, clamp;  // clamp is infinite where there is none
};

namespace EPIGRAF_ISA {

EPIGRAF_HD i64 floor_div(i64 a, i64 b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The taps that meet samples for output `o` of one axis: first, first + up, ...; the first one meets sample `sample`.
struct Taps {
  i64 first, sample;
};

EPIGRAF_HD Taps taps_of(i64 o, i64 up, i64 down, i64 pad) {
  const i64 start = o * down - pad, sample = -floor_div(-start, up);
  return Taps{sample * up - start, sample};
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)
#include "launchers.h"

EPIGRAF_LAUNCHER(upfirdn2d, UpFirDnArgs)
#endif
