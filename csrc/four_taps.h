// upfirdn2d on the CPU for what the networks ask for: four separable taps; up 2, down 2 or neither. What the taps along
// columns gave stays in registers for those along rows. Included by upfirdn2d.cpp.
#pragma once

#include "registers.h"
#include "upfirdn2d.h"

namespace epigraf {
namespace EPIGRAF_ISA {

// A plane and its filter. A plane is one channel, its pixels numbers; or a whole image, its pixels `lanes` numbers.
template <typename S>
struct FourTaps {
  const S* x;
  S* y;
  const S *columns, *rows;  // the four taps along them; they correlate
  const S* zeros;           // a row outside of the image
  i64 in_height, in_width, out_width, pad_x, pad_y, lanes;
  i64 ahead;    // how far ahead of what is read memory is fetched, in numbers; 0: not at all
  bool stream;  // whether outputs are written past the caches: whole registers of them, then, and aligned

  // Numbers of input row iy.
  EPIGRAF_HD const S* row(i64 iy) const { return iy >= 0 && iy < in_height ? x + iy * in_width * lanes : zeros; }
};

template <typename R>
struct Weights {
  R w0, w1, w2, w3;

  template <typename S>
  explicit EPIGRAF_HD Weights(const S* w) : w0(R::of(w[0])), w1(R::of(w[1])), w2(R::of(w[2])), w3(R::of(w[3])) {}
  EPIGRAF_HD R sum(R a, R b, R c, R d) const { return w0 * a + w1 * b + w2 * c + w3 * d; }
};

// The compiler keeps arrays of registers in registers if all loops over them are unrolled early.
#define EPIGRAF_UNROLL _Pragma("GCC unroll 16")

// The taps along columns of ROWS output rows, up 1.
template <typename R, int UP, int DOWN, int ROWS, typename S>
struct Columns {
  static constexpr int kRows = ROWS, kIn = DOWN * (ROWS - 1) + 4;
  const Weights<R> taps;
  const S* src[kIn];
  const i64 pitch, ahead;

  EPIGRAF_HD Columns(const FourTaps<S>& f, i64 oy) : taps(f.columns), pitch(f.in_width * f.lanes), ahead(f.ahead) {
    EPIGRAF_UNROLL for (int i = 0; i < kIn; i++) src[i] = f.row(oy * DOWN - f.pad_y + i);
  }

  EPIGRAF_HD void fetch(i64 at) const {
    if (ahead)
      EPIGRAF_UNROLL for (int i = kIn - DOWN * ROWS; i < kIn; i++) __builtin_prefetch(src[i] + at + ahead);
  }

  EPIGRAF_HD void sum(const R* x, R* v) const {
    EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++)
      v[r] = taps.sum(x[DOWN * r], x[DOWN * r + 1], x[DOWN * r + 2], x[DOWN * r + 3]);
  }
};

// Up 2: two taps meet two input rows.
template <typename R, int ROWS, typename S>
struct Columns<R, 2, 1, ROWS, S> {
  static constexpr int kRows = ROWS, kIn = 2 * ROWS;
  R taps[kIn];
  const S* src[kIn];
  const i64 pitch, ahead;

  EPIGRAF_HD Columns(const FourTaps<S>& f, i64 oy) : pitch(f.in_width * f.lanes), ahead(f.ahead) {
    EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
      const Taps of_row = taps_of(oy + r, 2, 1, f.pad_y);
      EPIGRAF_UNROLL for (int i = 0; i < 2; i++) {
        taps[2 * r + i] = R::of(f.columns[of_row.first + 2 * i]);
        src[2 * r + i] = f.row(of_row.sample + i);
      }
    }
  }

  EPIGRAF_HD void fetch(i64 at) const {
    if (ahead)
      EPIGRAF_UNROLL for (int i = 1; i < kIn; i += 4) __builtin_prefetch(src[i] + at + ahead);
  }

  EPIGRAF_HD void sum(const R* x, R* v) const {
    EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) v[r] = taps[2 * r] * x[2 * r] + taps[2 * r + 1] * x[2 * r + 1];
  }
};

// v[r] = numbers at, at + 1, ... of output row r, filtered along columns.
template <typename R, typename C>
EPIGRAF_HD void filter_columns(const C& columns, i64 at, R* v) {
  R x[C::kIn];
  columns.fetch(at);
  EPIGRAF_UNROLL for (int i = 0; i < C::kIn; i++) x[i] = R::load(columns.src[i] + at);
  columns.sum(x, v);
}

