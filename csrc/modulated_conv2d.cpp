#include "modulated_conv2d.h"

#include <stdexcept>

#include "cpu.h"
#include "launchers.h"

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

// A chunk is a block of rows of one image. Channels-last rows hold all channels of a pixel together (`step` apart, the
// channel runs with the lanes); contiguous ones hold one channel, and there are C of them (the lanes are columns).
template <typename S, bool LAST>
struct Chunk {
  const LayerEpilogueArgs& a;
  const i64 b, block, step, planes;
  const LeakyClamp<S> f;
  Vectors<S> vectors;

  Chunk(const LayerEpilogueArgs& args, i64 chunk)
      : a(args),
        b(chunk / blocks(args)),
        block(chunk % blocks(args)),
        step(LAST ? args.channels : 1),
        planes(LAST ? 1 : args.channels),
        f{S(args.slope), S(args.gain), S(args.clamp)},
        vectors(args, b) {}

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
    for (i64 j = 0; j < outer(columns); j++) {
      const i64 first = j * n;
      const S nj = LAST ? noise[j] : S(0), rj = LAST ? raw[j] : S(0), tj = LAST ? dot_noise[j] : S(0);
#pragma omp simd
      for (i64 l = 0; l < n; l++) {
        const i64 c = LAST ? l : 0, i = first + l;
        const S x = v[i], hx = dot_x[i], g0 = g[0][i], g1 = K > 1 ? g[1][i] : S(0);
        const S u = layer_preactivation(x, d[c], LAST ? nj : noise[l], bias[c]);
        const S tangent =
            only_if(dots.x, d[c] * hx) + only_if(dots.demod, hd[c] * x) + hb[c] + (LAST ? tj : dot_noise[l]);
        const S dot_0 = only_if(dots.style0, g0 * h0[c]), dot_1 = only_if(dots.style1, g1 * h1[c]);
        const LayerSecond<S> e(act, u, tangent, K > 1 ? g0 * s0[c] + g1 * s1[c] : g0 * s0[c],
                               K > 1 ? dot_0 + dot_1 : dot_0);
        o.gu[i] = e.gu;
        o.gu_dot[i] = e.gu_dot;
        o.grad_x[i] = only_if(dots.second, d[c] * e.gu_dot) + only_if(dots.demod, hd[c] * e.gu);
        o.out[0][i] = only_if(dots.any_tangent, s0[c] * e.y_dot) + only_if(dots.style0, h0[c] * e.y);
        if (K > 1) o.out[1][i] = only_if(dots.any_tangent, s1[c] * e.y_dot) + only_if(dots.style1, h1[c] * e.y);
        sum_d[l] += only_if(dots.x, e.gu * hx) + only_if(dots.second, e.gu_dot * x);
        sum_b[l] += e.gu_dot;
        sum_n[l] += only_if(dots.second, e.gu_dot * (LAST ? rj : raw[l]));
        sum_0[l] += only_if(dots.any_tangent, g0 * e.y_dot);
        if (K > 1) sum_1[l] += only_if(dots.any_tangent, g1 * e.y_dot);
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

template <typename S, bool LAST, int K>
void fwd_chunk(const LayerEpilogueArgs& a, i64 number) {
  Chunk<S, LAST> chunk(a, number);
  const i64 first = chunk.block * kLayerRows, last = minimum(first + kLayerRows, a.height);
  const i64 tile = minimum(chunk.tile_columns(), a.width);
  Scratch<S> noise(2 * tile), rows(3 * tile * chunk.step);
  BlurredRows<S, LAST> blurred(chunk, a.taps ? tile : 0);
  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 from = 0; from < a.width; from += tile) {
      const i64 to = minimum(from + tile, a.width), columns = to - from, n = columns * chunk.step;
      if (a.taps && first < last) blurred.start(plane, from, to, first);
      for (i64 row = first; row < last; row++) {
        chunk.noise_row(row, from, to, noise.get(), noise.get() + tile);
        const i64 offset = chunk.at(plane, row, from);
        const S* v = a.taps ? blurred.next() : read_row<S>(a.dtype, a.x, offset, n, rows.get());
        S* out[2];
        for (int k = 0; k < K; k++)
          out[k] = row_place<S>(a.dtype, a.out[k], offset, rows.get() + (1 + k) * tile * chunk.step);
        chunk.template fwd_row<K>(plane, columns, v, noise.get() + tile, out);
        for (int k = 0; k < K; k++) write_row<S>(a.dtype, a.out[k], offset, n, out[k]);
      }
    }
}

template <typename S, bool LAST, int K>
void bwd_chunk(const LayerEpilogueArgs& a, i64 number) {
  Chunk<S, LAST> chunk(a, number);
  const i64 first = chunk.block * kLayerRows, last = minimum(first + kLayerRows, a.height);
  const i64 tile = minimum(chunk.tile_columns(), a.width), step = chunk.step;
  Scratch<S> noise(2 * tile), rows(4 * tile * step), sums(kLayerSums * chunk.lanes(tile));
  Scratch<double> totals(kLayerSums * a.channels);
  for (i64 i = 0; i < kLayerSums * a.channels; i++) totals[i] = 0;
  for (i64 i = 0; i < kLayerSums * chunk.lanes(tile); i++) sums[i] = 0;
  chunk.clear_map(a.map, first, last);
  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 row = first; row < last; row++)
      for (i64 from = 0; from < a.width; from += tile) {
        const i64 columns = minimum(tile, a.width - from), n = columns * step;
        chunk.noise_row(row, from, from + columns, noise.get(), noise.get() + tile);
        const i64 offset = chunk.at(plane, row, from);
        const S* x = read_row<S>(a.dtype, a.x, offset, n, rows.get());
        const S* g[2];
        for (int k = 0; k < K; k++) g[k] = read_row<S>(a.dtype, a.grad_out[k], offset, n, rows.get() + (1 + k) * tile * step);
        S* gu = rows.get() + 3 * tile * step;
        chunk.template bwd_row<K, true>(plane, columns, x, noise.get() + tile, noise.get(), g, gu, sums.get());
        chunk.flush(plane, columns, sums.get(), totals.get());
        if (a.map) chunk.add_to_map(a.map, row, from, columns, gu);
        S* grad_x = row_place<S>(a.dtype, a.grad_x, offset, gu);
        chunk.multiply_by_demod(plane, columns, gu, grad_x);
        write_row<S>(a.dtype, a.grad_x, offset, n, grad_x);
      }
  chunk.write_partials(totals.get(), number);
}

// With the blur a chunk owns rows of grad_x. They need gu of two more rows above and one below, which belong, in the sums,
// to the neighbours; tiles of columns likewise.
template <typename S, bool LAST, int K>
void blurred_bwd_chunk(const LayerEpilogueArgs& a, i64 number) {
  Chunk<S, LAST> chunk(a, number);
  const i64 height = a.height + 1, width = a.width + 1, step = chunk.step;
  const i64 first = chunk.block * kLayerRows, last = minimum(first + kLayerRows, height);
  const i64 tile = minimum(chunk.tile_columns(), width), wide = tile + 3, size = wide * step;
  Scratch<S> noise(2 * wide), rows(8 * size), sums(kLayerSums * chunk.lanes(wide));
  Scratch<double> totals(kLayerSums * a.channels);
  for (i64 i = 0; i < kLayerSums * a.channels; i++) totals[i] = 0;
  for (i64 i = 0; i < kLayerSums * chunk.lanes(wide); i++) sums[i] = 0;
  chunk.clear_map(a.map, minimum(first, a.height), minimum(last, a.height));
  BlurredRows<S, LAST> blurred(chunk, wide);
  S taps[4];
  for (int q = 0; q < 4; q++) taps[q] = 2 * static_cast<const S*>(a.taps)[3 - q];
  S *grads[2] = {rows.get(), rows.get() + size}, *padded = rows.get() + 2 * size, *result = rows.get() + 3 * size;
  auto ring = [&](i64 row) { return rows.get() + (4 + (row + 4) % 4) * size; };

  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 from = 0; from < width; from += tile) {
      const i64 to = minimum(from + tile, width), n = (to - from) * step;
      // Columns of gu that are needed, and those of them whose sums are this tile's.
      const i64 left = maximum<i64>(from - 2, 0), right = minimum(to + 1, a.width), own = minimum(to, a.width);
      const i64 top = maximum<i64>(first - 2, 0);
      blurred.start(plane, left, right, top);
      for (i64 row = first - 2; row <= last; row++) {
        S* __restrict h = ring(row);
        if (row < 0 || row >= a.height) {
          for (i64 i = 0; i < n; i++) h[i] = 0;
        } else {
          const S* v = blurred.next();
          chunk.noise_row(row, left, right, noise.get(), noise.get() + wide);
          const S* g[2] = {nullptr, nullptr};
          for (int k = 0; k < K; k++)
            g[k] = read_row<S>(a.dtype, a.grad_out[k], chunk.at(plane, row, left), (right - left) * step, grads[k]);
          // padded holds columns from - 2 .. to.
          for (i64 i = 0; i < (left - (from - 2)) * step; i++) padded[i] = 0;
          for (i64 i = (right - (from - 2)) * step; i < n + 3 * step; i++) padded[i] = 0;
          auto part = [&](i64 begin, i64 end, bool sum) {
            if (begin >= end) return;
            const i64 skip = begin - left;
            const S* gp[2] = {g[0] + skip * step, K > 1 ? g[1] + skip * step : nullptr};
            S* gu = padded + (begin - (from - 2)) * step;
            const S *scaled = noise.get() + wide + skip, *raw = noise.get() + skip;
            if (sum) {
              chunk.template bwd_row<K, true>(plane, end - begin, v + skip * step, scaled, raw, gp, gu, sums.get());
              chunk.flush(plane, end - begin, sums.get(), totals.get());
              if (a.map) chunk.add_to_map(a.map, row, begin, end - begin, gu);
            } else {
              chunk.template bwd_row<K, false>(plane, end - begin, v + skip * step, scaled, raw, gp, gu, sums.get());
            }
          };
          const bool mine = row >= first && row < last;
          part(left, minimum(from, right), false);
          part(from, own, mine);
          part(maximum(own, left), right, false);
          const S *p0 = padded + 3 * step, *p1 = padded + 2 * step, *p2 = padded + step, *p3 = padded;
          const S t0 = taps[0], t1 = taps[1], t2 = taps[2], t3 = taps[3];
          for (i64 i = 0; i < n; i++) h[i] = t0 * p0[i] + t1 * p1[i] + t2 * p2[i] + t3 * p3[i];
        }
        const i64 done = row - 1;  // grad_x of this row has all it needs
        if (done < first || done >= last) continue;
        const S *h0 = ring(done + 1), *h1 = ring(done), *h2 = ring(done - 1), *h3 = ring(done - 2);
        const S t0 = taps[0], t1 = taps[1], t2 = taps[2], t3 = taps[3];
        for (i64 i = 0; i < n; i++) result[i] = t0 * h0[i] + t1 * h1[i] + t2 * h2[i] + t3 * h3[i];
        const i64 offset = chunk.offset(plane, done, from, height, width);
        S* grad_x = row_place<S>(a.dtype, a.grad_x, offset, result);
        chunk.multiply_by_demod(plane, to - from, result, grad_x);
        write_row<S>(a.dtype, a.grad_x, offset, n, grad_x);
      }
    }
  chunk.write_partials(totals.get(), number);
}

