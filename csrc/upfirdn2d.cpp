// upfirdn2d on the CPU: every output row is a weighted sum of rows, so all loops run over contiguous memory.
//
// A "row" is one row of a plane. Channels-last, a plane is a whole image and its elements are pixels of `lanes` numbers;
// else a plane is one channel and lanes is 1. Samples of a row are padded with zeros where taps reach beyond it.
#include "upfirdn2d.h"

#include <memory>
#include <type_traits>

#include "cpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

constexpr i64 kChunkElements = 32768;  // outputs that are worth a thread's attention
constexpr i64 kBlock = 2048;           // elements that stay in the nearest cache while many taps go over them

template <int N, bool ADD, typename S>
inline void weigh(S* __restrict out, const S* const* src, const S* w, i64 n) {
  const S* s0 = src[0];
  const S* s1 = N > 1 ? src[1] : s0;
  const S* s2 = N > 2 ? src[2] : s0;
  const S* s3 = N > 3 ? src[3] : s0;
  const S w0 = w[0], w1 = N > 1 ? w[1] : S(0), w2 = N > 2 ? w[2] : S(0), w3 = N > 3 ? w[3] : S(0);
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    S sum = ADD ? out[i] + w0 * s0[i] : w0 * s0[i];
    if (N > 1) sum += w1 * s1[i];
    if (N > 2) sum += w2 * s2[i];
    if (N > 3) sum += w3 * s3[i];
    out[i] = sum;
  }
}

template <bool ADD, typename S>
inline void weigh_up_to_four(S* out, const S* const* src, const S* w, i64 count, i64 n) {
  switch (count) {
    case 1: return weigh<1, ADD>(out, src, w, n);
    case 2: return weigh<2, ADD>(out, src, w, n);
    case 3: return weigh<3, ADD>(out, src, w, n);
    default: return weigh<4, ADD>(out, src, w, n);
  }
}

// Rows and their weights; sum() writes the weighted sum of their first n elements.
template <typename S>
struct Terms {
  Scratch<const S*> src, moved;
  Scratch<S> w;
  i64 count = 0;

  void reserve(i64 most) {
    src.allocate(most);
    moved.allocate(most);
    w.allocate(most);
  }

  void shift(i64 elements) {
    for (i64 k = 0; k < count; k++) src[k] += elements;
  }

  void add(const S* row, S weight) {
    src[count] = row;
    w[count++] = weight;
  }

  void sum(S* out, i64 n) {
    if (count == 0) {
      for (i64 i = 0; i < n; i++) out[i] = S(0);
    } else if (count <= 4) {
      weigh_up_to_four<false>(out, src.get(), w.get(), count, n);
    } else {
      for (i64 i = 0; i < n; i += kBlock) {
        for (i64 k = 0; k < count; k++) moved[k] = src[k] + i;
        const i64 m = minimum(kBlock, n - i);
        weigh_up_to_four<false>(out + i, moved.get(), w.get(), 4, m);
        for (i64 k = 4; k < count; k += 4)
          weigh_up_to_four<true>(out + i, moved.get() + k, w.get() + k, minimum<i64>(4, count - k), m);
      }
    }
  }
};

i64 common_divisor(i64 a, i64 b) { return b == 0 ? a : common_divisor(b, a % b); }

// What all rows of a call share.
template <typename S>
struct Plan {
  const UpFirDnArgs& args;
  const i64 lanes, planes;
  const i64 period, step;  // outputs o and o + period meet the same taps, on samples that are `step` apart
  const i64 meeting_rows;  // as many input rows an output row meets at most
  Scratch<S> taps;         // correlating: [taps_y][taps_x], or those of the columns with the gain and of the rows
  i64 before, padded;      // zeros before a row, and its samples with the zeros
  Scratch<Taps> vertical;  // of every output row

