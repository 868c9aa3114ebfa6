// The volume integral on the CPU. Rays go through in blocks: what is the same for all samples is computed for a block at
// once, in vectors, and what runs along a ray is summed in fp64.
#include "composite.h"

#include "rays.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

// The samples of a block's rays, in order.
template <typename S>
struct Samples {
  const CompositeArgs& a;
  const i64 first, samples;
  Scratch<S> t, alpha, slope, transmittance, weight;
  Scratch<i64> place;  // of a ray's k-th sample among its coarse ones and the fine ones after them

  Samples(const CompositeArgs& a, i64 first, i64 rays, bool with_slope)
      : a(a), first(first), samples(a.coarse + a.fine), t(rays * samples), alpha(rays * samples), slope(rays * samples),
        transmittance(rays * samples), weight(rays * samples), place(rays * samples) {
    for (i64 r = 0; r < rays; r++) merge(r);
    auto* absorbing = with_slope ? absorb<true, S> : absorb<false, S>;
    absorbing(a.density, t.get(), alpha.get(), slope.get(), rays, samples);
  }

  // The raw density of a ray's k-th sample.
  S raw(i64 r, i64 k) const {
    const S value = values(r, place[r * samples + k])[a.channels - 1];
    return a.noise ? value + static_cast<const S*>(a.noise)[(first + r) * samples + k] : value;
  }

  // Whether relu made it 0: then its gradient is 0, whatever else is NaN.
  bool is_clipped(i64 r, i64 k) const { return a.density.relu && raw(r, k) + S(a.density.density_shift) <= S(0); }

  const S* values(i64 r, i64 where) const {
    const i64 ray = first + r;
    return where < a.coarse ? static_cast<const S*>(a.values) + (ray * a.coarse + where) * a.channels
                            : static_cast<const S*>(a.values_fine) + (ray * a.fine + where - a.coarse) * a.channels;
  }

  // Sorts both sets into one; of equal depths the fine one comes first, and NaN comes last.
  void merge(i64 r) {
    const i64 ray = first + r;
    const S* coarse = static_cast<const S*>(a.t) + ray * a.coarse;
    const S* fine = static_cast<const S*>(a.t_fine) + ray * a.fine;
    for (i64 i = 0, j = 0, k = r * samples; k < (r + 1) * samples; k++) {
      const bool from_fine = j < a.fine && (i == a.coarse || fine[j] <= coarse[i] || coarse[i] != coarse[i]);
      t[k] = from_fine ? fine[j] : coarse[i];
      place[k] = from_fine ? a.coarse + j++ : i++;
      alpha[k] = raw(r, k - r * samples);  // until `absorb`
    }
  }

  // Transmittances and weights of a ray; gives the sum of the weights, before `last_back`.
  double weigh_ray(i64 r) {
    S* w = weight.get() + r * samples;
    weigh(alpha.get() + r * samples, transmittance.get() + r * samples, w, samples);
    double sum = 0;
    for (i64 k = 0; k < samples; k++) sum += w[k];
    if (a.last_back) w[samples - 1] = S(w[samples - 1] + (1 - sum));
    return sum;
  }
};

template <typename S, i64 COLOURS>
void composite_fwd_of(const CompositeArgs& a, int threads) {
  const i64 samples = a.coarse + a.fine, colours = COLOURS ? COLOURS : a.channels - 1;
  S *rgb = static_cast<S*>(a.rgb), *depth = static_cast<S*>(a.depth), *weight_sum = static_cast<S*>(a.weight_sum);
  S *final_transmittance = static_cast<S*>(a.final_transmittance), *weights = static_cast<S*>(a.weights);
  const S* background = static_cast<const S*>(a.background);
  by_blocks(a.rays, samples, threads, [&](i64 first, i64 rays) {
    Samples<S> block(a, first, rays, false);
    Scratch<double> scratch(colours);
    double* sums = scratch.get();
    for (i64 r = 0; r < rays; r++) {
      const i64 ray = first + r;
      const double sum = block.weigh_ray(r);
      const S *w = block.weight.get() + r * samples, last = block.transmittance[(r + 1) * samples - 1];
      double along = 0;
      for (i64 c = 0; c < colours; c++)
        sums[c] = (a.white_background && c < 3 ? 1 - sum : 0) + (background ? last * background[ray * colours + c] : S(0));
      for (i64 k = 0; k < samples; k++) {
        const S* value = block.values(r, block.place[r * samples + k]);
        for (i64 c = 0; c < colours; c++) sums[c] += w[k] * value[c];
        along += w[k] * block.t[r * samples + k];
        if (weights) weights[ray * samples + k] = w[k];
      }
      for (i64 c = 0; c < colours; c++) rgb[ray * colours + c] = S(sums[c]);
      depth[ray] = S(along), weight_sum[ray] = S(sum), final_transmittance[ray] = last;
    }
  });
}

