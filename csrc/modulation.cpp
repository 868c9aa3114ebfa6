// The modulation on the CPU: work is cut by channels, and every sum has one order.
#include "modulation.h"

#include "cpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

template <typename S>
void modulation_fwd_of(const ModulationArgs& a, int threads) {
  for (i64 b = 0; a.scale && b < a.batch; b++) {
    const S* given = static_cast<const S*>(a.given) + b * a.c_in;
    S *style = static_cast<S*>(a.style) + b * a.c_in, largest = S(a.tiny);
    for (i64 i = 0; i < a.c_in; i++) largest = maximum_or_nan(largest, given[i] < 0 ? -given[i] : given[i]);
    const S scale = S(1) / largest;
    for (i64 i = 0; i < a.c_in; i++) style[i] = given[i] * scale;
    static_cast<S*>(a.scale)[b] = scale;
  }
  const S *weight = static_cast<const S*>(a.weight), *style = static_cast<const S*>(a.scale ? a.style : a.given);
  S *energy = static_cast<S*>(a.energy), *demod = static_cast<S*>(a.demod);
  parallel(a.c_out, threads, [&](i64 o) {
    S* e = energy + o * a.c_in;
    const S* w = weight + o * a.c_in * a.taps;
    for (i64 i = 0; !a.known && i < a.c_in; i++) {
      S sum = 0;
      for (i64 k = 0; k < a.taps; k++) sum += w[i * a.taps + k] * w[i * a.taps + k];
      e[i] = sum;
    }
    for (i64 b = 0; b < a.batch; b++) {
      const S* s = style + b * a.c_in;
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 i = 0; i < a.c_in; i++) sum += s[i] * s[i] * e[i];
      demod[b * a.c_out + o] = S(1) / sqrt(sum + S(a.epsilon));
    }
  });
}

template <typename S>
void modulation_bwd_of(const ModulationArgs& a, int threads) {
  const S *weight = static_cast<const S*>(a.weight), *style = static_cast<const S*>(a.style);
  const S *energy = static_cast<const S*>(a.energy), *demod = static_cast<const S*>(a.demod);
  const S *grad_demod = static_cast<const S*>(a.grad_demod), *grad_weight = static_cast<const S*>(a.grad_weight);
  const S *grad_style = static_cast<const S*>(a.grad_style), *scale = static_cast<const S*>(a.scale);
  S *weight_out = static_cast<S*>(a.grad_weight_out), *style_out = static_cast<S*>(a.grad_style_out);
  // Twice the gradient to demod^-2: demod = (...)^(-1/2).
  auto inner = [&](i64 b, i64 o) {
    const S d = demod[b * a.c_out + o];
    return -grad_demod[b * a.c_out + o] * d * d * d;
  };
  if (weight_out)
    parallel(a.c_out, threads, [&](i64 o) {
      Scratch<S> factor(a.c_in);
      for (i64 i = 0; i < a.c_in; i++) factor[i] = 0;
      for (i64 b = 0; b < a.batch; b++) {
        const S q = inner(b, o);
        const S* s = style + b * a.c_in;
        for (i64 i = 0; i < a.c_in; i++) factor[i] += q * s[i] * s[i];
      }
      const S* w = weight + o * a.c_in * a.taps;
      S* out = weight_out + o * a.c_in * a.taps;
      for (i64 i = 0; i < a.c_in; i++) {
        const S* g = grad_weight + o * a.stride_out + i * a.stride_in;
        for (i64 k = 0; k < a.taps; k++)
          out[i * a.taps + k] = factor[i] * w[i * a.taps + k] + (grad_weight ? g[k * a.stride_tap] : S(0));
      }
    });
  if (style_out)
    parallel(a.batch, threads, [&](i64 b) {
      S* out = style_out + b * a.c_in;
      for (i64 i = 0; i < a.c_in; i++) out[i] = 0;
      for (i64 o = 0; o < a.c_out; o++) {
        const S q = inner(b, o);
        const S* e = energy + o * a.c_in;
        for (i64 i = 0; i < a.c_in; i++) out[i] += q * e[i];
      }
      const S s = scale ? scale[b] : S(1);
      for (i64 i = 0; i < a.c_in; i++)
        out[i] = s * (out[i] * style[b * a.c_in + i] + (grad_style ? grad_style[b * a.c_in + i] : S(0)));
    });
}

}  // namespace

void modulation_fwd(const ModulationArgs& args, int threads) {
  args.dtype == DType::f64 ? modulation_fwd_of<double>(args, threads) : modulation_fwd_of<float>(args, threads);
}

void modulation_bwd(const ModulationArgs& args, int threads) {
  args.dtype == DType::f64 ? modulation_bwd_of<double>(args, threads) : modulation_bwd_of<float>(args, threads);
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
