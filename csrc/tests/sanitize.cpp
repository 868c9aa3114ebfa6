// The CPU launchers on generated cases, for the sanitizers (make sanitize): results are compared between one thread and
// several, and with loops written from the definition. With an argument, whatever it is, a fifth of the cases.
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "bias_act.h"
#include "composite.h"
#include "cpu.h"
#include "decode_triplane.h"
#include "layer_epilogue.h"
#include "modulation.h"
#include "sample_importance.h"
#include "upfirdn2d.h"

namespace {

using namespace epigraf;
using namespace epigraf::base;

int failures = 0, share = 1;

void expect(bool good, const char* what, i64 index) {
  if (good) return;
  if (failures++ < 20) fprintf(stderr, "FAILED: %s, element %lld\n", what, index);
}

template <typename S>
std::vector<S> numbers(i64 count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(-2, 2);
  std::vector<S> values(static_cast<size_t>(count));
  for (S& value : values) value = static_cast<S>(uniform(generator));
  return values;
}

template <typename T>
std::vector<T> stored(const std::vector<Compute<T>>& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < out.size(); i++) out[i] = Storage<T>::store(values[i]);
  return out;
}

template <typename T>
double loaded(const std::vector<T>& values, i64 i) {
  return static_cast<double>(Storage<T>::load(values[static_cast<size_t>(i)]));
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
void bias_act_case(DType dtype, i64 outer, i64 channels, i64 inner, int act) {
  using S = Compute<T>;
  const i64 count = outer * channels * inner;
  const auto n = static_cast<size_t>(count);
  const auto x = stored<T>(numbers<S>(count, 1)), grad_y = stored<T>(numbers<S>(count, 2));
  const auto grad_grad_x = stored<T>(numbers<S>(count, 3));
  const auto bias = numbers<S>(channels, 4), grad_grad_bias = numbers<S>(channels, 5);
  std::vector<std::vector<T>> first;
  std::vector<std::vector<S>> first_sums;
  for (int threads : {1, 4}) {
    std::vector<T> y(n), grad_x(n), again_y(n), again_x(n);
    std::vector<S> grad_bias(bias.size()), again_bias(bias.size());
    std::vector<S> partials(static_cast<size_t>((count ? bias_act_parts(count, channels, inner) : 0) * channels));
    BiasActArgs args{};
    args.dtype = dtype;
    args.act = act;
    args.gain = 1.25;
    args.clamp = 1.5;
    args.count = count;
    args.channels = channels;
    args.inner = inner;
    args.x = x.data();
    args.bias = bias.data();
    args.grad_y = grad_y.data();
    args.y = y.data();
    args.grad_x = grad_x.data();
    bias_act_fwd(args, threads);  // which is given no memory for sums
    args.grad_bias = grad_bias.data();
    args.partials = partials.data();
    bias_act_bwd(args, threads);
    args.grad_grad_x = grad_grad_x.data();
    args.grad_grad_bias = grad_grad_bias.data();
    args.grad_grad_y = again_y.data();
    args.grad_x = again_x.data();
    args.grad_bias = again_bias.data();
    bias_act_double_bwd(args, threads);
    if (threads == 1) {
      first = {y, grad_x, again_y, again_x};
      first_sums = {grad_bias, again_bias};
      std::vector<double> sums(bias.size());
      for (i64 e = 0; e < count; e++) {
        const auto c = static_cast<size_t>(e / inner % channels);
        sums[c] += loaded(grad_x, e);
        if (act != kLrelu) continue;
        const double u = loaded(x, e) + static_cast<double>(bias[c]), v = 1.25 * (u > 0 ? u : 0.2 * u);
        const double expected = fmin(fmax(v, -1.5), 1.5), rounding = sizeof(T) == 2 ? 1e-2 : 1e-5;
        expect(fabs(loaded(y, e) - expected) < rounding, "bias_act_fwd", e);
      }
      for (size_t c = 0; c < sums.size(); c++)
        expect(fabs(sums[c] - static_cast<double>(grad_bias[c])) < (sizeof(T) == 2 ? 0.2 : 1e-4) * (1 + fabs(sums[c])),
               "bias_act_bwd, bias", static_cast<i64>(c));  // those added here are rounded
    } else {
      const std::vector<std::vector<T>> now = {y, grad_x, again_y, again_x};
      const std::vector<std::vector<S>> sums = {grad_bias, again_bias};
      for (size_t i = 0; i < now.size(); i++) expect(same(now[i], first[i]), "bias_act by threads", static_cast<i64>(i));
      for (size_t i = 0; i < 2; i++) expect(same(sums[i], first_sums[i]), "bias sums by threads", static_cast<i64>(i));
    }
  }
}

template <typename T>
void upfirdn2d_case(DType dtype, std::mt19937& generator) {
  using S = Compute<T>;
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  UpFirDnArgs args{};
  args.dtype = dtype;
  args.batch = pick(0, 3);
  args.channels = pick(1, 20);
  args.in_height = pick(1, 20);
  args.in_width = pick(1, 40);
  args.separable = pick(0, 1);
  args.channels_last = pick(0, 1);
  args.flip = pick(0, 1);
  args.taps_x = pick(1, 7);
  args.taps_y = args.separable ? args.taps_x : pick(1, 7);
  args.up = pick(1, 3);
  args.down = pick(1, 3);
  if (pick(0, 1)) {  // what has loops of its own
    args.separable = true;
    args.taps_x = args.taps_y = 4;
    const i64 factor = pick(1, 2), direction = pick(0, 1);
    args.up = direction ? factor : 1, args.down = direction ? 1 : factor;
    const i64 sides[] = {8, 16, 32};
    if (pick(0, 1)) args.in_width = sides[pick(0, 2)];
  }
  args.pad_x = pick(-5, 9);
  args.pad_y = pick(-5, 9);
  args.out_height = pick(1, 24);
  args.out_width = pick(1, 48);
  args.gain = 0.75, args.clamp = 0.5;
  args.added_dtype = pick(0, 1) ? dtype : DType::f16;
  const i64 images = args.batch * args.channels, outputs = images * args.out_height * args.out_width;
  const bool adds = pick(0, 1);
  const auto added = stored<T>(numbers<S>(outputs, 3));
  const auto added_halves = stored<Half>(numbers<float>(outputs, 3));
  const auto bias = numbers<S>(args.channels, 4);
  if (adds) {
    args.added = args.added_dtype == dtype ? static_cast<const void*>(added.data()) : added_halves.data();
    args.bias = bias.data();
  }
  const auto x = stored<T>(numbers<S>(images * args.in_height * args.in_width, 1));
  const auto taps = numbers<S>(args.separable ? args.taps_x : args.taps_x * args.taps_y, 2);
  std::vector<T> first;
  for (int threads : {1, 3}) {
    std::vector<T> y(static_cast<size_t>(outputs));
    args.x = x.data();
    args.taps = taps.data();
    args.y = y.data();
    upfirdn2d(args, threads);
    if (threads > 1) expect(same(y, first), "upfirdn2d by threads", 0);
    first = y;
  }
  auto offset = [&](i64 image, i64 row, i64 column, i64 height, i64 width) {
    const i64 b = image / args.channels, c = image % args.channels;
    return args.channels_last ? b * height * width * args.channels +
                                    channels_last_offset(c, row, column, width, args.channels)
                              : contiguous_offset(image, row, column, height, width);
  };
  for (i64 image = 0; image < images; image++)
    for (i64 oy = 0; oy < args.out_height; oy++)
      for (i64 ox = 0; ox < args.out_width; ox++) {
        double sum = 0;
        for (i64 i = 0; i < args.taps_y; i++)
          for (i64 j = 0; j < args.taps_x; j++) {
            const i64 py = oy * args.down + i - args.pad_y, px = ox * args.down + j - args.pad_x;
            if (py < 0 || px < 0 || py % args.up || px % args.up) continue;
            if (py / args.up >= args.in_height || px / args.up >= args.in_width) continue;
            const i64 r = args.flip ? i : args.taps_y - 1 - i, c = args.flip ? j : args.taps_x - 1 - j;
            const double tap = args.separable
                                   ? static_cast<double>(taps[static_cast<size_t>(r)]) * taps[static_cast<size_t>(c)]
                                   : static_cast<double>(taps[static_cast<size_t>(r * args.taps_x + c)]);
            sum += tap * loaded(x, offset(image, py / args.up, px / args.up, args.in_height, args.in_width));
          }
        const i64 at = offset(image, oy, ox, args.out_height, args.out_width);
        const double rounding = sizeof(T) == 2 || args.added_dtype == DType::f16 ? 1e-2 : 1e-4;
        double more = 0;
        if (adds) more = loaded(added, at) + static_cast<double>(bias[static_cast<size_t>(image % args.channels)]);
        const double expected = 0.75 * sum + fmin(fmax(more, -0.5), 0.5);
        expect(fabs(loaded(first, at) - expected) < rounding * (1 + fabs(sum)), "upfirdn2d", at);
      }
}

// What a launcher writes: named outputs, compared between numbers of threads.
template <typename T>
using Outputs = std::vector<std::vector<T>>;

template <typename T>
void expect_same(const Outputs<T>& now, const Outputs<T>& first, const char* what) {
  for (size_t i = 0; i < now.size(); i++) expect(same(now[i], first[i]), what, static_cast<i64>(i));
}

template <typename T>
void layer_epilogue_case(DType dtype, std::mt19937& generator) {
  using S = Compute<T>;
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  LayerEpilogueArgs args{};
  args.dtype = dtype;
  args.channels_last = pick(0, 1);
  args.slope = 0.2, args.gain = 1.25, args.clamp = 1.5;
  args.batch = pick(0, 3), args.channels = pick(1, 20), args.height = pick(1, 40), args.width = pick(1, 24);
  const bool blur = pick(0, 1), two = pick(0, 1), vectors = pick(0, 3), noise = pick(0, 1);
  const bool one_output = two && pick(0, 1);  // for the backward, in the place of x
  const i64 pixels = args.height * args.width, of_vectors = args.batch * args.channels, count = of_vectors * pixels;
  const i64 of_x = blur ? of_vectors * (args.height + 1) * (args.width + 1) : count, map = args.batch * pixels;
  args.noise_stride = noise && pick(0, 1) ? pixels : 0;
  const auto x = stored<T>(numbers<S>(of_x, 1)), grad0 = stored<T>(numbers<S>(count, 2));
  const auto grad1 = stored<T>(numbers<S>(count, 3)), dot_x = stored<T>(numbers<S>(of_x, 4));
  const auto demod = numbers<S>(of_vectors, 5), bias = numbers<S>(args.channels, 6), style0 = numbers<S>(of_vectors, 7);
  const auto style1 = numbers<S>(of_vectors, 8), image = numbers<S>(maximum(map, pixels), 9), strength = numbers<S>(1, 10);
  const std::vector<S> taps = {S(0.125), S(0.375), S(0.375), S(0.125)};
  const i64 blocks = layer_epilogue_blocks(args.height, blur);
  args.x = x.data();
  args.taps = blur ? taps.data() : nullptr;
  args.demod = vectors ? demod.data() : nullptr;
  args.bias = vectors ? bias.data() : nullptr;
  args.noise = noise ? image.data() : nullptr;
  args.strength = noise ? strength.data() : nullptr;
  args.style[0] = vectors ? style0.data() : nullptr;
  args.style[1] = vectors && two ? style1.data() : nullptr;
  args.grad_out[0] = grad0.data();
  args.grad_out[1] = two ? grad1.data() : nullptr;
  Outputs<T> first;
  Outputs<S> first_sums;
  for (int threads : {1, 3}) {
    auto images = [&](i64 n) { return std::vector<T>(static_cast<size_t>(n)); };
    auto sums = [&](i64 n) { return std::vector<S>(static_cast<size_t>(n)); };
    Outputs<T> now = {images(count), images(count), images(of_x), images(count), images(count), images(of_x), images(of_x)};
    Outputs<S> found;
    auto partials = sums(args.batch * blocks * kLayerSums * args.channels);
    args.partials = partials.data();
    args.out[0] = now[0].data();
    args.out[1] = two ? now[1].data() : nullptr;
    auto gradients = [&](std::vector<T>& to_x, void** gradient_map) {
      const size_t from = found.size();
      for (i64 n : {of_vectors, args.channels, i64(1), of_vectors, of_vectors, map, map}) found.push_back(sums(n));
      args.grad_x = to_x.data();
      args.grad_demod = found[from].data(), args.grad_bias = found[from + 1].data();
      args.grad_strength = found[from + 2].data(), args.grad_style[0] = found[from + 3].data();
      args.grad_style[1] = two ? found[from + 4].data() : nullptr;
      args.map = found[from + 5].data();
      *gradient_map = found[from + 6].data();
    };
    found.reserve(21);
    void* unused;
    layer_epilogue_fwd(args, threads);
    gradients(now[2], &unused);
    layer_epilogue_bwd(args, threads);
    gradients(now[6], &unused);
    args.x = nullptr;  // from the outputs
    if (one_output) args.out[args.channels % 2] = nullptr;
    layer_epilogue_bwd(args, threads);
    args.x = x.data();
    if (!blur) {
      gradients(now[5], &args.gradient_map);
      args.dot_x = dot_x.data();
      args.dot_demod = demod.data(), args.dot_bias = bias.data(), args.dot_noise = noise ? image.data() : nullptr;
      args.dot_style[0] = style1.data(), args.dot_style[1] = two ? style0.data() : nullptr;
      if (args.dot_noise && !args.noise_stride) args.dot_noise = nullptr;
      args.grad_grad_out[0] = now[3].data();
      args.grad_grad_out[1] = two ? now[4].data() : nullptr;
      layer_epilogue_double_bwd(args, threads);
    }
    if (threads == 1) {
      first = now;
      first_sums = found;
    } else {
      expect_same(now, first, "layer_epilogue by threads");
      expect_same(found, first_sums, "sums of layer_epilogue by threads");
    }
  }
  if (blur) return;
  for (i64 b = 0; b < args.batch; b++)
    for (i64 c = 0; c < args.channels; c++)
      for (i64 p = 0; p < pixels; p++) {
        const i64 at = args.channels_last ? (b * pixels + p) * args.channels + c : (b * args.channels + c) * pixels + p;
        auto of = [&](const void* vector, i64 i, double absent) {
          return vector ? static_cast<double>(static_cast<const S*>(vector)[i]) : absent;
        };
        const i64 i = b * args.channels + c;
        const double u = of(args.demod, i, 1) * loaded(x, at) + of(args.bias, c, 0) +
                         of(args.strength, 0, 1) * of(args.noise, b * args.noise_stride + p, 0);
        const double y = fmin(fmax(1.25 * (u > 0 ? u : 0.2 * u), -1.5), 1.5), rounding = sizeof(T) == 2 ? 2e-2 : 1e-4;
        expect(fabs(loaded(first[0], at) - y * of(args.style[0], i, 1)) < rounding, "layer_epilogue_fwd", at);
        if (two) expect(fabs(loaded(first[1], at) - y * of(args.style[1], i, 1)) < rounding, "layer_epilogue_fwd, 2", at);
      }
}

template <typename S>
void modulation_case(DType dtype, std::mt19937& generator) {
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  ModulationArgs args{};
  args.dtype = dtype;
  args.epsilon = 1e-8, args.tiny = 1e-30;
  args.batch = pick(0, 4), args.c_out = pick(1, 20), args.c_in = pick(1, 40), args.taps = pick(1, 9);
  const bool normalized = pick(0, 1);
  const i64 weights = args.c_out * args.c_in * args.taps, styles = args.batch * args.c_in;
  const auto weight = numbers<S>(weights, 1), given = numbers<S>(styles, 2);
  const auto grad_demod = numbers<S>(args.batch * args.c_out, 6), grad_weight = numbers<S>(weights, 7);
  const auto grad_style = numbers<S>(styles, 8);
  args.weight = weight.data(), args.given = given.data(), args.grad_demod = grad_demod.data();
  args.grad_weight = pick(0, 1) ? grad_weight.data() : nullptr;
  args.grad_style = pick(0, 1) ? grad_style.data() : nullptr;
  args.stride_out = args.c_in * args.taps, args.stride_in = 1, args.stride_tap = args.c_in;
  Outputs<S> first;
  for (int threads : {1, 3}) {
    auto memory = [](i64 n) { return std::vector<S>(static_cast<size_t>(n)); };
    Outputs<S> now = {given, memory(args.batch * args.c_out), memory(args.c_out * args.c_in), memory(weights),
                      memory(styles), memory(args.batch)};
    args.style = now[0].data(), args.demod = now[1].data(), args.energy = now[2].data();
    args.grad_weight_out = now[3].data(), args.grad_style_out = now[4].data();
    args.scale = normalized ? now[5].data() : nullptr;
    modulation_fwd(args, threads);
    const Outputs<S> before = now;
    args.known = true, modulation_fwd(args, threads), args.known = false;
    expect_same(now, before, "modulation with a known energy");
    modulation_bwd(args, threads);
    if (threads == 1) first = now;
    else expect_same(now, first, "modulation by threads");
  }
  for (i64 b = 0; b < args.batch; b++) {
    std::vector<double> expected;
    double largest = 1;
    for (i64 i = 0; i < args.c_in; i++) {
      const double value = given[static_cast<size_t>(b * args.c_in + i)];
      expected.push_back(value);
      largest = normalized && (i == 0 || fabs(value) > largest) ? fabs(value) : largest;
    }
    for (i64 i = 0; i < args.c_in; i++) {
      expected[static_cast<size_t>(i)] /= largest;
      expect(fabs(loaded(first[0], b * args.c_in + i) - expected[static_cast<size_t>(i)]) < 1e-4, "modulation_fwd", i);
    }
    for (i64 o = 0; o < args.c_out; o++) {
      double sum = 1e-8;
      for (i64 i = 0; i < args.c_in; i++)
        for (i64 k = 0; k < args.taps; k++) {
          const double scaled = weight[static_cast<size_t>((o * args.c_in + i) * args.taps + k)] * expected[static_cast<size_t>(i)];
          sum += scaled * scaled;
        }
      const i64 at = b * args.c_out + o;
      expect(fabs(loaded(first[1], at) * sqrt(sum) - 1) < 1e-3, "modulation_fwd, demod", at);
    }
  }
}

template <typename S>
void decode_triplane_case(DType dtype, std::mt19937& generator) {
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  DecodeTriplaneArgs args{};
  args.dtype = dtype;
  args.batch = pick(0, 3), args.rays = pick(0, 40), args.samples = pick(1, 40);
  args.channels = pick(1, 20), args.height = pick(1, 9), args.width = pick(1, 9);
  args.whole_height = args.height, args.whole_width = args.width;
  args.hidden = pick(1, 20), args.outputs = pick(1, 6);
  args.cube_scale = 1.5;
  const i64 rays = args.batch * args.rays, points = rays * args.samples;
  const i64 of_planes = args.batch * args.height * args.width * 3 * args.channels;
  const i64 sizes[4] = {args.hidden * args.channels, args.hidden, args.outputs * args.hidden, args.outputs};
  const auto planes = numbers<S>(of_planes, 1), origins = numbers<S>(rays * 3, 2), directions = numbers<S>(rays * 3, 3);
  const auto t = numbers<S>(points, 4), w0 = numbers<S>(sizes[0], 5), b0 = numbers<S>(sizes[1], 6);
  const auto w1 = numbers<S>(sizes[2], 7), b1 = numbers<S>(sizes[3], 8), grad_y = numbers<S>(points * args.outputs, 9);
  args.planes = planes.data(), args.origins = origins.data(), args.directions = directions.data(), args.t = t.data();
  args.w0 = w0.data(), args.b0 = b0.data(), args.w1 = w1.data(), args.b1 = b1.data(), args.grad_y = grad_y.data();
  Outputs<S> first;
  for (int threads : {1, 3}) {
    Outputs<S> now;
    now.reserve(6);
    for (i64 n : {points * args.outputs, of_planes, sizes[0], sizes[1], sizes[2], sizes[3]})
      now.emplace_back(static_cast<size_t>(n));
    args.y = now[0].data(), args.grad_planes = now[1].data();
    args.grad_w0 = now[2].data(), args.grad_b0 = now[3].data(), args.grad_w1 = now[4].data(), args.grad_b1 = now[5].data();
    decode_triplane_fwd(args, threads);
    decode_triplane_bwd(args, threads);
    if (threads == 1) first = now;
    else expect_same(now, first, "decode_triplane by threads");
  }
  for (i64 p = 0; p < points; p++) {
    double position[3];
    for (int k = 0; k < 3; k++) {
      const auto at = static_cast<size_t>(p / args.samples * 3 + k);
      position[k] = (static_cast<double>(origins[at]) + static_cast<double>(t[static_cast<size_t>(p)]) * directions[at]) / 1.5;
    }
    std::vector<double> feature(static_cast<size_t>(args.channels)), y(b1.begin(), b1.end());
    for (int plane = 0; plane < 3; plane++) {
      const double x = (position[kPlaneAxes[plane][0]] + 1) * static_cast<double>(args.width - 1) / 2;
      const double row = (position[kPlaneAxes[plane][1]] + 1) * static_cast<double>(args.height - 1) / 2;
      for (i64 iy = 0; iy < args.height; iy++)
        for (i64 ix = 0; ix < args.width; ix++) {
          const double weight = fmax(0, 1 - fabs(x - static_cast<double>(ix))) * fmax(0, 1 - fabs(row - static_cast<double>(iy)));
          const i64 texel = ((p / (args.rays * args.samples) * args.height + iy) * args.width + ix) * 3 + plane;
          for (i64 c = 0; c < args.channels; c++)
            feature[static_cast<size_t>(c)] += weight * planes[static_cast<size_t>(texel * args.channels + c)] / 3;
        }
    }
    for (i64 j = 0; j < args.hidden; j++) {
      double u = b0[static_cast<size_t>(j)];
      for (i64 c = 0; c < args.channels; c++)
        u += w0[static_cast<size_t>(j * args.channels + c)] * feature[static_cast<size_t>(c)];
      for (i64 k = 0; k < args.outputs; k++)
        y[static_cast<size_t>(k)] += w1[static_cast<size_t>(k * args.hidden + j)] * sqrt(2) * (u > 0 ? u : 0.2 * u);
    }
    for (i64 k = 0; k < args.outputs; k++)
      expect(fabs(loaded(first[0], p * args.outputs + k) - y[static_cast<size_t>(k)]) < 2e-3, "decode_triplane_fwd", p);
  }
}

template <typename S>
std::vector<S> depths(i64 rays, i64 samples, unsigned seed) {
  auto t = numbers<S>(rays * samples, seed);
  for (i64 r = 0; r < rays; r++) std::sort(t.begin() + r * samples, t.begin() + (r + 1) * samples);
  return t;
}

template <typename S>
void composite_case(DType dtype, std::mt19937& generator) {
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  CompositeArgs args{};
  args.dtype = dtype;
  args.rays = pick(0, 150), args.coarse = pick(1, 40), args.fine = pick(0, 40), args.channels = pick(2, 6);
  args.density = {pick(0, 1) == 1, 1.5, 0.5, 0.25};
  args.last_back = pick(0, 1), args.white_background = args.channels > 3 && pick(0, 1);
  const i64 samples = args.coarse + args.fine, all = args.rays * samples, colours = args.channels - 1;
  const auto t = depths<S>(args.rays, args.coarse, 1), t_fine = depths<S>(args.rays, args.fine, 2);
  const auto values = numbers<S>(args.rays * args.coarse * args.channels, 3);
  const auto values_fine = numbers<S>(args.rays * args.fine * args.channels, 4);
  const auto noise = numbers<S>(all, 5), of_colours = numbers<S>(args.rays * colours, 6), of_samples = numbers<S>(all, 7);
  args.t = t.data(), args.values = values.data(), args.t_fine = t_fine.data(), args.values_fine = values_fine.data();
  args.noise = pick(0, 1) ? noise.data() : nullptr, args.background = pick(0, 1) ? of_colours.data() : nullptr;
  args.grad_rgb = of_colours.data(), args.grad_depth = of_samples.data(), args.grad_weights = of_samples.data();
  args.grad_transmittance = of_samples.data();
  Outputs<S> first;
  for (int threads : {1, 3}) {
    Outputs<S> now;
    now.reserve(8);
    for (i64 n : {args.rays * colours, args.rays, args.rays, args.rays, all, all * args.channels, all, args.rays * colours})
      now.emplace_back(static_cast<size_t>(n));
    args.rgb = now[0].data(), args.depth = now[1].data(), args.weight_sum = now[2].data();
    args.final_transmittance = now[3].data(), args.weights = now[4].data(), args.grad_values = now[5].data();
    args.grad_noise = now[6].data(), args.grad_background = now[7].data();
    composite_fwd(args, threads);
    composite_bwd(args, threads);
    if (threads == 1) first = now;
    else expect_same(now, first, "composite by threads");
  }
  // Depth is the sum of the weights times the depths, which the two sets' samples give in rising order.
  for (i64 r = 0; r < args.rays; r++) {
    std::vector<S> all_t(t.begin() + r * args.coarse, t.begin() + (r + 1) * args.coarse);
    all_t.insert(all_t.end(), t_fine.begin() + r * args.fine, t_fine.begin() + (r + 1) * args.fine);
    std::sort(all_t.begin(), all_t.end());
    double depth = 0, sum = 0;
    for (i64 k = 0; k < samples; k++) {
      const double weight = loaded(first[4], r * samples + k);
      depth += weight * static_cast<double>(all_t[static_cast<size_t>(k)]), sum += weight;
    }
    expect(fabs(loaded(first[1], r) - depth) < 1e-4, "composite_fwd, depth", r);
    expect(fabs((args.last_back ? 1 : loaded(first[2], r)) - sum) < 1e-4, "composite_fwd, weights", r);
  }
}

template <typename S>
void sample_importance_case(DType dtype, std::mt19937& generator) {
  auto pick = [&](i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(generator); };
  SampleImportanceArgs args{};
  args.dtype = dtype;
  args.rays = pick(0, 150), args.samples = pick(3, 40), args.fine = pick(0, 50), args.stride = pick(1, 4);
  args.density = {pick(0, 1) == 1, 1.5, 0.5, 0};
  args.sorted = true;
  const auto t = depths<S>(args.rays, args.samples, 1), raw = numbers<S>(args.rays * args.samples * args.stride, 2);
  auto u = numbers<S>(args.rays * args.fine, 3);
  for (S& x : u) x = (x + 2) / 4;
  args.t = t.data(), args.raw = raw.data(), args.u = u.data();
  Outputs<S> first;
  for (int threads : {1, 3}) {
    Outputs<S> now(1, std::vector<S>(u.size()));
    args.t_fine = now[0].data();
    sample_importance(args, threads);
    if (threads == 1) first = now;
    else expect_same(now, first, "sample_importance by threads");
  }
  for (i64 r = 0; r < args.rays; r++) {
    const S *of_ray = t.data() + r * args.samples, *last = of_ray + args.samples - 1;
    for (i64 k = 0; k < args.fine; k++) {
      const double here = loaded(first[0], r * args.fine + k);
      expect(here >= (of_ray[0] + of_ray[1]) / 2 - 1e-5 && here <= (last[0] + last[-1]) / 2 + 1e-5, "midpoints", r);
      expect(k == 0 || here >= loaded(first[0], r * args.fine + k - 1), "sorted samples", r);
    }
  }
}

void conversion_cases() {
  // Every half is itself again; what lies between two neighbours goes to the nearer one, the middle to the even one.
  for (unsigned bits = 0; bits < 0x7c00; bits++) {
    const float here = half_to_float(Half{static_cast<unsigned short>(bits)});
    expect(float_to_half(here).bits == bits, "half", bits);
    expect(float_to_half(-here).bits == (bits | 0x8000u), "-half", bits);
    if (bits == 0x7bff) break;
    const float next = half_to_float(Half{static_cast<unsigned short>(bits + 1)}), middle = (here + next) / 2;
    expect(float_to_half(middle).bits == bits + (bits & 1), "half, middle", bits);
    expect(float_to_half(nextafterf(middle, 0)).bits == bits, "half, below the middle", bits);
    expect(float_to_half(nextafterf(middle, next)).bits == bits + 1, "half, above the middle", bits);
  }
  expect(float_to_half(65520.0f).bits == 0x7c00, "half, overflow", 0);
  expect(isnan(half_to_float(float_to_half(std::numeric_limits<float>::quiet_NaN()))), "half, NaN", 0);
  expect(float_to_bfloat16(1.00390625f).bits == 0x3f80 && float_to_bfloat16(1.01171875f).bits == 0x3f82, "bfloat16", 0);
  expect(isnan(bfloat16_to_float(float_to_bfloat16(std::numeric_limits<float>::quiet_NaN()))), "bfloat16, NaN", 0);
}

template <typename T>
void all(DType dtype) {
  for (int act = 0; act < kActs; act++) {
    const i64 shapes[][3] = {{0, 3, 4}, {1, 1, 1}, {5, 3, 1}, {130, 70, 1}, {3, 1500, 1}, {2, 5, 77}, {2, 3, 2500}};
    for (const auto& shape : shapes) bias_act_case<T>(dtype, shape[0], shape[1], shape[2], act);
  }
  std::mt19937 generator(7);
  for (int i = 0; i < 60 / share; i++) upfirdn2d_case<T>(dtype, generator);
  for (int i = 0; i < 40 / share; i++) layer_epilogue_case<T>(dtype, generator);
}

template <typename S>
void of_full_precision(DType dtype) {
  std::mt19937 generator(8);
  for (int i = 0; i < 20 / share; i++) modulation_case<S>(dtype, generator);
  for (int i = 0; i < 12 / share; i++) decode_triplane_case<S>(dtype, generator);
  for (int i = 0; i < 20 / share; i++) composite_case<S>(dtype, generator);
  for (int i = 0; i < 20 / share; i++) sample_importance_case<S>(dtype, generator);
}

}  // namespace

int main(int arguments, char**) {
  if (arguments > 1) share = 5;
  conversion_cases();
  all<float>(DType::f32);
  all<Half>(DType::f16);
  all<BFloat16>(DType::bf16);
  all<double>(DType::f64);
  of_full_precision<float>(DType::f32);
  of_full_precision<double>(DType::f64);
  if (failures) fprintf(stderr, "%d failures\n", failures);
  puts(failures ? "FAILED" : "ok");
  return failures != 0;
}
