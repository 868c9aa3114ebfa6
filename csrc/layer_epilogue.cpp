// The layer's epilogue on the CPU: forward and both derivatives, every chunk of rows by itself, then the sums over them.
#include "layer_epilogue.h"

#include "layer_chunks.h"

namespace epigraf {
namespace EPIGRAF_ISA {
namespace {

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
  Scratch<S> noise(2 * tile), rows(5 * tile * step), sums(kLayerSums * chunk.lanes(tile));
  Scratch<double> totals(kLayerSums * a.channels);
  for (i64 i = 0; i < kLayerSums * a.channels; i++) totals[i] = 0;
  for (i64 i = 0; i < kLayerSums * chunk.lanes(tile); i++) sums[i] = 0;
  chunk.clear_map(a.map, first, last);
  S* read[2] = {rows.get(), rows.get() + 4 * tile * step};
  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 row = first; row < last; row++)
      for (i64 from = 0; from < a.width; from += tile) {
        const i64 columns = minimum(tile, a.width - from), n = columns * step;
        chunk.noise_row(row, from, from + columns, noise.get(), noise.get() + tile);
        const i64 offset = chunk.at(plane, row, from);
        const S* v = chunk.input_row(plane, offset, n, read);
        const S* g[2];
        for (int k = 0; k < K; k++) g[k] = read_row<S>(a.dtype, a.grad_out[k], offset, n, rows.get() + (1 + k) * tile * step);
        S* gu = rows.get() + 3 * tile * step;
        chunk.template any_bwd_row<K, true>(plane, columns, v, noise.get() + tile, noise.get(), g, gu, sums.get());
        chunk.flush(plane, columns, sums.get(), totals.get());
        if (a.map) chunk.add_to_map(a.map, row, from, columns, gu);
        S* grad_x = row_place<S>(a.dtype, a.grad_x, offset, gu);
        chunk.multiply_by_demod(plane, columns, gu, grad_x);
        write_row<S>(a.dtype, a.grad_x, offset, n, grad_x);
      }
  chunk.finish_outputs(totals.get());
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
  Scratch<S> noise(2 * wide), rows(10 * size), sums(kLayerSums * chunk.lanes(wide));
  Scratch<double> totals(kLayerSums * a.channels);
  for (i64 i = 0; i < kLayerSums * a.channels; i++) totals[i] = 0;
  for (i64 i = 0; i < kLayerSums * chunk.lanes(wide); i++) sums[i] = 0;
  chunk.clear_map(a.map, minimum(first, a.height), minimum(last, a.height));
  BlurredRows<S, LAST> blurred(chunk, reads_outputs(a) ? 0 : wide);
  S taps[4];
  for (int q = 0; q < 4; q++) taps[q] = 2 * static_cast<const S*>(a.taps)[3 - q];
  S *grads[2] = {rows.get(), rows.get() + size}, *padded = rows.get() + 2 * size, *result = rows.get() + 3 * size;
  auto ring = [&](i64 row) { return rows.get() + (4 + (row + 4) % 4) * size; };
  S* read[2] = {rows.get() + 8 * size, rows.get() + 9 * size};

  for (i64 plane = 0; plane < chunk.planes; plane++)
    for (i64 from = 0; from < width; from += tile) {
      const i64 to = minimum(from + tile, width), n = (to - from) * step;
      // Columns of gu that are needed, and those of them whose sums are this tile's.
      const i64 left = maximum<i64>(from - 2, 0), right = minimum(to + 1, a.width), own = minimum(to, a.width);
      const i64 top = maximum<i64>(first - 2, 0);
      if (!reads_outputs(a)) blurred.start(plane, left, right, top);
      for (i64 row = first - 2; row <= last; row++) {
        S* __restrict h = ring(row);
        if (row < 0 || row >= a.height) {
          for (i64 i = 0; i < n; i++) h[i] = 0;
        } else {
          const i64 offset = chunk.at(plane, row, left), read_n = (right - left) * step;
          const S* v = reads_outputs(a) ? chunk.input_row(plane, offset, read_n, read) : blurred.next();
          chunk.noise_row(row, left, right, noise.get(), noise.get() + wide);
          const S* g[2] = {nullptr, nullptr};
          for (int k = 0; k < K; k++) g[k] = read_row<S>(a.dtype, a.grad_out[k], offset, read_n, grads[k]);
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
              chunk.template any_bwd_row<K, true>(plane, end - begin, v + skip * step, scaled, raw, gp, gu, sums.get());
              chunk.flush(plane, end - begin, sums.get(), totals.get());
              if (a.map) chunk.add_to_map(a.map, row, begin, end - begin, gu);
            } else {
              chunk.template any_bwd_row<K, false>(plane, end - begin, v + skip * step, scaled, raw, gp, gu, sums.get());
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
  chunk.finish_outputs(totals.get());
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

}  // namespace

void layer_epilogue_fwd(const LayerEpilogueArgs& args, int threads) {
  const LayerEpilogueArgs a = merged(args);
  EPIGRAF_LAYER_CHUNKS(fwd_chunk, a, a.out[1] ? 2 : 1, threads);
}

void layer_epilogue_bwd(const LayerEpilogueArgs& args, int threads) {
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

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