template <typename S, bool LAST, int K>
void double_bwd_chunk(const LayerEpilogueArgs& a, i64 number) {
  Chunk<S, LAST> chunk(a, number);
  const i64 first = chunk.block * kLayerRows, last = minimum(first + kLayerRows, a.height);
  const i64 tile = minimum(chunk.tile_columns(), a.width), step = chunk.step, size = tile * step;
  Scratch<S> noise(3 * tile), rows(10 * size), sums(kLayerSums * chunk.lanes(tile));
  Scratch<double> totals(kLayerSums * a.channels);
  for (i64 i = 0; i < kLayerSums * a.channels; i++) totals[i] = 0;
  for (i64 i = 0; i < kLayerSums * chunk.lanes(tile); i++) sums[i] = 0;
  chunk.clear_map(a.map, first, last);
  chunk.clear_map(a.gradient_map, first, last);
  S* zeros = rows.get() + 9 * size;
  for (i64 i = 0; i < size; i++) zeros[i] = 0;
  auto scratch = [&](int i) { return rows.get() + i * size; };
  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 row = first; row < last; row++)
      for (i64 from = 0; from < a.width; from += tile) {
        const i64 columns = minimum(tile, a.width - from), n = columns * step;
        chunk.noise_row(row, from, from + columns, noise.get(), noise.get() + tile);
        const S* dots = static_cast<const S*>(a.dot_noise);
        S* dot_noise = noise.get() + 2 * tile;
        for (i64 j = 0; j < columns; j++)
          dot_noise[j] = dots ? dots[(chunk.b * a.height + row) * a.width + from + j] : S(0);
        const i64 offset = chunk.at(plane, row, from);
        const S* x = read_row<S>(a.dtype, a.x, offset, n, scratch(0));
        const S* dot_x = a.dot_x ? read_row<S>(a.dtype, a.dot_x, offset, n, scratch(1)) : zeros;
        const S* g[2] = {zeros, zeros};
        for (int k = 0; k < K; k++) g[k] = read_row<S>(a.dtype, a.grad_out[k], offset, n, scratch(2 + k));
        typename Chunk<S, LAST>::Second second{row_place<S>(a.dtype, a.grad_x, offset, scratch(4)), {}, scratch(7),
                                               scratch(8)};
        for (int k = 0; k < K; k++)
          second.out[k] = row_place<S>(a.dtype, a.grad_grad_out[k], offset, scratch(5 + k));
        chunk.template double_bwd_row<K>(plane, columns, x, dot_x, noise.get() + tile, noise.get(), dot_noise, g, second,
                                         sums.get());
        chunk.flush(plane, columns, sums.get(), totals.get());
        if (a.map) chunk.add_to_map(a.map, row, from, columns, second.gu_dot);
        if (a.gradient_map) chunk.add_to_map(a.gradient_map, row, from, columns, second.gu);
        write_row<S>(a.dtype, a.grad_x, offset, n, second.grad_x);
        for (int k = 0; k < K; k++) write_row<S>(a.dtype, a.grad_grad_out[k], offset, n, second.out[k]);
      }
  chunk.write_partials(totals.get(), number);
}

