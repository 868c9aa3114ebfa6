// The layer's epilogue on the CPU, chunk by chunk: the vectors of an image, the maths of a row, and rows of the blur. Included
// by layer_epilogue.cpp only.
#pragma once

#include "cpu.h"
#include "layer_epilogue.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

// Columns of a tile: what is worked on at once should stay in the cache.
constexpr i64 kTileElements = 8192, kTileColumns = 8;

// Vectors of one image, with their defaults where they are absent.
template <typename S>
class Vectors {
 public:
  Vectors(const LayerEpilogueArgs& args, i64 b) : data_(8 * args.channels) {
    const i64 c = args.channels;
    fill(0, args.demod, b, c, S(1));
    fill(1, args.bias, 0, c, S(0));
    fill(2, args.style[0], b, c, S(1));
    fill(3, args.style[1], b, c, S(1));
    fill(4, args.dot_demod, b, c, S(0));
    fill(5, args.dot_bias, 0, c, S(0));
    fill(6, args.dot_style[0], b, c, S(0));
    fill(7, args.dot_style[1], b, c, S(0));
    channels_ = c;
  }
  const S* demod() { return at(0); }
  const S* bias() { return at(1); }
  const S* style(int k) { return at(2 + k); }
  const S* dot_demod() { return at(4); }
  const S* dot_bias() { return at(5); }
  const S* dot_style(int k) { return at(6 + k); }

 private:
  void fill(int row, const void* vector, i64 b, i64 n, S absent) {
    S* dst = data_.get() + row * n;
    const S* src = static_cast<const S*>(vector) + b * n;
    for (i64 i = 0; i < n; i++) dst[i] = vector ? src[i] : absent;
  }
  const S* at(int row) { return data_.get() + row * channels_; }

  Scratch<S> data_;
  i64 channels_;
};

// `only_if` by bits, for loops: of a condition, be it the same for all elements, the compiler makes paths, and then no vectors.
template <typename S>
struct OnlyIf {
  using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
  Bits mask;
  explicit OnlyIf(bool there) : mask(there ? ~Bits(0) : Bits(0)) {}
  S operator()(S term) const {
    Bits bits;
    memcpy(&bits, &term, sizeof(S));
    bits &= mask;
    memcpy(&term, &bits, sizeof(S));
    return term;
  }
};

// Whether the backward has outputs in the place of x.
inline bool reads_outputs(const LayerEpilogueArgs& a) { return !a.x && (a.out[0] || a.out[1]); }

EPIGRAF_HD float absolute(float x) { return __builtin_fabsf(x); }
EPIGRAF_HD double absolute(double x) { return __builtin_fabs(x); }

// What the backward knows of the channels of an image where it reads outputs; `OutputLane` in layer_lanes.h says how that
// works. `along` is gain times the style of the output that is read, of two of the larger one; `limit` is the clamp of that
// output, as it was stored; `factor` gain times each style.
template <typename S>
class OutputVectors {
 public:
  OutputVectors(const LayerEpilogueArgs& a, Vectors<S>& vectors)
      : channels_(a.channels), data_(reads_outputs(a) ? 4 * a.channels : 0) {
    if (!reads_outputs(a)) return;
    const S clamp = static_cast<S>(a.clamp), gain = static_cast<S>(a.gain);
    const bool bounded = clamp - clamp == S(0);
    for (i64 c = 0; c < channels_; c++) {
      const S s0 = vectors.style(0)[c], s1 = vectors.style(1)[c];
      const S style = a.out[1] && (!a.out[0] || absolute(s1) > absolute(s0)) ? s1 : s0;
      data_[c] = gain * style;
      data_[channels_ + c] = bounded ? as_stored(a.dtype, clamp * absolute(style)) : static_cast<S>(HUGE_VAL);
      data_[2 * channels_ + c] = gain * s0;
      data_[3 * channels_ + c] = gain * s1;
    }
  }
  const S* along() const { return data_.get(); }
  const S* limit() const { return data_.get() + channels_; }
  const S* factor(int k) const { return data_.get() + (2 + k) * channels_; }

 private:
  static S as_stored(DType dtype, S value) {
    EPIGRAF_BY_DTYPE(dtype, T, return static_cast<S>(Storage<T>::load(Storage<T>::store(static_cast<Compute<T>>(value)))))
    return value;
  }

  const i64 channels_;
  Scratch<S> data_;
};