  explicit Plan(const UpFirDnArgs& a)
      : args(a),
        lanes(a.channels_last ? a.channels : 1),
        planes(a.channels_last ? a.batch : a.batch * a.channels),
        period(a.up / common_divisor(a.up, a.down)),
        step(a.down / common_divisor(a.up, a.down)),
        meeting_rows(ceil_div(a.taps_y, a.up)),
        taps(a.separable ? 2 * a.taps_x : a.taps_y * a.taps_x),
        vertical(a.out_height) {
    for (i64 oy = 0; oy < a.out_height; oy++) vertical[oy] = taps_of(oy, a.up, a.down, a.pad_y);
    const i64 count = a.separable ? a.taps_x : a.taps_y * a.taps_x;
    for (i64 i = 0; i < count; i++) {
      const S tap = static_cast<const S*>(a.taps)[a.flip ? i : count - 1 - i];
      taps[i] = static_cast<S>(a.gain) * tap;
      if (a.separable) taps[count + i] = tap;
    }
    const Taps first = taps_of(0, a.up, a.down, a.pad_x), last = taps_of(a.out_width - 1, a.up, a.down, a.pad_x);
    before = maximum<i64>(0, -first.sample);
    padded = before + maximum(a.in_width, last.sample + ceil_div(a.taps_x, a.up));
  }
};

// Adds to parts of output rows what is to be added.
template <typename T>
class Adder {
 public:
  using S = Compute<T>;

  Adder(const UpFirDnArgs& a, i64 lanes)
      : a_(a),
        lanes_(lanes),
        converted_(a.added && (sizeof(T) != sizeof(S) || a.added_dtype != a.dtype) ? a.out_width * lanes : 0) {}

  // `out` is output row oy of the plane, from column ox on so many, in the type that is computed with.
  void add(S* __restrict out, i64 plane, i64 oy, i64 ox, i64 columns) const {
    if (!a_.added) return;
    const i64 n = columns * lanes_;
    const S* __restrict more = read(((plane * a_.out_height + oy) * a_.out_width + ox) * lanes_, n);
    const BiasAct<kLinear, S> f{S(1), static_cast<S>(a_.clamp)};
    const S* bias = static_cast<const S*>(a_.bias);
    if (lanes_ == 1) {
      const S b = bias ? bias[plane % a_.channels] : S(0);
#pragma omp simd
      for (i64 i = 0; i < n; i++) out[i] += f.value(more[i] + b);
    } else {
      for (i64 i = 0; i < n; i += lanes_)
#pragma omp simd
        for (i64 c = 0; c < lanes_; c++) out[i + c] += f.value(more[i + c] + (bias ? bias[c] : S(0)));
    }
  }

 private:
  // Elements first .. first + n, in the type that is computed with.
  const S* read(i64 first, i64 n) const {
    const Half* halves = static_cast<const Half*>(a_.added) + first;
    if (a_.added_dtype != DType::f16) {
      if constexpr (sizeof(T) == sizeof(S)) return static_cast<const S*>(a_.added) + first;
      load_row<T>(static_cast<const T*>(a_.added) + first, converted_.get(), n);
    } else if constexpr (std::is_same_v<S, float>) {
      load_row<Half>(halves, converted_.get(), n);
    } else {
      for (i64 i = 0; i < n; i++) converted_[i] = half_to_float(halves[i]);
    }
    return converted_.get();
  }

  const UpFirDnArgs& a_;
  const i64 lanes_;
  Scratch<S> converted_;
};

// What a thread needs to compute rows.
template <typename T>
class Worker {
 public:
  using S = Compute<T>;

  explicit Worker(const Plan<S>& plan)
      : plan_(plan),
        a_(plan.args),
        lanes_(plan.lanes),
        in_row_(a_.in_width * lanes_),
        out_row_(a_.out_width * lanes_),
        ring_row_(a_.separable ? in_row_ : plan.padded * lanes_),
        part_(ceil_div(plan.padded, plan.step)),
        phase_(ceil_div(a_.out_width, plan.period)),
        has_ring_(!kPlain || !a_.separable),
        of_phase_(new Terms<S>[static_cast<size_t>(plan.period)]),
        rows_(plan.meeting_rows),
        weights_(plan.meeting_rows),
        ring_(has_ring_ ? ring_row_ * plan.meeting_rows : 0),
        held_(plan.meeting_rows),
        vertical_(a_.separable ? plan.padded * lanes_ : 0),
        split_(lanes_ == 1 && plan.step > 1 ? part_ * plan.step * (a_.separable ? 1 : plan.meeting_rows) : 0),
        phases_(lanes_ == 1 && plan.period > 1 ? phase_ * plan.period : 0),
        out_(kPlain ? 0 : out_row_),
        adder_(a_, lanes_) {
    for (i64 i = 0; has_ring_ && i < ring_row_ * plan.meeting_rows; i++) ring_[i] = S(0);
    for (i64 i = 0; a_.separable && i < plan.padded * lanes_; i++) vertical_[i] = S(0);
    terms_.reserve(a_.taps_y * a_.taps_x);
    count_ = 1;  // of a separable filter: the vertically filtered row
    rows_[0] = vertical_.get();
    weights_[0] = plan.taps.get() + a_.taps_x;
    for (i64 phase = 0; lanes_ == 1 && phase < plan.period; phase++) {
      of_phase_[phase].reserve(a_.taps_y * a_.taps_x);
      if (a_.separable) collect_phase(phase, of_phase_[phase]);
    }
  }

