// What follows the convolution of a modulated layer, its epilogue
//   v = blur(x) or x,  u = demod[b, c] v + strength noise + bias[c],  y = clamp(gain lrelu(u)),  out_k = y style_k[b, c],
// with its first two derivatives. lrelu has any slope on the left: 1 makes it linear.
#pragma once

#include "common.h"

namespace epigraf {

// out, grad_out, grad_x and all that has their size are in the storage type; vectors, noise and taps are in the type that
// is computed with. Absent tensors are null: demod and style then are 1, bias and noise 0. x is [B, C, H, W], with the
// blur [B, C, H+1, W+1] (it pads by 1 on every side), in contiguous or channels-last memory as everything of its size.
// Sums over pixels go through `partials`, kLayerSums x C numbers for each of layer_epilogue_blocks() (on the GPU
// layer_epilogue_parts_cuda()) parts of an image.
struct LayerEpilogueArgs {
  const void* x;
  const void* taps;      // [4], what v is convolved with along each axis; null: no blur
  const void* demod;     // [B, C]
  const void* bias;      // [C]
  const void* noise;     // [B, H, W], or [H, W] with noise_stride 0
  const void* strength;  // [1], or null: 1
  const void* style[2];  // [B, C]
  void* out[2];          // fwd; the second may be null. bwd, in place of x: one, without a style if it is one of two, or
                         // both

  const void* grad_out[2];  // bwd, double_bwd: incoming; null where there is none
  void* grad_x;             // bwd, double_bwd
  void* grad_demod;         // bwd, double_bwd: [B, C]
  void* grad_bias;          // [C]
  void* grad_strength;      // [1]; bwd: sum gu noise
  void* grad_style[2];      // [B, C]
  void* map;                // [B, H, W], the sum over channels of gu (bwd), or of what takes its place (double_bwd)
  void* partials;

  const void* dot_x;         // double_bwd: incoming gradients to the outputs of bwd
  const void* dot_demod;     // [B, C]
  const void* dot_bias;      // [C]
  const void* dot_noise;     // [B, H, W], of strength noise
  const void* dot_style[2];  // [B, C]
  void* grad_grad_out[2];    // double_bwd: gradients to grad_out
  void* gradient_map;        // double_bwd: [B, H, W], the sum over channels of gu

  DType dtype;
  bool channels_last;
  double slope, gain, clamp;  // clamp is infinite where there is none
  i64 batch, channels, height, width, noise_stride;  // sizes of out; noise_stride in elements, between images
};

namespace EPIGRAF_ISA {

// What is summed over pixels, channel by channel.
enum LayerSum : int { kSumDemod, kSumBias, kSumNoise, kSumStyle0, kSumStyle1, kLayerSums };

// An image is cut into blocks of so many rows, whatever the number of threads, so that sums have one value.
constexpr i64 kLayerRows = 32;

EPIGRAF_HD i64 layer_epilogue_blocks(i64 height, bool blur) { return ceil_div(height + (blur ? 1 : 0), kLayerRows); }

// Parts of an image on the GPU: with the blur, blocks of rows cut into so many columns; without, at least so many pixels,
// and at most so many parts.
constexpr i64 kLayerColumns = 29, kLayerPixels = 256, kLayerParts = 256;

EPIGRAF_HD i64 layer_epilogue_pixels_cuda(i64 pixels) {
  return kLayerPixels * maximum<i64>(1, ceil_div(pixels, kLayerPixels * kLayerParts));
}

EPIGRAF_HD i64 layer_epilogue_parts_cuda(i64 height, i64 width, bool blur) {
  if (blur) return ceil_div(height + 1, kLayerRows) * ceil_div(width + 1, kLayerColumns);
  return ceil_div(height * width, layer_epilogue_pixels_cuda(height * width));
}

template <typename S>
struct LeakyClamp {
  S slope, gain, clamp;

  EPIGRAF_HD S value(S u) const { return clamped(unclamped(u), clamp); }
  // g dy/du: 0 where clipped; that of the left side at the kink.
  EPIGRAF_HD S derivative(S u, S g) const {
    const S scaled = is_clipped(unclamped(u), clamp) ? S(0) : gain * g;
    return u > S(0) ? scaled : slope * scaled;
  }

 private:
  EPIGRAF_HD S unclamped(S u) const { return gain * (u > S(0) ? u : slope * u); }
};

template <typename S>
EPIGRAF_HD S layer_preactivation(S v, S demod, S noise, S bias) {
  return demod * v + (noise + bias);
}

// One element of the epilogue's backward: gu, the gradient to u, and what adds to the sums.
template <typename S>
struct LayerGradient {
  S gu, y;
  EPIGRAF_HD LayerGradient(const LeakyClamp<S>& f, S u, S grad_y) : gu(f.derivative(u, grad_y)), y(f.value(u)) {}
};

// Which gradients come into the double backward. What is absent adds nothing, not even 0 times a NaN. `second`: whether
// there is a gradient to u, be it 0, as it is through the slope of lrelu.
struct LayerDots {
  bool x, demod, style0, style1, second, any_tangent;
  EPIGRAF_HD explicit LayerDots(const LayerEpilogueArgs& a)
      : x(a.dot_x != nullptr),
        demod(a.dot_demod != nullptr),
        style0(a.dot_style[0] != nullptr),
        style1(a.dot_style[1] != nullptr),
        second(style0 || style1 || a.slope != 1),
        any_tangent(x || demod || a.dot_bias != nullptr || a.dot_noise != nullptr) {}
};

template <typename S>
EPIGRAF_HD S only_if(bool there, S term) {
  return there ? term : S(0);
}

// One element of the double backward. `tangent` is what u changes by along the incoming gradients; `gu` the gradient to u,
// `gu_dot` what takes its place through the sums of style: L = <gu, tangent> + sum_k <grad_out_k, dot_style_k y>.
template <typename S>
struct LayerSecond {
  S y, y_dot, gu, gu_dot;
  EPIGRAF_HD LayerSecond(const LeakyClamp<S>& f, S u, S tangent, S grad_y, S grad_y_dot)
      : y(f.value(u)),
        y_dot(f.derivative(u, tangent)),
        gu(f.derivative(u, grad_y)),
        gu_dot(f.derivative(u, grad_y_dot)) {}
};

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)

#include "launchers.h"

EPIGRAF_LAUNCHER(layer_epilogue_fwd, LayerEpilogueArgs)
EPIGRAF_LAUNCHER(layer_epilogue_bwd, LayerEpilogueArgs)
EPIGRAF_LAUNCHER(layer_epilogue_double_bwd, LayerEpilogueArgs)

#endif
