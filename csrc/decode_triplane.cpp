// The tri-plane decoder on the CPU. Points go through in blocks that stay in the nearest cache: features, hidden units and
// their gradients never reach memory, but for the gradient of the features, which is scattered plane by plane.
#include "decode_triplane.h"

#include <limits>

#include "registers.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

constexpr i64 kPoints = 64;                            // of a block
constexpr i64 kChunkPoints = 2048, kMostChunks = 256;  // what one thread takes at once; each keeps sums of its own

template <typename S>
i64 padded(i64 n) {
  return ceil_div(n, Register<S>::kSize) * Register<S>::kSize;
}

// A matrix by its element (row, step of the sum).
template <typename S>
struct Left {
  const S* data;
  i64 row, step;
};

// R rows by N vectors of a product, kept in registers.
template <typename S, int R, int N, bool ADD>
inline void tile(Left<S> a, const S* b, i64 b_row, S* out, i64 out_row, i64 depth) {
  using V = Register<S>;
  constexpr i64 L = V::kSize;
  V c00{}, c01{}, c10{}, c11{}, c20{}, c21{}, c30{}, c31{};
  for (i64 k = 0; k < depth; k++) {
    const V b0 = V::load(b + k * b_row), b1 = N > 1 ? V::load(b + k * b_row + L) : b0;
    const S* column = a.data + k * a.step;
    c00 += column[0] * b0;
    if (N > 1) c01 += column[0] * b1;
    if (R > 1) c10 += column[a.row] * b0, c20 += column[2 * a.row] * b0, c30 += column[3 * a.row] * b0;
    if (R > 1 && N > 1) c11 += column[a.row] * b1, c21 += column[2 * a.row] * b1, c31 += column[3 * a.row] * b1;
  }
  auto put = [&](i64 r, V first, V second) __attribute__((always_inline)) {
    S* dst = out + r * out_row;
    (ADD ? V::load(dst) + first : first).store(dst);
    if (N > 1) (ADD ? V::load(dst + L) + second : second).store(dst + L);
  };
  put(0, c00, c01);
  if (R > 1) put(1, c10, c11), put(2, c20, c21), put(3, c30, c31);
}

// out[rows, columns] = or += a[rows, depth] b[depth, columns]; columns fill vectors.
template <bool ADD, typename S>
void product(Left<S> a, const S* b, i64 b_row, S* out, i64 out_row, i64 rows, i64 depth, i64 columns) {
  constexpr i64 L = Register<S>::kSize;
  for (i64 r = 0; r < rows;) {
    const i64 height = rows - r >= 4 ? 4 : 1;
    const Left<S> part{a.data + r * a.row, a.row, a.step};
    for (i64 c = 0; c < columns;) {
      const i64 vectors = columns - c >= 2 * L ? 2 : 1;
      S* dst = out + r * out_row + c;
      if (height == 4)
        vectors == 2 ? tile<S, 4, 2, ADD>(part, b + c, b_row, dst, out_row, depth)
                     : tile<S, 4, 1, ADD>(part, b + c, b_row, dst, out_row, depth);
      else
        vectors == 2 ? tile<S, 1, 2, ADD>(part, b + c, b_row, dst, out_row, depth)
                     : tile<S, 1, 1, ADD>(part, b + c, b_row, dst, out_row, depth);
      c += vectors * L;
    }
    r += height;
  }
}

// out += weight texel, over channels.
template <typename S>
inline void accumulate(S* __restrict out, const S* __restrict src, S weight, i64 n) {
#pragma omp simd
  for (i64 c = 0; c < n; c++) out[c] += weight * src[c];
}

// Some of the points, or all of them.
struct Points {
  const i64* some;  // their numbers, or null
  i64 operator[](i64 i) const { return some ? some[i] : i; }
};

// Points first .. first + count, which rise, in units of the planes' half size: out[axis][point].
template <typename S>
void positions_of(const DecodeTriplaneArgs& a, const Points& points, i64 first, i64 count, S (*out)[kPoints]) {
  const S *origins = static_cast<const S*>(a.origins), *directions = static_cast<const S*>(a.directions);
  i64 ray = points[first] / a.samples;
  for (i64 p = 0; p < count; p++) {
    const i64 point = points[first + p];
    while (point >= (ray + 1) * a.samples) ray++;
    for (int k = 0; k < 3; k++)
      out[k][p] = directions ? origins[ray * 3 + k] + static_cast<const S*>(a.t)[point] * directions[ray * 3 + k]
                             : origins[ray * 3 + k];
  }
  for (int k = 0; k < 3; k++) {
#pragma omp simd
    for (i64 p = 0; p < count; p++) out[k][p] /= S(a.cube_scale);
  }
}