  // Output rows first .. end of a plane.
  void run(i64 plane, i64 first, i64 end) {
    const T* x = static_cast<const T*>(a_.x) + plane * a_.in_height * in_row_;
    for (i64 i = 0; i < plan_.meeting_rows; i++) held_[i] = -1;
    for (i64 oy = first; oy < end; oy++) {
      T* y = static_cast<T*>(a_.y) + (plane * a_.out_height + oy) * out_row_;
      const Taps taps = plan_.vertical[oy];
      count_ = 0;
      terms_.count = 0;
      for (i64 i = taps.first, iy = taps.sample; i < a_.taps_y && iy < a_.in_height; i += a_.up, iy++) {
        if (iy < 0) continue;
        if (a_.separable) {
          terms_.add(input(x, iy), plan_.taps[i]);
        } else {
          rows_[count_] = input(x, iy);
          weights_[count_++] = plan_.taps.get() + i * a_.taps_x;
        }
      }
      if (a_.separable) {
        terms_.sum(vertical_.get() + plan_.before * lanes_, in_row_);
        count_ = 1;
      }
      if constexpr (kPlain) {
        horizontal(y);
        adder_.add(y, plane, oy, 0, a_.out_width);
      } else {
        horizontal(out_.get());
        adder_.add(out_.get(), plane, oy, 0, a_.out_width);
        store_row<T>(out_.get(), y, out_row_);
      }
    }
  }

 private:
  static constexpr bool kPlain = sizeof(T) == sizeof(S);

  // Row iy of the plane in the type that is computed with; padded if the filter is not separable.
  const S* input(const T* x, i64 iy) {
    if constexpr (kPlain)
      if (!has_ring_) return x + iy * in_row_;
    const i64 place = iy % plan_.meeting_rows;
    S* row = ring_.get() + place * ring_row_;
    if (held_[place] != iy) load(x + iy * in_row_, row + (a_.separable ? 0 : plan_.before * lanes_));
    held_[place] = iy;
    return row;
  }

  void load(const T* src, S* dst) {
    if constexpr (kPlain) {
      memcpy(dst, src, static_cast<size_t>(in_row_) * sizeof(S));
    } else {
      load_row<T>(src, dst, in_row_);
    }
  }

  // The filter along the padded rows rows_, each with its weights.
  void horizontal(S* out) {
    if (lanes_ == 1) {
      contiguous(out);
    } else if (a_.up == 1 && a_.down == 1) {
      collect(taps_of(0, 1, 1, a_.pad_x));
      terms_.sum(out, out_row_);
    } else {
      for (i64 phase = 0; phase < plan_.period; phase++) {
        collect(taps_of(phase, a_.up, a_.down, a_.pad_x));
        for (i64 ox = phase; ox < a_.out_width; ox += plan_.period) {
          terms_.sum(out + ox * lanes_, lanes_);
          terms_.shift(plan_.step * lanes_);
        }
      }
    }
  }

  void collect(Taps taps) {
    terms_.count = 0;
    for (i64 k = 0; k < count_; k++)
      for (i64 j = taps.first, s = taps.sample + plan_.before; j < a_.taps_x; j += a_.up, s++)
        terms_.add(rows_[k] + s * lanes_, weights_[k][j]);
  }

  // One lane: outputs o, o + period, ... at once, from samples that are made neighbours first.
  void contiguous(S* out) {
    const i64 period = plan_.period, step = plan_.step;
    for (i64 k = 0; step > 1 && k < count_; k++) deal(rows_[k], split_.get() + k * part_ * step);
    for (i64 phase = 0; phase < period && phase < a_.out_width; phase++) {
      Terms<S>& terms = of_phase_[phase];
      if (!a_.separable) collect_phase(phase, terms);
      terms.sum(period == 1 ? out : phases_.get() + phase * phase_, (a_.out_width - phase + period - 1) / period);
    }
    if (period > 1) gather(out);
  }