// The same where some of the numbers may lie outside of the row, and are 0.
template <typename R, typename C>
EPIGRAF_HD void filter_columns_of_padded(const C& columns, i64 at, R* v) {
  if (at >= 0 && at + R::kSize <= columns.pitch) return filter_columns(columns, at, v);
  if (at + R::kSize > 0 && at < columns.pitch) {
    R x[C::kIn];
    EPIGRAF_UNROLL for (int i = 0; i < C::kIn; i++) x[i] = R::load(columns.src[i] + at, -at, columns.pitch - at);
    columns.sum(x, v);
  } else {
    EPIGRAF_UNROLL for (int r = 0; r < C::kRows; r++) v[r] = R::of(0);
  }
}

// Numbers SHIFT, SHIFT + 1, ... from the first of b on; a comes before it, c behind it.
template <int SHIFT, typename R>
EPIGRAF_HD R shifted(R a, R b, R c) {
  if constexpr (SHIFT < 0)
    return every<R::kSize + SHIFT, 1>(a, b);
  else if constexpr (SHIFT > 0)
    return every<SHIFT, 1>(b, c);
  else
    return b;
}

// Output rows oy .. oy + ROWS of one channel, up 1. Fastest where pad_x is PAD: registers then begin where rows do.
template <int DOWN, int PAD, int ROWS, typename S>
void filter_rows(const FourTaps<S>& f, i64 oy) {
  using R = Register<S>;
  const Columns<R, 1, DOWN, ROWS, S> columns(f, oy);
  const Weights<R> taps(f.rows);
  const i64 width = f.out_width, start = PAD - f.pad_x;
  const bool stream = f.stream;
  S* out = f.y + oy * width;
  // Down 2: even and odd numbers of two registers.
  auto filter = [&](i64 at, R* even, R* odd) __attribute__((always_inline)) {
    filter_columns_of_padded(columns, at, even);
    if constexpr (DOWN == 2) {
      filter_columns_of_padded(columns, at + R::kSize, odd);
      EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
        const R left = even[r], right = odd[r];
        even[r] = every<0, 2>(left, right);
        odd[r] = every<1, 2>(left, right);
      }
    }
  };
  R a[ROWS], b[ROWS], c[ROWS], odd_a[ROWS], odd_b[ROWS], odd_c[ROWS];
  filter(start - DOWN * R::kSize, a, odd_a);
  filter(start, b, odd_b);
  for (i64 ox = 0; ox < width; ox += R::kSize) {
    filter(start + (ox + R::kSize) * DOWN, c, odd_c);
    EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
      R sum;
      if constexpr (DOWN == 1) {
        sum = taps.sum(shifted<-PAD>(a[r], b[r], c[r]), shifted<1 - PAD>(a[r], b[r], c[r]),
                       shifted<2 - PAD>(a[r], b[r], c[r]), shifted<3 - PAD>(a[r], b[r], c[r]));
      } else {
        sum = taps.sum(shifted<-1>(odd_a[r], odd_b[r], odd_c[r]), b[r], odd_b[r], shifted<1>(a[r], b[r], c[r]));
        odd_a[r] = odd_b[r];
        odd_b[r] = odd_c[r];
      }
      a[r] = b[r];
      b[r] = c[r];
      sum.store(out + r * width + ox, width - ox, stream);
    }
  }
}

// Up 2: sample i and the next make outputs 2 i + pad_x - 1, by taps 1 and 3, and 2 i + pad_x, by taps 0 and 2.
// Output rows oy .. oy + ROWS of one channel; pad_x is even, so that outputs 2 j and 2 j + 1 share a sample.
template <int ROWS, typename S>
void double_rows(const FourTaps<S>& f, i64 oy) {
  using R = Register<S>;
  const Columns<R, 2, 1, ROWS, S> columns(f, oy);
  const Weights<R> taps(f.rows);
  const i64 width = f.out_width, start = 1 - f.pad_x / 2;
  const bool stream = f.stream;
  S* out = f.y + oy * width;
  R a[ROWS], b[ROWS], c[ROWS];
  filter_columns_of_padded(columns, start - R::kSize, a);
  filter_columns_of_padded(columns, start, b);
  for (i64 ox = 0; ox < width; ox += 2 * R::kSize) {
    filter_columns_of_padded(columns, start + ox / 2 + R::kSize, c);
    EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
      const R even = taps.w0 * shifted<-1>(a[r], b[r], c[r]) + taps.w2 * b[r];
      const R odd = taps.w1 * b[r] + taps.w3 * shifted<1>(a[r], b[r], c[r]);
      S* to = out + r * width + ox;
      alternate<0>(even, odd).store(to, width - ox, stream);
      alternate<R::kSize / 2>(even, odd).store(to + R::kSize, width - ox - R::kSize, stream);
      a[r] = b[r];
      b[r] = c[r];
    }
  }
}