// What points read along one axis: two neighbours, as offsets in numbers, with weight 0 where they are not stored.
template <typename S>
struct Neighbours {
  i64 offset[2][kPoints];
  S weight[2][kPoints];

  // `size` texels of `whole` are stored, from `start` on, `step` numbers apart.
  void find(const S* position, i64 count, i64 whole, i64 start, i64 size, i64 step) {
    const int last = static_cast<int>(size) - 1, begin = static_cast<int>(start);
    const S scale = S(whole - 1) / 2;
#pragma omp simd
    for (i64 p = 0; p < count; p++) {
      // From 3 on both are outside, however few texels there are; NaN stays NaN, and is a weight of the first texel.
      const S at = position[p], inside = at < S(-3) ? S(-3) : at > S(3) ? S(3) : at;
      const S x = (inside + 1) * scale, x_floor = floor(x), part = x - x_floor;
      const int first = x == x ? static_cast<int>(x_floor) - begin : 0, second = x == x ? first + 1 : 0;
      weight[0][p] = (1 - part) * S(first >= 0 && first <= last);
      weight[1][p] = part * S(second >= 0 && second <= last);
      offset[0][p] = minimum(maximum(first, 0), last) * step;
      offset[1][p] = minimum(maximum(second, 0), last) * step;
    }
  }
  // Along the columns and the rows of an image's planes.
  void columns(const DecodeTriplaneArgs& a, i64 image, const S* position, i64 count) {
    find(position, count, a.whole_width, a.first ? a.first[image * 2 + 1] : 0, a.width, 3 * a.channels);
  }
  void rows(const DecodeTriplaneArgs& a, i64 image, const S* position, i64 count) {
    find(position, count, a.whole_height, a.first ? a.first[image * 2] : 0, a.height, a.width * 3 * a.channels);
  }
};

// f(offset, weight) for the four texels of a plane that point p reads.
template <typename S, typename F>
inline void for_taps(const Neighbours<S>& x, const Neighbours<S>& y, i64 p, i64 shift, const F& f) {
  f(x.offset[0][p] + y.offset[0][p] + shift, x.weight[0][p] * y.weight[0][p]);
  f(x.offset[0][p] + y.offset[1][p] + shift, x.weight[0][p] * y.weight[1][p]);
  f(x.offset[1][p] + y.offset[0][p] + shift, x.weight[1][p] * y.weight[0][p]);
  f(x.offset[1][p] + y.offset[1][p] + shift, x.weight[1][p] * y.weight[1][p]);
}

template <typename S>
class Block {
 public:
  explicit Block(const DecodeTriplaneArgs& args)
      : a(args),
        channels_(padded<S>(a.channels)),
        outputs_(padded<S>(a.outputs)),
        feature(kPoints * channels_),
        grad_feature(kPoints * channels_),
        hidden(a.hidden * kPoints),
        w0_rows(a.hidden * channels_),
        feature_columns_(a.channels * kPoints),
        out_(a.outputs * kPoints),
        grad_hidden_(a.hidden * kPoints),
        grad_rows_(kPoints * outputs_) {
    clear(feature.get(), kPoints * channels_);
    clear(grad_rows_.get(), kPoints * outputs_);
    clear(w0_rows.get(), a.hidden * channels_);
    for (i64 j = 0; j < a.hidden; j++)
      memcpy(w0_rows.get() + j * channels_, w0() + j * a.channels, static_cast<size_t>(a.channels) * sizeof(S));
  }