  void collect_phase(i64 phase, Terms<S>& terms) const {
    const i64 step = plan_.step;
    const Taps taps = taps_of(phase, a_.up, a_.down, a_.pad_x);
    terms.count = 0;
    for (i64 k = 0; k < count_; k++) {
      const S* row = step > 1 ? split_.get() + k * part_ * step : rows_[k];
      for (i64 j = taps.first, s = taps.sample + plan_.before; j < a_.taps_x; j += a_.up, s++)
        terms.add(row + s % step * part_ + s / step, weights_[k][j]);
    }
  }

  // parts[i % step][i / step] = row[i]
  void deal(const S* __restrict row, S* __restrict parts) const {
    const i64 step = plan_.step, part = part_, n = plan_.padded;
    if (step == 2) {
      for (i64 i = 0; i < n / 2; i++) {
        parts[i] = row[2 * i];
        parts[part + i] = row[2 * i + 1];
      }
      if (n % 2) parts[n / 2] = row[n - 1];
    } else {
      for (i64 i = 0; i < n; i++) parts[i % step * part + i / step] = row[i];
    }
  }

  // out[i] = phases[i % period][i / period]
  void gather(S* __restrict out) const {
    const S* __restrict phases = phases_.get();
    const i64 period = plan_.period, phase = phase_, n = a_.out_width;
    if (period == 2) {
      for (i64 i = 0; i < n / 2; i++) {
        out[2 * i] = phases[i];
        out[2 * i + 1] = phases[phase + i];
      }
      if (n % 2) out[n - 1] = phases[n / 2];
    } else {
      for (i64 i = 0; i < n; i++) out[i] = phases[i % period * phase + i / period];
    }
  }

  const Plan<S>& plan_;
  const UpFirDnArgs& a_;
  const i64 lanes_, in_row_, out_row_, ring_row_, part_, phase_;
  const bool has_ring_;
  Terms<S> terms_;                            // of the columns; channels-last of the rows, too
  const std::unique_ptr<Terms<S>[]> of_phase_;  // of the rows, of one lane
  Scratch<const S*> rows_, weights_;
  i64 count_ = 0;
  Scratch<S> ring_;    // input rows, converted or padded
  Scratch<i64> held_;  // which input row lies in each place of the ring, or -1
  Scratch<S> vertical_, split_, phases_, out_;
  const Adder<T> adder_;
};

// Calls f(n) with n a constant if it is the width of a small image: loops of so few elements then have no ends to treat.
template <typename F>
inline void with_width(i64 n, const F& f) {
  switch (n) {
    case 8: return f(std::integral_constant<i64, 8>());
    case 16: return f(std::integral_constant<i64, 16>());
    case 32: return f(std::integral_constant<i64, 32>());
    default: return f(n);
  }
}

// Four separable taps on one lane, up 2, down 2 or neither: what the networks ask for. Blocks of rows are filtered along
// one axis into memory that stays in the nearest cache, and from there along the other; the axis that makes the fewer
// numbers comes first.
template <typename S, int UP, int DOWN>
class FourTaps {
 public:
  explicit FourTaps(const Plan<S>& plan)
      : plan_(plan),
        a_(plan.args),
        before_(round_up(plan.before)),
        pitch_(before_ + round_up(plan.padded - plan.before)),
        block_(UP == 2 ? minimum(a_.out_height, maximum<i64>(8, kBlockElements / a_.out_width)) : kRows),
        held_(UP == 2 ? block_ / 2 + 2 : kRows),
        rows_(held_ * pitch_),
        filtered_(UP == 2 ? held_ * a_.out_width : 0),
        zeros_(maximum(a_.in_width, a_.out_width)),
        adder_(a_, 1) {
    for (i64 i = 0; i < held_ * pitch_; i++) rows_[i] = S(0);
    for (i64 i = 0; i < maximum(a_.in_width, a_.out_width); i++) zeros_[i] = S(0);
  }