// The same of pixels, lanes first .. end; all lanes of one pixel before the next, so that memory is read in order. What
// the last pixels gave waits in `held`: here what the taps along columns made of them, [4][ROWS][lanes].
template <typename R, int ROWS, typename S>
void filter_pixels(const FourTaps<S>& f, i64 oy, i64 first, i64 end, S* held) {
  const Columns<R, 1, 1, ROWS, S> columns(f, oy);
  const Weights<R> taps(f.rows);
  const i64 lanes = f.lanes, in_width = f.in_width, out_width = f.out_width, pad = f.pad_x;
  const bool stream = f.stream;
  for (i64 ox = -3; ox < out_width; ox++) {
    const i64 ix = ox + 3 - pad;
    const bool inside = ix >= 0 && ix < in_width;
    auto place = [&](i64 tap) { return held + ((ox + tap) & 3) * ROWS * lanes; };
    const S *h0 = place(0), *h1 = place(1), *h2 = place(2);
    S *h3 = place(3), *out = f.y + (oy * out_width + ox) * lanes;
    for (i64 lane = first; lane < end; lane += R::kSize) {
      R v[ROWS] = {};
      if (inside) filter_columns(columns, ix * lanes + lane, v);
      EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
        const i64 at = r * lanes + lane;
        v[r].store(h3 + at);
        if (ox < 0) continue;
        const R sum = taps.sum(R::load(h0 + at), R::load(h1 + at), R::load(h2 + at), v[r]);
        sum.store(out + r * out_width * lanes + lane, R::kSize, stream);
      }
    }
  }
}

// Down 2: an output's first two pixels are the last two of the one before. What they give it waits, [ROWS][lanes].
template <typename R, int ROWS, typename S>
void halve_pixels(const FourTaps<S>& f, i64 oy, i64 first, i64 end, S* held) {
  const Columns<R, 1, 2, ROWS, S> columns(f, oy);
  const Weights<R> taps(f.rows);
  const i64 lanes = f.lanes, in_width = f.in_width, out_width = f.out_width, pad = f.pad_x;
  const bool stream = f.stream;
  for (i64 ox = -1; ox < out_width; ox++) {
    const i64 ix = 2 * ox + 2 - pad;
    const bool u_inside = ix >= 0 && ix < in_width, v_inside = ix + 1 >= 0 && ix + 1 < in_width;
    S* out = f.y + (oy * out_width + ox) * lanes;
    for (i64 lane = first; lane < end; lane += R::kSize) {
      R u[ROWS] = {}, v[ROWS] = {};
      if (u_inside) filter_columns(columns, ix * lanes + lane, u);
      if (v_inside) filter_columns(columns, (ix + 1) * lanes + lane, v);
      EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
        S* half = held + r * lanes + lane;
        const R sum = ox < 0 ? R::of(0) : R::load(half) + taps.w2 * u[r] + taps.w3 * v[r];
        (taps.w0 * u[r] + taps.w1 * v[r]).store(half);
        if (ox >= 0) sum.store(out + r * out_width * lanes + lane, R::kSize, stream);
      }
    }
  }
}

// Up 2: what the taps along columns made of the last pixel waits, [ROWS][lanes].
template <typename R, int ROWS, typename S>
void double_pixels(const FourTaps<S>& f, i64 oy, i64 first, i64 end, S* held) {
  const Columns<R, 2, 1, ROWS, S> columns(f, oy);
  const Weights<R> taps(f.rows);
  const i64 lanes = f.lanes, in_width = f.in_width, out_width = f.out_width, pad = f.pad_x;
  const bool stream = f.stream;
  const i64 before = floor_div(-pad, 2), last = floor_div(out_width - pad, 2) + 1;
  for (i64 ix = before; ix <= last; ix++) {
    const i64 ox = 2 * (ix - 1) + pad;  // of the even output; the odd one comes before it
    const bool inside = ix >= 0 && ix < in_width, has_pair = ix > before;
    const bool odd = has_pair && ox > 0 && ox <= out_width, even = has_pair && ox >= 0 && ox < out_width;
    S* out = f.y + (oy * out_width + ox) * lanes;
    for (i64 lane = first; lane < end; lane += R::kSize) {
      R v[ROWS] = {};
      if (inside) filter_columns(columns, ix * lanes + lane, v);
      EPIGRAF_UNROLL for (int r = 0; r < ROWS; r++) {
        S *last_pixel = held + r * lanes + lane, *to = out + r * out_width * lanes + lane;
        const R u = has_pair ? R::load(last_pixel) : R::of(0);
        v[r].store(last_pixel);
        if (odd) (taps.w1 * u + taps.w3 * v[r]).store(to - lanes, R::kSize, stream);
        if (even) (taps.w0 * u + taps.w2 * v[r]).store(to, R::kSize, stream);
      }
    }
  }
}

#undef EPIGRAF_UNROLL

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