// A chunk is a block of rows of one image. Channels-last rows hold all channels of a pixel together (`step` apart, the
// channel runs with the lanes); contiguous ones hold one channel, and there are C of them (the lanes are columns).
template <typename S, bool LAST>
struct Chunk {
  const LayerEpilogueArgs& a;
  const i64 b, block, step, planes;
  const LeakyClamp<S> f;
  Vectors<S> vectors;
  const OutputVectors<S> of_outputs;

  Chunk(const LayerEpilogueArgs& args, i64 chunk)
      : a(args),
        b(chunk / blocks(args)),
        block(chunk % blocks(args)),
        step(LAST ? args.channels : 1),
        planes(LAST ? 1 : args.channels),
        f{S(args.slope), S(args.gain), S(args.clamp)},
        vectors(args, b),
        of_outputs(args, vectors) {}

  static i64 blocks(const LayerEpilogueArgs& args) { return layer_epilogue_blocks(args.height, args.taps != nullptr); }

  i64 lanes(i64 columns) const { return LAST ? a.channels : columns; }
  i64 outer(i64 columns) const { return LAST ? columns : 1; }
  i64 offset(i64 plane, i64 row, i64 column, i64 height, i64 width) const {
    return (((b * planes + plane) * height + row) * width + column) * step;
  }
  i64 at(i64 plane, i64 row, i64 column) const { return offset(plane, row, column, a.height, a.width); }
  i64 tile_columns() const { return LAST ? maximum(kTileColumns, kTileElements / maximum<i64>(a.channels, 1)) : a.width + 1; }

  // strength noise of columns [from, to), or zeros.
  void noise_row(i64 row, i64 from, i64 to, S* raw, S* scaled) const {
    const S* noise = static_cast<const S*>(a.noise);
    const S strength = a.strength ? *static_cast<const S*>(a.strength) : S(1);
    if (noise) noise += b * a.noise_stride + row * a.width;
    for (i64 j = from; j < to; j++) {
      raw[j - from] = noise ? noise[j] : S(0);
      scaled[j - from] = strength * raw[j - from];
    }
  }