  // Output rows first .. end of a plane.
  void run(i64 plane, i64 first, i64 end) {
    const S* x = static_cast<const S*>(a_.x) + plane * a_.in_height * a_.in_width;
    S* y = static_cast<S*>(a_.y) + plane * a_.out_height * a_.out_width;
    for (i64 row = first; row < end; row += block_) {
      const i64 last = minimum(end, row + block_);
      if constexpr (UP == 2)
        with_width(a_.in_width, [&](auto width) { up(width, x, y, plane, row, last); });
      else
        with_width(a_.in_width, [&](auto width) { down(width, x, y, plane, row, last); });
    }
  }

 private:
  static constexpr i64 kRows = 4;  // of a block, UP 1: they share loads
  static constexpr i64 kBlockElements = 4096;

  static i64 round_up(i64 n) { return ceil_div(n, 16) * 16; }

  const S* row_or_zeros(const S* rows, i64 row, i64 width) const {
    return row >= 0 && row < a_.in_height ? rows + row * width : zeros_.get();
  }

  // Along columns, then along rows.
  template <typename N>
  void down(N width, const S* x, S* y, i64 plane, i64 first, i64 end) {
    const S *a = plan_.taps.get(), *b = a + 4;
    const S a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], b0 = b[0], b1 = b[1], b2 = b[2], b3 = b[3];
    const S* src[DOWN * (kRows - 1) + 4];
    for (i64 i = 0; i < DOWN * (kRows - 1) + 4; i++) src[i] = row_or_zeros(x, first * DOWN - a_.pad_y + i, width);
    S* __restrict filtered = rows_.get() + before_;
    const i64 pitch = pitch_;
#pragma omp simd
    for (i64 i = 0; i < width; i++)
      for (int r = 0; r < kRows; r++) {
        const S* const* s = src + DOWN * r;
        filtered[r * pitch + i] = a0 * s[0][i] + a1 * s[1][i] + a2 * s[2][i] + a3 * s[3][i];
      }
    with_width(a_.out_width, [&](auto n) {
      for (i64 oy = first; oy < end; oy++) {
        const S* __restrict v = rows_.get() + (oy - first) * pitch_ + before_ - a_.pad_x;
        S* __restrict out = y + oy * n;
#pragma omp simd
        for (i64 i = 0; i < n; i++)
          out[i] = b0 * v[DOWN * i] + b1 * v[DOWN * i + 1] + b2 * v[DOWN * i + 2] + b3 * v[DOWN * i + 3];
        adder_.add(out, plane, oy, 0, n);
      }
    });
  }

  // Along rows, then along columns: an output meets two samples of each axis.
  template <typename N>
  void up(N width, const S* x, S* y, i64 plane, i64 first, i64 end) {
    const i64 n = a_.out_width;
    const i64 top = maximum<i64>(plan_.vertical[first].sample, 0);
    const i64 bottom = minimum(plan_.vertical[end - 1].sample + 2, a_.in_height);
    const Taps even = taps_of(0, 2, 1, a_.pad_x), odd = taps_of(1, 2, 1, a_.pad_x);
    const S* w = plan_.taps.get() + 4;
    const S e0 = w[even.first], e1 = w[even.first + 2], o0 = w[odd.first], o1 = w[odd.first + 2];
    for (i64 iy = top; iy < bottom; iy++) {
      const S* __restrict src = x + iy * width;
      S* __restrict padded = rows_.get() + (iy - top) * pitch_ + before_;
      for (i64 i = 0; i < width; i++) padded[i] = src[i];
    }
    with_width(n / 2, [&](auto half) {
      for (i64 row = 0; row < bottom - top; row++) {
        const S* padded = rows_.get() + row * pitch_ + before_;
        const S *e = padded + even.sample, *o = padded + odd.sample;
        S* __restrict h = filtered_.get() + row * n;
#pragma omp simd
        for (i64 i = 0; i < half; i++) {
          h[2 * i] = e0 * e[i] + e1 * e[i + 1];
          h[2 * i + 1] = o0 * o[i] + o1 * o[i + 1];
        }
        if (n % 2) h[n - 1] = e0 * e[n / 2] + e1 * e[n / 2 + 1];
      }
    });
    for (i64 oy = first; oy < end; oy++) {
      const Taps taps = plan_.vertical[oy];
      const S* rows = filtered_.get() - top * n;
      const S *h0 = row_or_zeros(rows, taps.sample, n), *h1 = row_or_zeros(rows, taps.sample + 1, n);
      const S a0 = plan_.taps[taps.first], a1 = plan_.taps[taps.first + 2];
      S* __restrict out = y + oy * n;
      with_width(n, [&](auto size) {
#pragma omp simd
        for (i64 i = 0; i < size; i++) out[i] = a0 * h0[i] + a1 * h1[i];
      });
      adder_.add(out, plane, oy, 0, n);
    }
  }

  const Plan<S>& plan_;
  const UpFirDnArgs& a_;
  const i64 before_, pitch_;  // of the padded rows: numbers before the image's, and from row to row
  const i64 block_, held_;    // output rows of a block, and rows that it filters along one axis
  Scratch<S> rows_;           // padded: UP 2 input rows, else what columns gave
  Scratch<S> filtered_;       // UP 2: input rows, filtered along the row
  Scratch<S> zeros_;          // a row outside of the image
  const Adder<S> adder_;
};