  // Features and hidden units of `count` points.
  void decode(const Points& points, i64 first, i64 count) {
    S positions[3][kPoints];
    positions_of(a, points, first, count, positions);
    const i64 each = a.rays * a.samples;
    for (i64 p = 0, end; p < count; p = end) {  // the points of one image at a time
      const i64 image = points[first + p] / each;
      for (end = p + 1; end < count && points[first + end] < (image + 1) * each; end++) {
      }
      sample(image, positions, p, end);
    }
    clear(feature.get() + count * channels_, (kPoints - count) * channels_);
    for (i64 p = 0; p < kPoints; p++)
      for (i64 c = 0; c < a.channels; c++) feature_columns_[c * kPoints + p] = feature[p * channels_ + c];
    product<false>(Left<S>{w0(), a.channels, 1}, feature_columns_.get(), kPoints, hidden.get(), kPoints, a.hidden,
                   a.channels, kPoints);
    const S* b0 = static_cast<const S*>(a.b0);
    for (i64 j = 0; j < a.hidden; j++) {
      S* row = hidden.get() + j * kPoints;
#pragma omp simd
      for (i64 p = 0; p < kPoints; p++) {
        const S u = row[p] + b0[j];
        row[p] = u * (u > 0 ? S(kGain) : S(kSlope * kGain));
      }
    }
  }

  void finish(i64 first, i64 count) {
    product<false>(Left<S>{w1(), a.hidden, 1}, hidden.get(), kPoints, out_.get(), kPoints, a.outputs, a.hidden, kPoints);
    const S* b1 = static_cast<const S*>(a.b1);
    S* y = static_cast<S*>(a.y) + first * a.outputs;
    for (i64 p = 0; p < count; p++)
      for (i64 k = 0; k < a.outputs; k++) y[p * a.outputs + k] = out_[k * kPoints + p] + b1[k];
  }

  // The gradients of what `decode` left, those of the network added to `sums`, those of the features to rows
  // first .. first + count of `to_features`.
  void differentiate(const Points& points, i64 first, i64 count, S* sums, S* to_features) {
    const S* grad_y = static_cast<const S*>(a.grad_y);
    for (i64 p = 0; p < kPoints; p++)
      for (i64 k = 0; k < a.outputs; k++) {
        const S g = p < count ? grad_y[points[first + p] * a.outputs + k] : S(0);
        out_[k * kPoints + p] = g;
        grad_rows_[p * outputs_ + k] = g;
      }
    product<false>(Left<S>{w1(), 1, a.hidden}, out_.get(), kPoints, grad_hidden_.get(), kPoints, a.hidden, a.outputs,
                   kPoints);
    for (i64 i = 0; i < a.hidden * kPoints; i++) grad_hidden_[i] *= hidden[i] > 0 ? S(kGain) : S(kSlope * kGain);
    if (sums) {
      S *w0 = sums, *w1 = w0 + a.hidden * channels_, *b0 = w1 + a.hidden * outputs_, *b1 = b0 + a.hidden;
      product<true>(Left<S>{grad_hidden_.get(), kPoints, 1}, feature.get(), channels_, w0, channels_, a.hidden, kPoints,
                    channels_);
      product<true>(Left<S>{hidden.get(), kPoints, 1}, grad_rows_.get(), outputs_, w1, outputs_, a.hidden, kPoints,
                    outputs_);
      add_rows(grad_hidden_.get(), a.hidden, b0);
      add_rows(out_.get(), a.outputs, b1);
    }
    if (to_features) {
      product<false>(Left<S>{grad_hidden_.get(), 1, kPoints}, w0_rows.get(), channels_, grad_feature.get(), channels_,
                     kPoints, a.hidden, channels_);
      for (i64 p = 0; p < count; p++)
        for (i64 c = 0; c < a.channels; c++)
          to_features[(first + p) * a.channels + c] = grad_feature[p * channels_ + c] / 3;
    }
  }

  i64 sums() const { return a.hidden * (channels_ + outputs_ + 1) + a.outputs; }

  // Adds what `differentiate` has summed to the network's gradients, kept as `sums` keeps them, but not padded.
  void gather(const S* sums, double* w0, double* b0, double* w1, double* b1) const {
    const S *from_w1 = sums + a.hidden * channels_, *from_b0 = from_w1 + a.hidden * outputs_, *from_b1 = from_b0 + a.hidden;
    for (i64 j = 0; j < a.hidden; j++) {
      for (i64 c = 0; c < a.channels; c++) w0[j * a.channels + c] += sums[j * channels_ + c];
      for (i64 k = 0; k < a.outputs; k++) w1[k * a.hidden + j] += from_w1[j * outputs_ + k];
      b0[j] += from_b0[j];
    }
    for (i64 k = 0; k < a.outputs; k++) b1[k] += from_b1[k];
  }

 private:
  static constexpr double kSlope = 0.2, kGain = 1.4142135623730951;

