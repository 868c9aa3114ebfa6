// bias_act on the CPU: rows of a few kilobytes, of which every thread takes some.
#include "bias_act.h"

#include "cpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

constexpr i64 kBlock = 1024;          // elements that are computed at once
constexpr i64 kChunkElements = 32768;  // elements that are worth a thread's attention

// The sum of n numbers: 16 interleaved sums over every 256 of them, which are vectors and short chains of roundings.
template <typename S>
inline S sum_row(const S* p, i64 n) {
  double total = 0;
  for (i64 start = 0; start < n; start += 256) {
    const i64 end = minimum(n, start + 256);
    S lanes[16] = {};
    i64 i = start;
    for (; i + 16 <= end; i += 16)
      for (int k = 0; k < 16; k++) lanes[k] += p[i + k];
    for (int k = 0; i + k < end; k++) lanes[k] += p[i + k];
    for (int k = 0; k < 16; k++) total += static_cast<double>(lanes[k]);
  }
  return static_cast<S>(total);
}

enum Order { kFwd, kBwd, kDoubleBwd };

// n elements, in the type that is computed with. What an order does not need is null.
template <typename S>
struct Row {
  i64 n;
  const S *x, *grad_y, *grad_grad_x, *bias, *grad_grad_bias;  // the last two: n elements, or one for all
  S *y, *grad_grad_y, *grad_x;
  S* sums;  // n, to which grad_x is added, or one, which is set to its sum
};

// The only part that is compiled for every activation. With VARYING the k-th element has bias[k], else all have *bias.
template <typename S, int ACT, Order ORDER, bool VARYING>
void compute_row(const BiasActArgs& args, const Row<S>& row) {
  const BiasAct<ACT, S> f{static_cast<S>(args.gain), static_cast<S>(args.clamp)};
  const i64 n = row.n;
  auto at = [](const S* p, i64 i) { return p[VARYING ? i : 0]; };
  const S *__restrict x = row.x, *__restrict g = row.grad_y, *__restrict h = row.grad_grad_x;
  const S *__restrict b = row.bias, *__restrict hb = row.grad_grad_bias;
  S* __restrict grad_x = row.grad_x;
  if constexpr (ORDER == kFwd) {
    S* __restrict y = row.y;
#pragma omp simd
    for (i64 i = 0; i < n; i++) y[i] = f.value(x[i] + at(b, i));
  } else if constexpr (ORDER == kBwd) {
    if (VARYING && row.sums) {  // in one pass
      S* __restrict sums = row.sums;
#pragma omp simd
      for (i64 i = 0; i < n; i++) {
        const S v = f.backward(x[i] + b[i], g[i]);
        grad_x[i] = v;
        sums[i] += v;
      }
      return;
    }
#pragma omp simd
    for (i64 i = 0; i < n; i++) grad_x[i] = f.backward(x[i] + at(b, i), g[i]);
  } else {
    S* __restrict grad_grad_y = row.grad_grad_y;
    if (grad_grad_y) {
#pragma omp simd
      for (i64 i = 0; i < n; i++) grad_grad_y[i] = f.forward(x[i] + at(b, i), h[i] + at(hb, i));
    }
    if (grad_x) {
#pragma omp simd
      for (i64 i = 0; i < n; i++) grad_x[i] = f.second(x[i] + at(b, i), g[i], h[i] + at(hb, i));
    }
  }
  if (ORDER == kFwd || !row.sums) return;
  if (!VARYING) *row.sums = sum_row(grad_x, n);
  for (i64 i = 0; VARYING && i < n; i++) row.sums[i] += grad_x[i];
}

template <typename S, Order ORDER>
struct Loop {
  using Compute = void (*)(const BiasActArgs&, const Row<S>&);
  const BiasActArgs& args;
  Compute fixed, varying;

  // Elements first .. first+n. With VARYING the k-th has bias[k] and adds to sums[k]; else all have *bias and *sums.
  template <bool VARYING>
  void block(i64 first, i64 n, const S* bias, const S* grad_grad_bias, S* sums) const {
    S buffers[5][kBlock];
    static const S zeros[kBlock] = {};
    Row<S> row{};
    row.n = n;
    row.bias = bias ? bias : zeros;
    row.grad_grad_bias = grad_grad_bias ? grad_grad_bias : zeros;
    if (ORDER != kFwd) row.grad_y = read_row(args.dtype, args.grad_y, first, n, buffers[0]);
    row.x = args.x ? read_row(args.dtype, args.x, first, n, buffers[1]) : row.grad_y;
    if (ORDER == kFwd) row.y = row_place(args.dtype, args.y, first, buffers[3]);
    if (ORDER == kDoubleBwd) {
      row.grad_grad_x = args.grad_grad_x ? read_row(args.dtype, args.grad_grad_x, first, n, buffers[2]) : zeros;
      if (args.grad_grad_y) row.grad_grad_y = row_place(args.dtype, args.grad_grad_y, first, buffers[3]);
    }
    if (ORDER != kFwd && (args.grad_x || sums)) row.grad_x = row_place(args.dtype, args.grad_x, first, buffers[4]);
    row.sums = sums;
    (VARYING ? varying : fixed)(args, row);
    if (ORDER == kFwd) write_row(args.dtype, args.y, first, n, row.y);
    if (ORDER == kDoubleBwd) write_row(args.dtype, args.grad_grad_y, first, n, row.grad_grad_y);
    if (ORDER != kFwd) write_row(args.dtype, args.grad_x, first, n, row.grad_x);
  }

