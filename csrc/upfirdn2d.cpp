// upfirdn2d on the CPU: every output row is a weighted sum of rows, so all loops run over contiguous memory.
//
// A "row" is one row of a plane. Channels-last, a plane is a whole image and its elements are pixels of `lanes` numbers;
// else a plane is one channel and lanes is 1. Samples of a row are padded with zeros where taps reach beyond it.
//
// Two workers, for any filter and for four taps, share a plan and what is added: hence one file.
#include "upfirdn2d.h"

#include <memory>
#include <type_traits>

#include "cpu.h"
#include "four_taps.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

constexpr i64 kChunkElements = 32768;  // outputs that are worth a thread's attention
constexpr i64 kBlock = 2048;           // elements that stay in the nearest cache while many taps go over them
constexpr i64 kCaches = i64(4) << 20;  // bytes of input and output that stay in nearer caches from call to call

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

template <typename S>
struct FourTapsPlan : Plan<S> {
  Scratch<S> zeros;    // a row outside of the image
  bool beyond_caches;  // more input and output than kCaches

  explicit FourTapsPlan(const UpFirDnArgs& a) : Plan<S>(a), zeros(a.in_width * this->lanes) {
    for (i64 i = 0; i < a.in_width * this->lanes; i++) zeros[i] = S(0);
    const i64 numbers = a.batch * a.channels * (a.in_height * a.in_width + a.out_height * a.out_width);
    beyond_caches = numbers * static_cast<i64>(sizeof(S)) > kCaches;
  }
};

// Rows by the loops of four_taps.h, several at once.
template <typename S, int UP, int DOWN>
class FourTapsWorker {
 public:
  explicit FourTapsWorker(const FourTapsPlan<S>& plan)
      : a_(plan.args),
        lanes_(plan.lanes),
        held_(a_.channels_last ? 4 * kRowsOfPixels * lanes_ : 0),
        adder_(a_, lanes_) {
    f_.columns = plan.taps.get();
    f_.rows = f_.columns + 4;
    f_.zeros = plan.zeros.get();
    f_.in_height = a_.in_height;
    f_.in_width = a_.in_width;
    f_.out_width = a_.out_width;
    f_.pad_x = a_.pad_x;
    f_.pad_y = a_.pad_y;
    f_.lanes = lanes_;
    // Rows are read along far stretches of memory, pixels of several rows at once.
    f_.ahead = plan.beyond_caches ? a_.channels_last ? 1024 : 4096 : 0;
    f_.stream = plan.beyond_caches && !a_.added && reinterpret_cast<uintptr_t>(a_.y) % kRegisterBytes == 0 &&
                (a_.channels_last ? lanes_ : a_.out_width) % Register<S>::kSize == 0;
  }

  // Output rows first .. end of a plane.
  void run(i64 plane, i64 first, i64 end) {
    f_.x = static_cast<const S*>(a_.x) + plane * a_.in_height * a_.in_width * lanes_;
    f_.y = static_cast<S*>(a_.y) + plane * a_.out_height * a_.out_width * lanes_;
    a_.channels_last ? blocks_of_pixels<kRowsOfPixels>(first, end) : blocks<kRows>(first, end);
    if (f_.stream) end_of_stores_past_caches();
    for (i64 oy = first; oy < end; oy++) adder_.add(f_.y + oy * a_.out_width * lanes_, plane, oy, 0, a_.out_width);
  }

 private:
  static constexpr int kRows = kRegisterBytes == 64 ? 4 : 2, kRowsOfPixels = UP == 1 && DOWN == 1 ? kRows : 2;

  template <int ROWS>
  void blocks(i64 oy, i64 end) const {
    for (; oy + ROWS <= end; oy += ROWS) {
      if constexpr (UP == 2)
        double_rows<ROWS>(f_, oy);
      else if (DOWN == 1 && a_.pad_x == 2)
        filter_rows<DOWN, 2, ROWS>(f_, oy);
      else
        filter_rows<DOWN, 1, ROWS>(f_, oy);
    }
    if constexpr (ROWS > 1) blocks<1>(oy, end);
  }

  template <int ROWS>
  void blocks_of_pixels(i64 oy, i64 end) const {
    constexpr int kSize = Register<S>::kSize, kPart = kSize > 4 ? kSize / 4 : 1;
    const i64 whole = lanes_ / kSize * kSize, parts = lanes_ / kPart * kPart;
    for (; oy + ROWS <= end; oy += ROWS) {
      pixels<Register<S>, ROWS>(oy, 0, whole);
      pixels<Register<S, kPart>, ROWS>(oy, whole, parts);
      pixels<Register<S, 1>, ROWS>(oy, parts, lanes_);
    }
    if constexpr (ROWS > 1) blocks_of_pixels<1>(oy, end);
  }

  template <typename R, int ROWS>
  void pixels(i64 oy, i64 first, i64 end) const {
    if (first >= end) return;
    if constexpr (UP == 2)
      double_pixels<R, ROWS>(f_, oy, first, end, held_.get());
    else if constexpr (DOWN == 2)
      halve_pixels<R, ROWS>(f_, oy, first, end, held_.get());
    else
      filter_pixels<R, ROWS>(f_, oy, first, end, held_.get());
  }

  const UpFirDnArgs& a_;
  const i64 lanes_;
  FourTaps<S> f_;
  const Scratch<S> held_;  // what pixels wait for
  const Adder<S> adder_;
};

// Calls W(plan).run() for all rows: pieces of a plane, or several small planes, are a thread's work at once.
template <typename W, typename P>
void run_all(const P& plan, int threads) {
  const i64 height = plan.args.out_height, row = plan.args.out_width * plan.lanes;
  const i64 rows = minimum(height, ceil_div(kChunkElements, 4 * row) * 4), pieces = ceil_div(height, rows);
  const i64 planes = pieces > 1 ? 1 : ceil_div(kChunkElements, height * row);
  parallel(ceil_div(plan.planes, planes) * pieces, threads, [&](i64 chunk) {
    const i64 first = chunk / pieces * planes, top = chunk % pieces * rows;
    W worker(plan);
    for (i64 plane = first; plane < minimum(plan.planes, first + planes); plane++)
      worker.run(plane, top, minimum(height, top + rows));
  });
}

template <typename T>
void filter(const UpFirDnArgs& args, int threads) {
  using S = Compute<T>;
  if constexpr (std::is_same_v<T, S>)
    if (args.separable && args.taps_x == 4) {
      const bool pairs = args.channels_last || args.pad_x % 2 == 0;  // as double_rows takes them
      if (args.up == 1 && args.down == 1) return run_all<FourTapsWorker<S, 1, 1>>(FourTapsPlan<S>(args), threads);
      if (args.up == 1 && args.down == 2) return run_all<FourTapsWorker<S, 1, 2>>(FourTapsPlan<S>(args), threads);
      if (args.up == 2 && args.down == 1 && pairs)
        return run_all<FourTapsWorker<S, 2, 1>>(FourTapsPlan<S>(args), threads);
    }
  run_all<Worker<T>>(Plan<S>(args), threads);
}

}  // namespace

void upfirdn2d(const UpFirDnArgs& args, int threads) {
  if (args.batch * args.channels * args.out_height * args.out_width == 0) return;
  EPIGRAF_BY_DTYPE(args.dtype, T, filter<T>(args, threads))
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