  const S* w0() const { return static_cast<const S*>(a.w0); }
  const S* w1() const { return static_cast<const S*>(a.w1); }

  static void clear(S* data, i64 n) {
    for (i64 i = 0; i < n; i++) data[i] = 0;
  }

  static void add_rows(const S* rows, i64 count, S* sums) {
    for (i64 j = 0; j < count; j++) {
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 p = 0; p < kPoints; p++) sum += rows[j * kPoints + p];
      sums[j] += sum;
    }
  }

  // Features of points begin .. end, all of one image.
  void sample(i64 image, const S (*positions)[kPoints], i64 begin, i64 end) {
    const S* planes = static_cast<const S*>(a.planes) + image * a.height * a.width * 3 * a.channels;
    const i64 count = end - begin;
    columns_[0].columns(a, image, positions[0] + begin, count);
    columns_[1].columns(a, image, positions[1] + begin, count);
    rows_[0].rows(a, image, positions[1] + begin, count);
    rows_[1].rows(a, image, positions[2] + begin, count);
    using V = Register<S>;
    constexpr i64 L = V::kSize;
    for (i64 p = 0; p < count; p++) {
      S* out = feature.get() + (begin + p) * channels_;
      auto for_planes = [&](auto f) __attribute__((always_inline)) {
        for_taps(columns_[0], rows_[0], p, 0, f);
        for_taps(columns_[0], rows_[1], p, a.channels, f);
        for_taps(columns_[1], rows_[1], p, 2 * a.channels, f);
      };
      i64 c = 0;
      for (; c + L <= a.channels; c += L) {
        V sum{};
        for_planes([&](i64 offset, S weight) { sum += weight * V::load(planes + offset + c); });
        (sum / S(3)).store(out + c);
      }
      for (; c < a.channels; c++) {
        S sum = 0;
        for_planes([&](i64 offset, S weight) { sum += weight * planes[offset + c]; });
        out[c] = sum / 3;
      }
    }
  }

  const DecodeTriplaneArgs& a;
  const i64 channels_, outputs_;  // padded to vectors

 public:
  Scratch<S> feature, grad_feature;  // [points][channels]
  Scratch<S> hidden;                 // [hidden][points]
  Scratch<S> w0_rows;                // [hidden][channels], padded

 private:
  Scratch<S> feature_columns_, out_, grad_hidden_;  // [numbers][points]
  Scratch<S> grad_rows_;                            // [points][outputs]
  Neighbours<S> columns_[2], rows_[2];
};

i64 chunk_points(i64 points) {
  return maximum(kChunkPoints, ceil_div(ceil_div(points, kMostChunks), kPoints) * kPoints);
}

// f(block, first, count, chunk) for every block of every chunk of so many points.
template <typename S, typename F>
void for_blocks(const DecodeTriplaneArgs& a, i64 points, int threads, const F& f) {
  const i64 per_chunk = chunk_points(points);
  parallel(ceil_div(points, per_chunk), threads, [&](i64 chunk) {
    Block<S> block(a);
    const i64 end = minimum(points, (chunk + 1) * per_chunk);
    for (i64 first = chunk * per_chunk; first < end; first += kPoints) f(block, first, minimum(kPoints, end - first), chunk);
  });
}

// The points whose gradients count, by image: image i has kept[starts[i]] .. kept[starts[i + 1]]. Not those below the
// largest times the square of the type's precision: there would have to be as many as a type tells numbers apart between
// 1 and 2, to add up to the last bit of the largest. What lies behind a surface is such. NaN counts.
template <typename S>
void keep(const DecodeTriplaneArgs& a, i64* kept, i64* starts) {
  const S* grad_y = static_cast<const S*>(a.grad_y);
  const i64 points = a.rays * a.samples;
  S largest = 0;
#pragma omp simd reduction(max : largest)
  for (i64 i = 0; i < a.batch * points * a.outputs; i++) {
    const S size = fabs(grad_y[i]);
    largest = size > largest ? size : largest;
  }
  constexpr S precision = std::numeric_limits<S>::epsilon();
  const S limit = largest <= std::numeric_limits<S>::max() ? largest * precision * precision : S(0);
  i64 count = 0;
  for (i64 image = 0; image < a.batch; image++) {
    starts[image] = count;
    for (i64 point = image * points; point < (image + 1) * points; point++) {
      bool small = true;
      for (i64 k = 0; k < a.outputs; k++) small = small && fabs(grad_y[point * a.outputs + k]) <= limit;
      kept[count] = point;
      count += !small;
    }
  }
  starts[a.batch] = count;
}