// The same of pixels, whose lanes run fastest; in tiles of columns, for rows of pixels are longer than the nearest cache.
// Few rows at once: they often lie so that all fall on one set of it.
template <typename S, int UP, int DOWN>
class FourTapsOfPixels {
 public:
  explicit FourTapsOfPixels(const Plan<S>& plan)
      : plan_(plan),
        a_(plan.args),
        lanes_(plan.lanes),
        tile_(minimum(a_.out_width, maximum<i64>(UP, kTileElements / lanes_ / UP * UP))),
        pitch_((UP == 2 ? tile_ : (tile_ - 1) * DOWN + 4) * lanes_),
        rows_((UP == 2 ? kBlock / 2 + 2 : 1) * pitch_),
        zeros_(pitch_),
        adder_(a_, lanes_) {
    for (i64 i = 0; i < pitch_; i++) zeros_[i] = S(0);
  }

  // Output rows first .. end of a plane.
  void run(i64 plane, i64 first, i64 end) {
    const S* x = static_cast<const S*>(a_.x) + plane * a_.in_height * a_.in_width * lanes_;
    S* y = static_cast<S*>(a_.y) + plane * a_.out_height * a_.out_width * lanes_;
    constexpr i64 block = UP == 2 ? kBlock : 1;
    for (i64 row = first; row < end; row += block)
      for (i64 ox = 0; ox < a_.out_width; ox += tile_) {
        const i64 last = minimum(end, row + block), right = minimum(ox + tile_, a_.out_width);
        UP == 2 ? up(x, y, row, last, ox, right) : down(x, y, row, ox, right);
        for (i64 oy = row; oy < last; oy++) adder_.add(y + (oy * a_.out_width + ox) * lanes_, plane, oy, ox, right - ox);
      }
  }

 private:
  static constexpr i64 kBlock = 8;  // rows of a block, UP 2
  static constexpr i64 kTileElements = 1024;

  const S* pixels(const S* x, i64 iy, i64 ix) const {
    return iy >= 0 && iy < a_.in_height ? x + (iy * a_.in_width + ix) * lanes_ : zeros_.get();
  }

  // Along columns, then along rows. The tile meets input columns `left` on, of which lo .. hi are inside of the image.
  void down(const S* x, S* y, i64 oy, i64 ox, i64 right) {
    const S *a = plan_.taps.get(), *b = a + 4;
    const i64 lanes = lanes_, left = ox * DOWN - a_.pad_x, columns = (right - ox - 1) * DOWN + 4;
    const i64 lo = minimum(maximum<i64>(-left, 0), columns), hi = maximum(lo, minimum(a_.in_width - left, columns));
    const S* src[4];
    for (i64 i = 0; i < 4; i++) src[i] = pixels(x, oy * DOWN - a_.pad_y + i, left + lo);
    S* row = rows_.get();
    for (i64 i = 0; i < lo * lanes; i++) row[i] = S(0);
    weigh<4, false>(row + lo * lanes, src, a, (hi - lo) * lanes);
    for (i64 i = hi * lanes; i < columns * lanes; i++) row[i] = S(0);
    S* out = y + (oy * a_.out_width + ox) * lanes;
    auto across = [&](S* to, const S* from, i64 n) {
      const S* neighbours[4] = {from, from + lanes, from + 2 * lanes, from + 3 * lanes};
      weigh<4, false>(to, neighbours, b, n);
    };
    if (DOWN == 1)
      across(out, row, (right - ox) * lanes);
    else
      for (i64 i = 0; i < right - ox; i++) across(out + i * lanes, row + DOWN * i * lanes, lanes);
  }

