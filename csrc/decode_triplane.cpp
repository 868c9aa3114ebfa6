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

template <typename S>
void position_of(const DecodeTriplaneArgs& a, i64 point, S* out) {
  const S* origin = static_cast<const S*>(a.origins);
  if (!a.directions) {
    for (int k = 0; k < 3; k++) out[k] = origin[point * 3 + k] / S(a.cube_scale);
    return;
  }
  const i64 ray = point / a.samples;
  const S t = static_cast<const S*>(a.t)[point];
  const S* direction = static_cast<const S*>(a.directions) + ray * 3;
  for (int k = 0; k < 3; k++) out[k] = (origin[ray * 3 + k] + t * direction[k]) / S(a.cube_scale);
}

// `neighbours` along the columns and the rows of an image's planes.
template <typename S>
Neighbours<S> columns_at(const DecodeTriplaneArgs& a, i64 image, S position) {
  return neighbours(position, a.whole_width, a.first ? a.first[image * 2 + 1] : 0, a.width);
}

template <typename S>
Neighbours<S> rows_at(const DecodeTriplaneArgs& a, i64 image, S position) {
  return neighbours(position, a.whole_height, a.first ? a.first[image * 2] : 0, a.height);
}

// The four texels of one plane, as offsets in numbers, with their weights.
template <typename S>
struct Taps {
  i64 offset[4];
  S weight[4];

  Taps(const DecodeTriplaneArgs& a, const Neighbours<S>& x, const Neighbours<S>& y, i64 plane) {
    const i64 texel = 3 * a.channels, above = y.first * a.width, below = y.second * a.width;
    const i64 shift = plane * a.channels;
    offset[0] = (above + x.first) * texel + shift, weight[0] = x.first_weight * y.first_weight;
    offset[1] = (below + x.first) * texel + shift, weight[1] = x.first_weight * y.second_weight;
    offset[2] = (above + x.second) * texel + shift, weight[2] = x.second_weight * y.first_weight;
    offset[3] = (below + x.second) * texel + shift, weight[3] = x.second_weight * y.second_weight;
  }
};

// Some of the points, or all of them.
struct Points {
  const i64* some;  // their numbers, or null
  i64 operator[](i64 i) const { return some ? some[i] : i; }
};

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
    for (i64 p = 0; p < count; p++) sample(points[first + p], feature.get() + p * channels_);
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

  void sample(i64 point, S* out) const {
    S position[3];
    position_of(a, point, position);
    const i64 number = point / (a.rays * a.samples);
    const S* image = static_cast<const S*>(a.planes) + number * a.height * a.width * 3 * a.channels;
    const Neighbours<S> x0 = columns_at(a, number, position[0]), x1 = columns_at(a, number, position[1]);
    const Neighbours<S> y1 = rows_at(a, number, position[1]), y2 = rows_at(a, number, position[2]);
    const Taps<S> taps[3] = {{a, x0, y1, 0}, {a, x0, y2, 1}, {a, x1, y2, 2}};
    using V = Register<S>;
    constexpr i64 L = V::kSize;
    i64 c = 0;
    for (; c + L <= a.channels; c += L) {
      V sum{};
      for (const auto& of_plane : taps)
        for (int k = 0; k < 4; k++) sum += of_plane.weight[k] * V::load(image + of_plane.offset[k] + c);
      (sum / S(3)).store(out + c);
    }
    for (; c < a.channels; c++) {
      S sum = 0;
      for (const auto& of_plane : taps)
        for (int k = 0; k < 4; k++) sum += of_plane.weight[k] * image[of_plane.offset[k] + c];
      out[c] = sum / 3;
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
  for (i64 i = starts[image]; i < starts[image + 1]; i++) {
    S position[3];
    position_of(a, kept[i], position);
    const Taps<S> taps(a, columns_at(a, image, position[kPlaneAxes[plane][0]]),
                       rows_at(a, image, position[kPlaneAxes[plane][1]]), plane);
    const S* row = to_features + i * a.channels;
    for (int k = 0; k < 4; k++) accumulate(grad + taps.offset[k], row, taps.weight[k], a.channels);
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