// Partial sums, chunk by chunk in order, to the gradients of vectors.
template <typename S>
void finish_sums(const LayerEpilogueArgs& a) {
  const i64 channels = a.channels, blocks = layer_epilogue_blocks(a.height, a.taps != nullptr);
  const S* partials = static_cast<const S*>(a.partials);
  auto total = [&](i64 b, int sum, i64 c) {
    double value = 0;
    for (i64 block = 0; block < blocks; block++)
      value += static_cast<double>(partials[((b * blocks + block) * kLayerSums + sum) * channels + c]);
    return value;
  };
  auto per_image = [&](void* dst, int sum) {
    for (i64 b = 0; dst && b < a.batch; b++)
      for (i64 c = 0; c < channels; c++) static_cast<S*>(dst)[b * channels + c] = static_cast<S>(total(b, sum, c));
  };
  per_image(a.grad_demod, kSumDemod);
  per_image(a.grad_style[0], kSumStyle0);
  per_image(a.grad_style[1], kSumStyle1);
  for (i64 c = 0; a.grad_bias && c < channels; c++) {
    double value = 0;
    for (i64 b = 0; b < a.batch; b++) value += total(b, kSumBias, c);
    static_cast<S*>(a.grad_bias)[c] = static_cast<S>(value);
  }
  if (a.grad_strength) {
    double value = 0;
    for (i64 b = 0; b < a.batch; b++)
      for (i64 c = 0; c < channels; c++) value += total(b, kSumNoise, c);
    *static_cast<S*>(a.grad_strength) = static_cast<S>(value);
  }
}

