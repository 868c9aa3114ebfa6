// Importance samples on the CPU, by blocks of rays as composite.cpp.
#include "sample_importance.h"

#include "rays.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

constexpr double kWeightFloor = 1e-5;  // the reference's

// Rising, NaN last. By Shell's method, with the gaps of Ciura (2001): rows are short.
template <typename S>
void sort(S* x, i64 n) {
  constexpr i64 gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
  for (const i64 gap : gaps)
    for (i64 i = gap; i < n; i++) {
      const S moved = x[i];
      i64 k = i;
      for (; k >= gap && (x[k - gap] > moved || (x[k - gap] != x[k - gap] && moved == moved)); k -= gap) x[k] = x[k - gap];
      x[k] = moved;
    }
}

// The weights of inner samples become the CDF at their `knots` ends, the midpoints.
template <typename S>
void sum_up(const S* weight, S* cdf, i64 knots) {
  double total = 0, sum = 0;
  for (i64 i = 0; i + 1 < knots; i++) {
    cdf[i + 1] = weight[i + 1] + S(kWeightFloor) + S(kWeightFloor);  // of the samples' weights, and of the density's
    total += cdf[i + 1];
  }
  cdf[0] = 0;
  for (i64 i = 1; i < knots; i++) {
    sum += cdf[i] / S(total);
    cdf[i] = S(sum);
  }
}

template <typename S>
S invert(const S* t, const S* cdf, i64 knots, S u) {
  i64 knot = 0;  // the first with a CDF of at least u, without branches: they could not be foretold
  for (i64 left = knots; left > 0;) {
    const i64 half = (left + 1) / 2;
    knot += cdf[knot + half - 1] >= u ? 0 : half;
    left -= half;
  }
  const i64 lower = maximum<i64>(knot - 1, 0), upper = minimum(knot, knots - 1);
  const S d = cdf[upper] - cdf[lower], low = (t[lower + 1] + t[lower]) / 2, high = (t[upper + 1] + t[upper]) / 2;
  return low + (u - cdf[lower]) / (d < S(kWeightFloor) ? S(1) : d) * (high - low);
}

template <typename S>
void sample_importance_of(const SampleImportanceArgs& a, int threads) {
  by_blocks(a.rays, a.samples, threads, [&](i64 first, i64 rays) {
    const i64 n = rays * a.samples;
    const S *t = static_cast<const S*>(a.t) + first * a.samples, *raw = static_cast<const S*>(a.raw);
    Scratch<S> alpha(n), interval(n), transmittance(a.samples), weight(a.samples), cdf(a.samples);
    for (i64 i = 0; i < n; i++) alpha[i] = raw[(first * a.samples + i) * a.stride];
    absorb<false>(a.density, t, alpha.get(), interval.get(), rays, a.samples);
    for (i64 r = 0; r < rays; r++, t += a.samples) {
      weigh(alpha.get() + r * a.samples, transmittance.get(), weight.get(), a.samples);
      sum_up(weight.get(), cdf.get(), a.samples - 1);
      const S* u = static_cast<const S*>(a.u) + (first + r) * a.fine;
      S* t_fine = static_cast<S*>(a.t_fine) + (first + r) * a.fine;
      for (i64 k = 0; k < a.fine; k++) t_fine[k] = invert(t, cdf.get(), a.samples - 1, u[k]);
      if (a.sorted) sort(t_fine, a.fine);
    }
  });
}

}  // namespace

void sample_importance(const SampleImportanceArgs& args, int threads) {
  args.dtype == DType::f64 ? sample_importance_of<double>(args, threads) : sample_importance_of<float>(args, threads);
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