template <typename S, i64 COLOURS>
void composite_bwd_of(const CompositeArgs& a, int threads) {
  const i64 samples = a.coarse + a.fine, colours = COLOURS ? COLOURS : a.channels - 1;
  const S* background = static_cast<const S*>(a.background);
  auto given = [](const void* gradients, i64 i) { return gradients ? static_cast<const S*>(gradients)[i] : S(0); };
  by_blocks(a.rays, samples, threads, [&](i64 first, i64 rays) {
    Samples<S> block(a, first, rays, true);
    Scratch<S> grad_rgb(colours), grad_weight(samples);
    for (i64 r = 0; r < rays; r++) {
      const i64 ray = first + r, start = r * samples, last = samples - 1;
      block.weigh_ray(r);
      const S *w = block.weight.get() + start, *passed = block.transmittance.get() + start;
      double to_sum = given(a.grad_weight_sum, ray), to_passed = given(a.grad_transmittance, ray);
      for (i64 c = 0; c < colours; c++) {
        grad_rgb[c] = given(a.grad_rgb, ray * colours + c);
        if (a.white_background && c < 3) to_sum -= grad_rgb[c];
        if (background) to_passed += background[ray * colours + c] * grad_rgb[c];
        if (a.grad_background) static_cast<S*>(a.grad_background)[ray * colours + c] = passed[last] * grad_rgb[c];
      }
      for (i64 k = 0; k < samples; k++) {
        const S* value = block.values(r, block.place[start + k]);
        S sum = given(a.grad_depth, ray) * block.t[start + k] + given(a.grad_weights, ray * samples + k);
        for (i64 c = 0; c < colours; c++) sum += grad_rgb[c] * value[c];
        grad_weight[k] = sum;
      }
      if (a.last_back) to_sum -= grad_weight[last];
      // From the last sample on: `to_passed` becomes the gradient to T of the sample before.
      for (i64 k = last; k >= 0; k--) {
        const double to_weight = grad_weight[k] + to_sum, behind = k == last ? 0 : to_passed;
        const S alpha = block.alpha[start + k];
        const S to_raw = block.is_clipped(r, k) ? S(0) : S((to_weight - behind) * passed[k]) * block.slope[start + k];
        to_passed = to_weight * alpha + (k == last ? to_passed : behind * (S(1) - alpha + S(kTransmittanceFloor)));
        S* out = static_cast<S*>(a.grad_values) + (ray * samples + block.place[start + k]) * a.channels;
        for (i64 c = 0; c < colours; c++) out[c] = w[k] * grad_rgb[c];
        out[colours] = to_raw;
        if (a.grad_noise) static_cast<S*>(a.grad_noise)[ray * samples + k] = to_raw;
      }
    }
  });
}

// Calls `way` for the dtype; of three colours, which are the rule, by code for three.
#define EPIGRAF_COMPOSITE(way)                                                           \
  void way(const CompositeArgs& args, int threads) {                                     \
    const bool three = args.channels == 4;                                               \
    if (args.dtype == DType::f64)                                                        \
      three ? way##_of<double, 3>(args, threads) : way##_of<double, 0>(args, threads);   \
    else                                                                                 \
      three ? way##_of<float, 3>(args, threads) : way##_of<float, 0>(args, threads);     \
  }

}  // namespace

EPIGRAF_COMPOSITE(composite_fwd)
EPIGRAF_COMPOSITE(composite_bwd)

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