// Without the blur rows need not be told apart: so many of them as one that it has up to kMergedPixels.
LayerEpilogueArgs merged(const LayerEpilogueArgs& args) {
  constexpr i64 kMergedPixels = 256;
  LayerEpilogueArgs a = args;
  if (a.taps) return a;
  while (a.height % 2 == 0 && a.height > 0 && a.width * 2 <= kMergedPixels) a.height /= 2, a.width *= 2;
  return a;
}

// Calls f<S, LAST, K>(args, chunk) for every chunk; S is the type that is computed with.
#define EPIGRAF_LAYER_CHUNKS_OF(S, f, args, outputs, threads)                                              \
  parallel((args).batch * layer_epilogue_blocks((args).height, (args).taps != nullptr), threads,           \
           [&](i64 chunk) {                                                                                \
             if ((args).channels_last)                                                                     \
               (outputs) > 1 ? f<S, true, 2>(args, chunk) : f<S, true, 1>(args, chunk);                    \
             else                                                                                          \
               (outputs) > 1 ? f<S, false, 2>(args, chunk) : f<S, false, 1>(args, chunk);                  \
           })
#define EPIGRAF_LAYER_CHUNKS(f, args, outputs, threads)                      \
  do {                                                                       \
    if ((args).dtype == DType::f64)                                          \
      EPIGRAF_LAYER_CHUNKS_OF(double, f, args, outputs, threads);            \
    else                                                                     \
      EPIGRAF_LAYER_CHUNKS_OF(float, f, args, outputs, threads);             \
  } while (0)

