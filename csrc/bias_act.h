// y = clamp(gain act(u), -clamp, clamp), u = x + bias, and its first two derivatives.
#pragma once

#include "common.h"
#include "elementary.h"

namespace epigraf {

// Element e has channel (e / inner) % channels, which holds for every dense layout: channels_last has inner 1.
// `bias`, `grad_bias` and all that belongs to them are in the type that is computed with. Absent tensors are null.
struct BiasActArgs {
  const void* grad_grad_x;     // double_bwd: incoming
  const void* grad_grad_bias;  // double_bwd: incoming
  const void* grad_y;          // bwd, double_bwd: incoming
  const void* x;               // null where no derivative needs it
  const void* bias;
  void* y;            // fwd
  void* grad_grad_y;  // double_bwd: the gradient to grad_y
  void* grad_x;       // bwd, double_bwd
  void* grad_bias;    // bwd, double_bwd; needs `partials`
  void* partials;     // scratch of bias_act_parts() x channels
  DType dtype;
  int act;
  double gain, clamp;  // clamp is infinite where there is none
  i64 count, channels, inner;
};

namespace EPIGRAF_ISA {

// The gradient of the bias is summed in parts whose borders depend on sizes alone, so that it has one value. A part is
// `rows` rows of `channels` elements where the channel runs fastest, else up to 1024 elements of one channel.
constexpr i64 kPartElements = 8192, kPartRows = 128, kPartInner = 1024;

EPIGRAF_HD i64 bias_act_part_rows(i64 channels) {
  return maximum<i64>(1, minimum<i64>(kPartRows, kPartElements / channels));
}

EPIGRAF_HD i64 bias_act_parts(i64 count, i64 channels, i64 inner) {
  const i64 outer = count / (channels * inner);
  return inner == 1 ? ceil_div(outer, bias_act_part_rows(channels)) : outer * ceil_div(inner, kPartInner);
}

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActs };

template <typename S>
EPIGRAF_HD S sigmoid_of(S x) {
  return S(1) / (S(1) + exp_of(-x));
}

// act(u) and its derivatives; at a kink the slope is that of the left side, the curvature 0. NaN and infinities come out
// where the reference's do: `backward` selects where torch selects, and multiplies where it multiplies.
template <int ACT, typename S>
struct Activation {
  static constexpr S slope_left = S(0.2);                                                   // lrelu
  static constexpr S selu_scale = S(1.0507009873554805), selu_alpha = S(1.6732632423543772);
  static constexpr S softplus_linear = S(20);  // where e^-u is lost next to u in fp32; torch's softplus, too

  static EPIGRAF_HD S value(S u) {
    if constexpr (ACT == kRelu) return u < S(0) ? S(0) : u;
    if constexpr (ACT == kLrelu) return u > S(0) ? u : u * slope_left;
    if constexpr (ACT == kTanh) return tanh_of(u);
    if constexpr (ACT == kSigmoid) return sigmoid_of(u);
    if constexpr (ACT == kElu) return u > S(0) ? u : expm1_of(u);
    if constexpr (ACT == kSelu) return selu_scale * (u > S(0) ? u : selu_alpha * expm1_of(u));
    if constexpr (ACT == kSoftplus) return u > softplus_linear ? u : maximum(u, S(0)) + log1p_of(exp_of(u > S(0) ? -u : u));
    if constexpr (ACT == kSwish) return u * sigmoid_of(u);
    return u;
  }

  // g act'(u)
  static EPIGRAF_HD S backward(S u, S g) {
    if constexpr (ACT == kRelu) return u <= S(0) ? S(0) : g;
    if constexpr (ACT == kLrelu) return u > S(0) ? g : g * slope_left;
    if constexpr (ACT == kTanh) {
      const S e = exp_of(u > S(0) ? S(-2) * u : S(2) * u), d = S(1) + e;
      return g * (S(4) * e / (d * d));  // 1 - tanh^2, without its cancellation
    }
    if constexpr (ACT == kSigmoid) {
      const S s = sigmoid_of(u);
      return g * (s * (S(1) - s));
    }
    if constexpr (ACT == kElu) return u > S(0) ? g : g * exp_of(u);
    if constexpr (ACT == kSelu) return selu_scale * (u > S(0) ? g : g * (selu_alpha * exp_of(u)));
    if constexpr (ACT == kSoftplus) return u > softplus_linear ? g : g * sigmoid_of(u);
    if constexpr (ACT == kSwish) {
      const S s = sigmoid_of(u);
      return g * s + g * u * (s * (S(1) - s));
    }
    return g;
  }

