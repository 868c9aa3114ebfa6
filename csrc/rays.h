// Density and absorption along rays, of blocks of samples that stay in the nearest cache. On the CPU only.
#pragma once

#include "composite.h"
#include "cpu.h"
#include "elementary.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr i64 kBlockSamples = 2048;
constexpr double kTransmittanceFloor = 1e-10;  // the reference's: added to 1 - alpha

// Calls f(first ray, rays) for all rays, a block each.
template <typename F>
inline void by_blocks(i64 rays, i64 samples, int threads, const F& f) {
  const i64 most = maximum<i64>(kBlockSamples / maximum<i64>(samples, 1), 1);
  parallel(ceil_div(rays, most), threads, [&](i64 chunk) { f(chunk * most, minimum(most, rays - chunk * most)); });
}

template <typename S>
struct Softplus {
  S beta;
  static constexpr S linear = S(20);  // where e^-z is lost next to z in fp32; torch's softplus, too
  EPIGRAF_HD S value(S x) const {
    const S z = beta * x;
    return z > linear ? x : (maximum(z, S(0)) + log1p_of(exp_of(z > S(0) ? -z : z))) / beta;
  }
  EPIGRAF_HD S slope(S x) const {
    const S z = beta * x, e = exp_of(z > S(0) ? -z : z), s = S(1) / (S(1) + e);
    return z > linear ? S(1) : z > S(0) ? s : e * s;
  }
};

template <typename S>
struct Relu {
  EPIGRAF_HD S value(S x) const { return x < S(0) ? S(0) : x; }
  EPIGRAF_HD S slope(S x) const { return x <= S(0) ? S(0) : S(1); }
};

template <bool SLOPE, typename S, typename F>
inline void absorb_by(const F& f, S shift, S* __restrict raw, S* __restrict interval, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    const S x = raw[i] + shift, alpha = -expm1_of(-interval[i] * f.value(x));
    if (SLOPE) interval[i] *= (S(1) - alpha) * f.slope(x);
    raw[i] = alpha;
  }
}

// alpha = 1 - exp(-interval density) in place of raw densities and, with SLOPE, its derivative to them in `interval`:
// which may be NaN where a density is clipped, as 0 times an interval that is none.
template <bool SLOPE, typename S>
inline void absorb(const DensitySettings& density, const S* t, S* raw, S* interval, i64 rays, i64 samples) {
  const i64 n = rays * samples;
  for (i64 i = 0; i + 1 < n; i++) interval[i] = t[i + 1] - t[i];
  for (i64 r = 1; r <= rays; r++) interval[r * samples - 1] = S(density.last_interval);
  const S shift = S(density.density_shift);
  if (density.relu)
    absorb_by<SLOPE>(Relu<S>{}, shift, raw, interval, n);
  else
    absorb_by<SLOPE>(Softplus<S>{S(density.softplus_beta)}, shift, raw, interval, n);
}

// T of a ray's samples, and w = alpha T. The product is kept in fp64, as torch's cumprod keeps it.
template <typename S>
inline void weigh(const S* alpha, S* transmittance, S* weight, i64 samples) {
  double passed = 1;
  for (i64 k = 0; k < samples; k++) {
    transmittance[k] = S(passed);
    weight[k] = alpha[k] * transmittance[k];
    passed *= S(1) - alpha[k] + S(kTransmittanceFloor);
  }
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