// style = factor w affine^T + bias; a chunk of its channels goes over all images while their rows of `affine` are near.
template <typename S>
void affine_of(const ModulationArgs& a, int threads) {
  constexpr i64 kChannels = 16;
  parallel(ceil_div(a.c_in, kChannels), threads, [&](i64 chunk) {
    for (i64 i = chunk * kChannels; i < minimum(a.c_in, (chunk + 1) * kChannels); i++) {
      const S* __restrict row = static_cast<const S*>(a.affine) + i * a.w_dim;
      for (i64 b = 0; b < a.batch; b++) {
        const S* __restrict w = static_cast<const S*>(a.w) + b * a.w_stride;
        S sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 d = 0; d < a.w_dim; d++) sum += row[d] * w[d];
        static_cast<S*>(a.style)[b * a.c_in + i] = S(a.factor) * sum + static_cast<const S*>(a.affine_bias)[i];
      }
    }
  });
}

template <typename S>
void modulation_fwd_of(const ModulationArgs& a, int threads) {
  if (a.affine) affine_of<S>(a, threads);
  for (i64 b = 0; a.scale && b < a.batch; b++) {
    S* style = static_cast<S*>(a.style) + b * a.c_in;
    S largest = S(a.tiny);
    for (i64 i = 0; i < a.c_in; i++) largest = maximum_or_nan(largest, style[i] < 0 ? -style[i] : style[i]);
    const S scale = S(1) / largest;
    for (i64 i = 0; i < a.c_in; i++) style[i] *= scale;
    static_cast<S*>(a.scale)[b] = scale;
  }
  const S *weight = static_cast<const S*>(a.weight), *style = static_cast<const S*>(a.style);
  S *energy = static_cast<S*>(a.energy), *demod = static_cast<S*>(a.demod);
  parallel(a.c_out, threads, [&](i64 o) {
    S* e = energy + o * a.c_in;
    const S* w = weight + o * a.c_in * a.taps;
    for (i64 i = 0; i < a.c_in; i++) {
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

void layer_epilogue_fwd(const LayerEpilogueArgs& args, int threads) {
  const LayerEpilogueArgs a = merged(args);
  EPIGRAF_LAYER_CHUNKS(fwd_chunk, a, a.out[1] ? 2 : 1, threads);
}

void layer_epilogue_bwd(const LayerEpilogueArgs& args, int threads) {
  if (!args.x && (args.out[0] || args.out[1])) throw std::runtime_error("layer_epilogue_bwd: the CPU needs x, not outputs");
  const LayerEpilogueArgs a = merged(args);
  if (a.taps)
    EPIGRAF_LAYER_CHUNKS(blurred_bwd_chunk, a, a.grad_out[1] ? 2 : 1, threads);
  else
    EPIGRAF_LAYER_CHUNKS(bwd_chunk, a, a.grad_out[1] ? 2 : 1, threads);
  a.dtype == DType::f64 ? finish_sums<double>(a) : finish_sums<float>(a);
}

void layer_epilogue_double_bwd(const LayerEpilogueArgs& args, int threads) {
  const LayerEpilogueArgs a = merged(args);
  EPIGRAF_LAYER_CHUNKS(double_bwd_chunk, a, a.grad_out[1] ? 2 : 1, threads);
  a.dtype == DType::f64 ? finish_sums<double>(a) : finish_sums<float>(a);
}

void modulation_fwd(const ModulationArgs& args, int threads) {
  args.dtype == DType::f64 ? modulation_fwd_of<double>(args, threads) : modulation_fwd_of<float>(args, threads);
}

void modulation_bwd(const ModulationArgs& args, int threads) {
  args.dtype == DType::f64 ? modulation_bwd_of<double>(args, threads) : modulation_bwd_of<float>(args, threads);
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