  static EPIGRAF_HD S curvature(S u) {
    if constexpr (ACT == kTanh) return backward(u, S(-2) * tanh_of(u));
    if constexpr (ACT == kSigmoid) {
      const S s = sigmoid_of(u);
      return s * (S(1) - s) * (S(1) - S(2) * s);
    }
    if constexpr (ACT == kElu) return u >= S(0) ? S(0) : exp_of(u);
    if constexpr (ACT == kSelu) return u >= S(0) ? S(0) : selu_scale * selu_alpha * exp_of(u);
    if constexpr (ACT == kSoftplus) {
      const S s = sigmoid_of(u);
      return u > softplus_linear ? S(0) : s * (S(1) - s);
    }
    if constexpr (ACT == kSwish) {
      const S s = sigmoid_of(u);
      return s * (S(1) - s) * (S(2) + u * (S(1) - S(2) * s));
    }
    return S(0);
  }
};

template <int ACT, typename S>
struct BiasAct {
  S gain, clamp;

  EPIGRAF_HD S value(S u) const { return clamped(unclamped(u), clamp); }

  // The gradient to u of the gradient g to y: g dy/du.
  EPIGRAF_HD S backward(S u, S g) const { return Activation<ACT, S>::backward(u, gain * unclipped(u, g)); }
  // What y changes by along h, a change of u: h dy/du.
  EPIGRAF_HD S forward(S u, S h) const { return unclipped(u, gain * Activation<ACT, S>::backward(u, h)); }
  // What backward(u, g) changes by along h: g h d2y/du2.
  EPIGRAF_HD S second(S u, S g, S h) const { return h * (gain * unclipped(u, g)) * Activation<ACT, S>::curvature(u); }

 private:
  EPIGRAF_HD S unclamped(S u) const { return gain * Activation<ACT, S>::value(u); }
  EPIGRAF_HD S unclipped(S u, S g) const { return is_clipped(unclamped(u), clamp) ? S(0) : g; }
};

// Whether act has a second derivative that is not 0 everywhere.
EPIGRAF_HD bool is_curved(int act) { return act > kLrelu; }

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)

// Calls f with a constant of the activation's number.
#define EPIGRAF_BY_ACT(act, ACT, ...)                                  \
  switch (act) {                                                       \
    case kLinear: { constexpr int ACT = kLinear; __VA_ARGS__; break; } \
    case kRelu: { constexpr int ACT = kRelu; __VA_ARGS__; break; }     \
    case kLrelu: { constexpr int ACT = kLrelu; __VA_ARGS__; break; }   \
    case kTanh: { constexpr int ACT = kTanh; __VA_ARGS__; break; }     \
    case kSigmoid: { constexpr int ACT = kSigmoid; __VA_ARGS__; break; } \
    case kElu: { constexpr int ACT = kElu; __VA_ARGS__; break; }       \
    case kSelu: { constexpr int ACT = kSelu; __VA_ARGS__; break; }     \
    case kSoftplus: { constexpr int ACT = kSoftplus; __VA_ARGS__; break; } \
    case kSwish: { constexpr int ACT = kSwish; __VA_ARGS__; break; }   \
  }

#include "launchers.h"

EPIGRAF_LAUNCHER(bias_act_fwd, BiasActArgs)
EPIGRAF_LAUNCHER(bias_act_bwd, BiasActArgs)
EPIGRAF_LAUNCHER(bias_act_double_bwd, BiasActArgs)

#endif