  template <int K>
  void fwd_row(i64 plane, i64 columns, const S* __restrict v, const S* __restrict noise, S* const* out) {
    const S *d = vectors.demod() + plane, *bias = vectors.bias() + plane;
    const S *s0 = vectors.style(0) + plane, *s1 = vectors.style(1) + plane;
    const i64 n = lanes(columns);
    const LeakyClamp<S> g = f;
    for (i64 j = 0; j < outer(columns); j++) {
      const S* __restrict vj = v + j * n;
      S* __restrict out0 = out[0] + j * n;
      S* __restrict out1 = K > 1 ? out[1] + j * n : nullptr;
      const S nj = LAST ? noise[j] : S(0);
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0;
        const S y = g.value(layer_preactivation(vj[l], d[c], LAST ? nj : noise[l], bias[c]));
        out0[l] = y * s0[c];
        if (K > 1) out1[l] = y * s1[c];
      }
    }
  }

  // gu of a row, and sums[LayerSum][lane] where SUM.
  template <int K, bool SUM>
  void bwd_row(i64 plane, i64 columns, const S* __restrict v, const S* __restrict noise, const S* __restrict raw,
               const S* const* g, S* __restrict gu, S* sums) {
    const S *d = vectors.demod() + plane, *bias = vectors.bias() + plane;
    const S *s0 = vectors.style(0) + plane, *s1 = vectors.style(1) + plane;
    const i64 n = lanes(columns);
    S* __restrict sum_d = sums;
    S* __restrict sum_b = sums + n;
    S* __restrict sum_n = sums + 2 * n;
    S* __restrict sum_0 = sums + 3 * n;
    S* __restrict sum_1 = sums + 4 * n;
    const LeakyClamp<S> act = f;
    for (i64 j = 0; j < outer(columns); j++) {
      const S* __restrict vj = v + j * n;
      const S* __restrict g0 = g[0] + j * n;
      const S* __restrict g1 = K > 1 ? g[1] + j * n : nullptr;
      S* __restrict guj = gu + j * n;
      const S nj = LAST ? noise[j] : S(0), rj = LAST ? raw[j] : S(0);
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0;
        const S u = layer_preactivation(vj[l], d[c], LAST ? nj : noise[l], bias[c]);
        const LayerGradient<S> e(act, u, K > 1 ? g0[l] * s0[c] + g1[l] * s1[c] : g0[l] * s0[c]);
        guj[l] = e.gu;
        if (SUM) {
          sum_d[l] += e.gu * vj[l];
          sum_b[l] += e.gu;
          sum_n[l] += e.gu * (LAST ? rj : raw[l]);
          sum_0[l] += g0[l] * e.y;
          if (K > 1) sum_1[l] += g1[l] * e.y;
        }
      }
    }
  }

  // Of two rows of outputs, channel by channel, that of the larger style.
  void choose_row(i64 plane, i64 columns, const S* out0, const S* out1, S* chosen) {
    const S *s0 = vectors.style(0) + plane, *s1 = vectors.style(1) + plane;
    const i64 n = lanes(columns);
    for (i64 j = 0; j < outer(columns); j++) {
      const i64 first = j * n;
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0;
        chosen[first + l] = absolute(s1[c]) > absolute(s0[c]) ? out1[first + l] : out0[first + l];
      }
    }
  }

  // Elements offset .. offset + n of x, or of the outputs in its place; `buffers` are two of such rows.
  const S* input_row(i64 plane, i64 offset, i64 n, S* const* buffers) {
    if (!reads_outputs(a)) return read_row<S>(a.dtype, a.x, offset, n, buffers[0]);
    const S* out[2] = {nullptr, nullptr};
    for (int k = 0; k < 2; k++)
      if (a.out[k]) out[k] = read_row<S>(a.dtype, a.out[k], offset, n, buffers[k]);
    if (!out[0] || !out[1]) return out[0] ? out[0] : out[1];
    choose_row(plane, n / step, out[0], out[1], buffers[0]);
    return buffers[0];
  }

  // `bwd_row` from outputs; the sums of demod and styles are of products with them, until `finish_outputs`.
  template <int K, bool SUM>
  void outputs_bwd_row(i64 plane, i64 columns, const S* __restrict out, const S* __restrict raw, const S* const* g,
                       S* __restrict gu, S* sums) {
    const S *along = of_outputs.along() + plane, *limit = of_outputs.limit() + plane;
    const S *f0 = of_outputs.factor(0) + plane, *f1 = of_outputs.factor(1) + plane;
    const i64 n = lanes(columns);
    S* __restrict sum_d = sums;
    S* __restrict sum_b = sums + n;
    S* __restrict sum_n = sums + 2 * n;
    S* __restrict sum_0 = sums + 3 * n;
    S* __restrict sum_1 = sums + 4 * n;
    const S slope = f.slope;
    const OnlyIf<S> bounded(f.clamp - f.clamp == S(0));
    for (i64 j = 0; j < outer(columns); j++) {
      const S* __restrict outj = out + j * n;
      const S* __restrict g0 = g[0] + j * n;
      const S* __restrict g1 = K > 1 ? g[1] + j * n : nullptr;
      S* __restrict guj = gu + j * n;
      const S rj = LAST ? raw[j] : S(0);
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0;
        const S y = outj[l], grad = K > 1 ? g0[l] * f0[c] + g1[l] * f1[c] : g0[l] * f0[c];
        const S passed = absolute(bounded(y)) < limit[c] ? grad : S(0);
        const S to_u = y * along[c] > S(0) ? passed : slope * passed;
        guj[l] = to_u;
        if (SUM) {
          sum_d[l] += passed * y;
          sum_b[l] += to_u;
          sum_n[l] += to_u * (LAST ? rj : raw[l]);
          sum_0[l] += g0[l] * y;
          if (K > 1) sum_1[l] += g1[l] * y;
        }
      }
    }
  }

  // From sums of products with outputs to those that `bwd_row` has; nothing to do where x was read.
  void finish_outputs(double* totals) {
    if (!reads_outputs(a)) return;
    auto quotient = [](double x, double by) { return by == 0 ? 0 : x / by; };
    const double strength = a.strength ? static_cast<double>(*static_cast<const S*>(a.strength)) : 1;
    for (i64 c = 0; c < a.channels; c++) {
      auto total = [&](int sum) -> double& { return totals[sum * a.channels + c]; };
      const double along = static_cast<double>(of_outputs.along()[c]), gain = static_cast<double>(f.gain);
      const double known = strength * total(kSumNoise) + static_cast<double>(vectors.bias()[c]) * total(kSumBias);
      total(kSumDemod) = quotient(quotient(total(kSumDemod), along) - known, static_cast<double>(vectors.demod()[c]));
      total(kSumStyle0) = quotient(gain * total(kSumStyle0), along);
      total(kSumStyle1) = quotient(gain * total(kSumStyle1), along);
    }
  }

  // Either of them: `v` is a row of blur(x) or x, or of outputs.
  template <int K, bool SUM>
  void any_bwd_row(i64 plane, i64 columns, const S* v, const S* noise, const S* raw, const S* const* g, S* gu, S* sums) {
    if (reads_outputs(a))
      outputs_bwd_row<K, SUM>(plane, columns, v, raw, g, gu, sums);
    else
      bwd_row<K, SUM>(plane, columns, v, noise, raw, g, gu, sums);
  }

  struct Second {
    S *grad_x, *out[2], *gu, *gu_dot;  // rows
  };

  template <int K>
  void double_bwd_row(i64 plane, i64 columns, const S* __restrict v, const S* __restrict dot_x,
                      const S* __restrict noise, const S* __restrict raw, const S* __restrict dot_noise,
                      const S* const* g, const Second& o, S* sums) {
    const S *d = vectors.demod() + plane, *bias = vectors.bias() + plane;
    const S *s0 = vectors.style(0) + plane, *s1 = vectors.style(1) + plane;
    const S *hd = vectors.dot_demod() + plane, *hb = vectors.dot_bias() + plane;
    const S *h0 = vectors.dot_style(0) + plane, *h1 = vectors.dot_style(1) + plane;
    const i64 n = lanes(columns);
    S* __restrict sum_d = sums;
    S* __restrict sum_b = sums + n;
    S* __restrict sum_n = sums + 2 * n;
    S* __restrict sum_0 = sums + 3 * n;
    S* __restrict sum_1 = sums + 4 * n;
    const LeakyClamp<S> act = f;
    const LayerDots dots(a);
    const OnlyIf<S> with_x(dots.x), with_demod(dots.demod), with_style0(dots.style0), with_style1(dots.style1);
    const OnlyIf<S> with_second(dots.second), with_tangent(dots.any_tangent);
    const S *g0_row = g[0], *g1_row = K > 1 ? g[1] : nullptr;
    S* __restrict gu_row = o.gu;
    S* __restrict gu_dot_row = o.gu_dot;
    S* __restrict grad_x_row = o.grad_x;
    S* __restrict out0_row = o.out[0];
    S* __restrict out1_row = K > 1 ? o.out[1] : nullptr;
    for (i64 j = 0; j < outer(columns); j++) {
      const i64 first = j * n;
      const S nj = LAST ? noise[j] : S(0), rj = LAST ? raw[j] : S(0), tj = LAST ? dot_noise[j] : S(0);
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0, i = first + l;
        const S x = v[i], hx = dot_x[i], g0 = g0_row[i], g1 = K > 1 ? g1_row[i] : S(0);
        const S u = layer_preactivation(x, d[c], LAST ? nj : noise[l], bias[c]);
        const S tangent =
            with_x(d[c] * hx) + with_demod(hd[c] * x) + hb[c] + (LAST ? tj : dot_noise[l]);
        const S dot_0 = with_style0(g0 * h0[c]), dot_1 = with_style1(g1 * h1[c]);
        const LayerSecond<S> e(act, u, tangent, K > 1 ? g0 * s0[c] + g1 * s1[c] : g0 * s0[c],
                               K > 1 ? dot_0 + dot_1 : dot_0);
        gu_row[i] = e.gu;
        gu_dot_row[i] = e.gu_dot;
        grad_x_row[i] = with_second(d[c] * e.gu_dot) + with_demod(hd[c] * e.gu);
        out0_row[i] = with_tangent(s0[c] * e.y_dot) + with_style0(h0[c] * e.y);
        if (K > 1) out1_row[i] = with_tangent(s1[c] * e.y_dot) + with_style1(h1[c] * e.y);
        sum_d[l] += with_x(e.gu * hx) + with_second(e.gu_dot * x);
        sum_b[l] += e.gu_dot;
        sum_n[l] += with_second(e.gu_dot * (LAST ? rj : raw[l]));
        sum_0[l] += with_tangent(g0 * e.y_dot);
        if (K > 1) sum_1[l] += with_tangent(g1 * e.y_dot);
      }
    }
  }

  // Adds a row's sums to those of the chunk, and clears them.
  void flush(i64 plane, i64 columns, S* sums, double* totals) const {
    const i64 n = lanes(columns);
    for (int k = 0; k < kLayerSums; k++)
      for (i64 l = 0; l < n; l++) {
        totals[k * a.channels + (LAST ? l : plane)] += static_cast<double>(sums[k * n + l]);
        sums[k * n + l] = 0;
      }
  }

  void write_partials(const double* totals, i64 chunk) const {
    S* partials = static_cast<S*>(a.partials) + chunk * kLayerSums * a.channels;
    for (i64 i = 0; i < kLayerSums * a.channels; i++) partials[i] = static_cast<S>(totals[i]);
  }

  // The sum over channels of a row of gu, added to map[b, row, from..].
  void add_to_map(void* map, i64 row, i64 from, i64 columns, const S* gu) const {
    S* m = static_cast<S*>(map) + (b * a.height + row) * a.width + from;
    const i64 n = lanes(columns);
    for (i64 j = 0; j < outer(columns); j++) {
      S total = 0;
      for (i64 l = 0; l < n; l++) {
        if (LAST) total += gu[j * n + l];
        else m[l] += gu[l];
      }
      if (LAST) m[j] += total;
    }
  }

  void clear_map(void* map, i64 from_row, i64 to_row) const {
    if (!map) return;
    S* m = static_cast<S*>(map) + b * a.height * a.width;
    for (i64 i = from_row * a.width; i < to_row * a.width; i++) m[i] = 0;
  }

  void multiply_by_demod(i64 plane, i64 columns, const S* src, S* dst) {
    const S* d = vectors.demod() + plane;
    const i64 n = lanes(columns);
    for (i64 j = 0; j < outer(columns); j++)
      for (i64 l = 0; l < n; l++) dst[j * n + l] = src[j * n + l] * d[LAST ? l : 0];
  }
};