// The gradient of one plane of one image, in the order of the points: the same for every number of threads.
template <typename S>
void scatter(const DecodeTriplaneArgs& a, const i64* kept, const i64* starts, const S* to_features, i64 image, i64 plane) {
  S* grad = static_cast<S*>(a.grad_planes) + image * a.height * a.width * 3 * a.channels;
  for (i64 texel = 0; texel < a.height * a.width; texel++)
    for (i64 c = 0; c < a.channels; c++) grad[(texel * 3 + plane) * a.channels + c] = 0;
  S positions[3][kPoints];
  Neighbours<S> columns, rows;
  for (i64 first = starts[image]; first < starts[image + 1]; first += kPoints) {
    const i64 count = minimum(kPoints, starts[image + 1] - first);
    positions_of(a, Points{kept}, first, count, positions);
    columns.columns(a, image, positions[kPlaneAxes[plane][0]], count);
    rows.rows(a, image, positions[kPlaneAxes[plane][1]], count);
    for (i64 p = 0; p < count; p++) {
      const S* row = to_features + (first + p) * a.channels;
      for_taps(columns, rows, p, plane * a.channels,
               [&](i64 offset, S weight) { accumulate(grad + offset, row, weight, a.channels); });
    }
  }
}

template <typename S>
void backward(const DecodeTriplaneArgs& a, int threads) {
  Scratch<i64> kept(a.batch * a.rays * a.samples), starts(a.batch + 1);
  keep<S>(a, kept.get(), starts.get());
  const i64 all_kept = starts[a.batch], chunks = ceil_div(all_kept, chunk_points(all_kept)), each = Block<S>(a).sums();
  Scratch<S> sums(a.grad_w0 ? chunks * each : 0), to_features(a.grad_planes ? all_kept * a.channels : 0);
  for (i64 i = 0; a.grad_w0 && i < chunks * each; i++) sums[i] = 0;
  const Points points{kept.get()};
  for_blocks<S>(a, all_kept, threads, [&](Block<S>& block, i64 first, i64 count, i64 chunk) {
    block.decode(points, first, count);
    block.differentiate(points, first, count, a.grad_w0 ? sums.get() + chunk * each : nullptr, to_features.get());
  });
  if (a.grad_planes)
    parallel(a.batch * 3, threads,
             [&](i64 i) { scatter(a, kept.get(), starts.get(), to_features.get(), i / 3, i % 3); });
  if (!a.grad_w0) return;
  const i64 of_w0 = a.hidden * a.channels, of_w1 = a.outputs * a.hidden, all = of_w0 + a.hidden + of_w1 + a.outputs;
  Scratch<double> total(all);
  for (i64 i = 0; i < all; i++) total[i] = 0;
  double *w0 = total.get(), *b0 = w0 + of_w0, *w1 = b0 + a.hidden, *b1 = w1 + of_w1;
  const Block<S> block(a);
  for (i64 chunk = 0; chunk < chunks; chunk++) block.gather(sums.get() + chunk * each, w0, b0, w1, b1);
  auto put = [](const double* src, void* dst, i64 n) {
    for (i64 i = 0; i < n; i++) static_cast<S*>(dst)[i] = static_cast<S>(src[i]);
  };
  put(w0, a.grad_w0, of_w0);
  put(b0, a.grad_b0, a.hidden);
  put(w1, a.grad_w1, of_w1);
  put(b1, a.grad_b1, a.outputs);
}

template <typename S>
void forward(const DecodeTriplaneArgs& a, int threads) {
  for_blocks<S>(a, a.batch * a.rays * a.samples, threads, [&](Block<S>& block, i64 first, i64 count, i64) {
    block.decode(Points{}, first, count);
    block.finish(first, count);
  });
}

}  // namespace

void decode_triplane_fwd(const DecodeTriplaneArgs& args, int threads) {
  args.dtype == DType::f64 ? forward<double>(args, threads) : forward<float>(args, threads);
}

void decode_triplane_bwd(const DecodeTriplaneArgs& args, int threads) {
  args.dtype == DType::f64 ? backward<double>(args, threads) : backward<float>(args, threads);
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