  // The channel runs fastest: part p is rows p*rows .. of `channels` elements. Rows of few channels are taken together,
  // with the bias repeated.
  void fastest_channel(int threads) const {
    const i64 channels = args.channels, outer = args.count / channels, rows = bias_act_part_rows(channels);
    const i64 together = maximum<i64>(1, kBlock / channels), width = together * channels;
    const Scratch<S> bias(args.bias ? width : 0), grad_grad_bias(args.grad_grad_bias ? width : 0);
    for (i64 i = 0; args.bias && i < width; i++) bias[i] = offset(args.bias, 0)[i % channels];
    for (i64 i = 0; args.grad_grad_bias && i < width; i++)
      grad_grad_bias[i] = offset(args.grad_grad_bias, 0)[i % channels];
    parallel(ceil_div(outer, rows), threads, [&](i64 part) {
      S several[kBlock];
      S* sums = args.grad_bias ? static_cast<S*>(args.partials) + part * channels : nullptr;
      S* running = sums && together > 1 ? several : sums;
      for (i64 i = 0; running && i < width; i++) running[i] = S(0);
      const i64 end = minimum(outer, (part + 1) * rows);
      for (i64 row = part * rows; row < end; row += together) {
        const i64 n = minimum(together, end - row) * channels;
        for (i64 i = 0; i < n; i += kBlock)
          block<true>(row * channels + i, minimum(kBlock, n - i), args.bias ? bias.get() + i : nullptr,
                      args.grad_grad_bias ? grad_grad_bias.get() + i : nullptr, running ? running + i : nullptr);
      }
      if (running == several)
        for (i64 c = 0; c < channels; c++) {
          sums[c] = S(0);
          for (i64 i = c; i < width; i += channels) sums[c] += several[i];
        }
    });
  }

  // Runs of `inner` elements of one channel, in pieces of kPartInner.
  void slow_channel(int threads) const {
    const i64 channels = args.channels, inner = args.inner, pieces = ceil_div(inner, kPartInner);
    const i64 all = args.count / inner * pieces, per_chunk = kChunkElements / minimum(inner, kPartInner);
    parallel(ceil_div(all, per_chunk), threads, [&](i64 chunk) {
      for (i64 i = chunk * per_chunk; i < minimum(all, (chunk + 1) * per_chunk); i++) {
        const i64 run = i / pieces, piece = i % pieces, c = run % channels, start = piece * kPartInner;
        const i64 part = run / channels * pieces + piece;
        S* sums = args.grad_bias ? static_cast<S*>(args.partials) + part * channels + c : nullptr;
        block<false>(run * inner + start, minimum(kPartInner, inner - start), offset(args.bias, c),
                     offset(args.grad_grad_bias, c), sums);
      }
    });
  }

  static const S* offset(const void* vector, i64 c) { return vector ? static_cast<const S*>(vector) + c : nullptr; }

  __attribute__((noinline)) void run(int threads) const {
    if (args.count > 0) args.inner == 1 ? fastest_channel(threads) : slow_channel(threads);
    if (ORDER == kFwd || !args.grad_bias) return;
    const i64 parts = args.count > 0 ? bias_act_parts(args.count, args.channels, args.inner) : 0;
    for (i64 c = 0; c < args.channels; c++) {
      double total = 0;
      for (i64 part = 0; part < parts; part++)
        total += static_cast<double>(static_cast<const S*>(args.partials)[part * args.channels + c]);
      static_cast<S*>(args.grad_bias)[c] = static_cast<S>(total);
    }
  }
};

template <typename S, Order ORDER>
void loop(const BiasActArgs& args, int threads) {
  EPIGRAF_BY_ACT(args.act, ACT,
                 (Loop<S, ORDER>{args, compute_row<S, ACT, ORDER, false>, compute_row<S, ACT, ORDER, true>}.run(threads)))
}

template <Order ORDER>
void launch(const BiasActArgs& args, int threads) {
  args.dtype == DType::f64 ? loop<double, ORDER>(args, threads) : loop<float, ORDER>(args, threads);
}

}  // namespace

void bias_act_fwd(const BiasActArgs& args, int threads) { launch<kFwd>(args, threads); }
void bias_act_bwd(const BiasActArgs& args, int threads) { launch<kBwd>(args, threads); }
void bias_act_double_bwd(const BiasActArgs& args, int threads) { launch<kDoubleBwd>(args, threads); }

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