// Rows of v = blur(x) for columns [from, to), one after the other: four horizontally filtered rows of x are kept.
template <typename S, bool LAST>
class BlurredRows {
 public:
  BlurredRows(const Chunk<S, LAST>& chunk, i64 most_columns)
      : chunk_(chunk), size_(most_columns * chunk.step), data_(6 * size_ + 3 * chunk.step) {
    const S* taps = static_cast<const S*>(chunk.a.taps);
    // A true convolution; each axis takes half of the gain of 4.
    for (int q = 0; taps && q < 4; q++) taps_[q] = 2 * taps[3 - q];
  }

  // The next row will be `row`.
  void start(i64 plane, i64 from, i64 to, i64 row) {
    plane_ = plane, from_ = from, n_ = (to - from) * chunk_.step, columns_ = to - from, row_ = row;
    for (i64 r = row - 1; r < row + 2; r++) filter(r);
  }

  const S* next() {
    filter(row_ + 2);
    S* v = data_.get() + 4 * size_;
    const S *h0 = ring(row_ - 1), *h1 = ring(row_), *h2 = ring(row_ + 1), *h3 = ring(row_ + 2);
    const S t0 = taps_[0], t1 = taps_[1], t2 = taps_[2], t3 = taps_[3];
    for (i64 i = 0; i < n_; i++) v[i] = t0 * h0[i] + t1 * h1[i] + t2 * h2[i] + t3 * h3[i];
    row_++;
    return v;
  }

