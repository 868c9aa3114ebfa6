// The CPU launchers on generated cases, for the sanitizers (make sanitize): results are compared between one thread and
// several, and with loops written from the definition.
#include <math.h>
#include <stdio.h>

#include <limits>
#include <random>
#include <vector>

#include "bias_act.h"
#include "cpu.h"
#include "upfirdn2d.h"

namespace {

using namespace epigraf;
using namespace epigraf::base;

int failures = 0;

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
    args.grad_bias = grad_bias.data();
    args.partials = partials.data();
    bias_act_fwd(args, threads);
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
  args.pad_x = pick(-5, 9);
  args.pad_y = pick(-5, 9);
  args.out_height = pick(1, 24);
  args.out_width = pick(1, 48);
  args.gain = 0.75;
  const i64 images = args.batch * args.channels, outputs = images * args.out_height * args.out_width;
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
        const double rounding = sizeof(T) == 2 ? 1e-2 : 1e-4;
        expect(fabs(loaded(first, at) - 0.75 * sum) < rounding * (1 + fabs(sum)), "upfirdn2d", at);
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
  for (int i = 0; i < 60; i++) upfirdn2d_case<T>(dtype, generator);
}

}  // namespace

int main() {
  conversion_cases();
  all<float>(DType::f32);
  all<Half>(DType::f16);
  all<BFloat16>(DType::bf16);
  all<double>(DType::f64);
  if (failures) fprintf(stderr, "%d failures\n", failures);
  puts(failures ? "FAILED" : "ok");
  return failures != 0;
}