  // Along rows, then along columns: an output meets two samples of each axis.
  void up(const S* x, S* y, i64 first, i64 end, i64 ox, i64 right) {
    const i64 top = maximum<i64>(plan_.vertical[first].sample, 0), n = (right - ox) * lanes_;
    const i64 bottom = minimum(plan_.vertical[end - 1].sample + 2, a_.in_height);
    const S *a = plan_.taps.get(), *b = a + 4;
    auto two = [](S* to, const S* from0, const S* from1, S w0, S w1, i64 n) {
      const S *src[2] = {from0, from1}, w[2] = {w0, w1};
      weigh<2, false>(to, src, w, n);
    };
    for (i64 iy = top; iy < bottom; iy++)
      for (i64 column = ox; column < right; column++) {
        const Taps taps = taps_of(column, 2, 1, a_.pad_x);
        auto pixel = [&](i64 ix) { return ix >= 0 && ix < a_.in_width ? pixels(x, iy, ix) : zeros_.get(); };
        two(rows_.get() + (iy - top) * pitch_ + (column - ox) * lanes_, pixel(taps.sample), pixel(taps.sample + 1),
            b[taps.first], b[taps.first + 2], lanes_);
      }
    for (i64 oy = first; oy < end; oy++) {
      const Taps taps = plan_.vertical[oy];
      auto row = [&](i64 iy) { return iy >= 0 && iy < a_.in_height ? rows_.get() + (iy - top) * pitch_ : zeros_.get(); };
      two(y + (oy * a_.out_width + ox) * lanes_, row(taps.sample), row(taps.sample + 1), a[taps.first], a[taps.first + 2],
          n);
    }
  }

  const Plan<S>& plan_;
  const UpFirDnArgs& a_;
  const i64 lanes_, tile_, pitch_;  // output columns of a tile; from row to row of what lies between the axes
  Scratch<S> rows_;   // what the first axis gave: UP 2 of input rows, else of an output row
  Scratch<S> zeros_;  // a row, or a pixel, outside of the image
  const Adder<S> adder_;
};

// Calls W(plan).run() for all rows.
template <typename W, typename S>
void run_all(const Plan<S>& plan, int threads) {
  const i64 height = plan.args.out_height, rows = plan.planes * height;
  const i64 per_chunk = maximum<i64>(1, kChunkElements / (plan.args.out_width * plan.lanes));
  parallel(ceil_div(rows, per_chunk), threads, [&](i64 chunk) {
    const i64 end = minimum(rows, (chunk + 1) * per_chunk);
    W worker(plan);
    for (i64 row = chunk * per_chunk; row < end;) {
      const i64 first = row % height, count = minimum(end - row, height - first);
      worker.run(row / height, first, first + count);
      row += count;
    }
  });
}

template <typename S, int UP, int DOWN>
void run_four_taps(const Plan<S>& plan, int threads) {
  if (plan.lanes == 1)
    run_all<FourTaps<S, UP, DOWN>>(plan, threads);
  else
    run_all<FourTapsOfPixels<S, UP, DOWN>>(plan, threads);
}

template <typename T>
void filter(const UpFirDnArgs& args, int threads) {
  using S = Compute<T>;
  const Plan<S> plan(args);
  if constexpr (std::is_same_v<T, S>)
    if (args.separable && args.taps_x == 4) {
      if (args.up == 1 && args.down == 1) return run_four_taps<S, 1, 1>(plan, threads);
      if (args.up == 1 && args.down == 2) return run_four_taps<S, 1, 2>(plan, threads);
      if (args.up == 2 && args.down == 1) return run_four_taps<S, 2, 1>(plan, threads);
    }
  run_all<Worker<T>>(plan, threads);
}

}  // namespace

void upfirdn2d(const UpFirDnArgs& args, int threads) {
  if (args.batch * args.channels * args.out_height * args.out_width == 0) return;
  EPIGRAF_BY_DTYPE(args.dtype, T, filter<T>(args, threads))
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