 private:
  S* ring(i64 row) { return data_.get() + (row + 4) % 4 * size_; }

  void filter(i64 row) {
    S* __restrict h = ring(row);
    const i64 step = chunk_.step, height = chunk_.a.height + 1, width = chunk_.a.width + 1;
    if (row < 0 || row >= height) {
      for (i64 i = 0; i < n_; i++) h[i] = 0;
      return;
    }
    // Columns from - 1 .. to + 1 of x, zero outside.
    S* padded = data_.get() + 5 * size_;
    const i64 first = maximum<i64>(from_ - 1, 0), last = minimum(from_ + columns_ + 2, width);
    const i64 before = (first - (from_ - 1)) * step, inside = (last - first) * step;
    for (i64 i = 0; i < before; i++) padded[i] = 0;
    const i64 offset = chunk_.offset(plane_, row, first, height, width);
    const S* x = read_row<S>(chunk_.a.dtype, chunk_.a.x, offset, inside, padded + before);
    if (x != padded + before) memcpy(padded + before, x, static_cast<size_t>(inside) * sizeof(S));
    for (i64 i = before + inside; i < n_ + 3 * step; i++) padded[i] = 0;
    const S t0 = taps_[0], t1 = taps_[1], t2 = taps_[2], t3 = taps_[3];
    const S *p0 = padded, *p1 = padded + step, *p2 = p1 + step, *p3 = p2 + step;
    for (i64 i = 0; i < n_; i++) h[i] = t0 * p0[i] + t1 * p1[i] + t2 * p2[i] + t3 * p3[i];
  }

  const Chunk<S, LAST>& chunk_;
  const i64 size_;
  Scratch<S> data_;
  S taps_[4] = {};
  i64 plane_ = 0, from_ = 0, columns_ = 0, n_ = 0, row_ = 0;
};

}  // namespace
}  // namespace EPIGRAF_ISA
}  // namespace epigraf
