// The modulated layer's epilogue on the GPU, channels-last only: 8 threads side by side own 8 vectors of channels of one
// pixel (or column), 32 pixels make a block. Sums over pixels leave a block as partial sums, which two small kernels add up
// in one order.
#include "modulated_conv2d.h"

#include "gpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr int kLanes = 8, kPixels = 32, kThreads = kLanes * kPixels, kWarps = kThreads / 32;
constexpr int kRows = 8;  // of outputs that a thread of the blurred forward makes
constexpr int kOwnColumns = kPixels - 3;  // of grad_x that a block of the blurred backward makes
static_assert(kOwnColumns == kLayerColumns && kLayerPixels % kPixels == 0, "partial sums are counted elsewhere too");

// Vectors of at most 16 bytes and four elements: the backward kernels hold many of them.
template <typename T>
constexpr int kShortVector = kVector<T> < 4 ? kVector<T> : 4;

__device__ __forceinline__ i64 layer_parts(const LayerEpilogueArgs& a) {
  return layer_epilogue_parts_cuda(a.height, a.width, a.taps != nullptr);
}

template <typename S, int V>
__device__ __forceinline__ void read_vector(const void* vector, i64 first, S absent, S (&out)[V]) {
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = vector ? static_cast<const S*>(vector)[first + k] : absent;
}

template <typename S>
__device__ __forceinline__ S noise_at(const LayerEpilogueArgs& a, i64 b, i64 pixel) {
  return a.noise ? static_cast<const S*>(a.noise)[b * a.noise_stride + pixel] : S(0);
}

template <typename S>
__device__ __forceinline__ S strength_of(const LayerEpilogueArgs& a) {
  return a.strength ? *static_cast<const S*>(a.strength) : S(1);
}

template <typename S>
__device__ __forceinline__ LeakyClamp<S> activation_of(const LayerEpilogueArgs& a) {
  return LeakyClamp<S>{static_cast<S>(a.slope), static_cast<S>(a.gain), static_cast<S>(a.clamp)};
}

// Four taps of a true convolution; each axis takes half of the gain of 4.
template <typename S>
struct LayerTaps {
  S of[4];
  __device__ __forceinline__ explicit LayerTaps(const LayerEpilogueArgs& a) {
#pragma unroll
    for (int q = 0; q < 4; q++) of[q] = S(2) * static_cast<const S*>(a.taps)[3 - q];
  }
};

// Row `row` of x, filtered along the width, at output column `column`.
template <typename T, int V>
__device__ __forceinline__ void filter_across(const LayerEpilogueArgs& a, const LayerTaps<Compute<T>>& taps, i64 b,
                                              i64 row, i64 column, i64 channel, Compute<T> (&out)[V]) {
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = 0;
  if (row < 0 || row > a.height) return;
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const i64 x = column + q - 1;
    if (x < 0 || x > a.width) continue;
    Compute<T> value[V];
    load_vector<T, V>(a.x, ((b * (a.height + 1) + row) * (a.width + 1) + x) * a.channels + channel, value);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] += taps.of[q] * value[k];
  }
}

template <typename S, int V>
__device__ __forceinline__ void slide(S (&window)[4][V]) {
#pragma unroll
  for (int k = 0; k < V; k++) {
    window[0][k] = window[1][k];
    window[1][k] = window[2][k];
    window[2][k] = window[3][k];
  }
}

// One thread: V channels of kRows outputs of a column with the blur, of one output without.
template <typename T, int V, int K, bool BLUR>
__global__ void __launch_bounds__(kThreads, 1) layer_epilogue_fwd_kernel(const LayerEpilogueArgs a, i64 threads) {
  using S = Compute<T>;
  const i64 index = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= threads) return;
  const i64 run = BLUR ? kRows : 1;
  const Quotient lane = divide(index, a.channels / V), column = divide(lane.quotient, a.width);
  const Quotient rows = divide(column.quotient, ceil_div(a.height, run));
  const i64 b = rows.quotient, top = rows.remainder * run, channel = lane.remainder * V;
  const LeakyClamp<S> f = activation_of<S>(a);
  const S strength = strength_of<S>(a);
  S demod[V], bias[V], style0[V], style1[V];
  read_vector<S, V>(a.demod, b * a.channels + channel, S(1), demod);
  read_vector<S, V>(a.bias, channel, S(0), bias);
  read_vector<S, V>(a.style[0], b * a.channels + channel, S(1), style0);
  if (K > 1) read_vector<S, V>(a.style[1], b * a.channels + channel, S(1), style1);
  auto finish = [&](i64 row, const S(&v)[V]) {
    const i64 pixel = row * a.width + column.remainder;
    const S noise = strength * noise_at<S>(a, b, pixel);
    S out0[V], out1[V];
#pragma unroll
    for (int k = 0; k < V; k++) {
      const S y = f.value(layer_preactivation(v[k], demod[k], noise, bias[k]));
      out0[k] = y * style0[k];
      if (K > 1) out1[k] = y * style1[k];
    }
    const i64 offset = (b * a.height * a.width + pixel) * a.channels + channel;
    store_vector<T, V>(a.out[0], offset, out0);
    if (K > 1) store_vector<T, V>(a.out[1], offset, out1);
  };
  if constexpr (BLUR) {
    const LayerTaps<S> taps(a);
    S window[4][V];
#pragma unroll
    for (int r = 0; r < 3; r++)
      filter_across<T, V>(a, taps, b, top - 1 + r, column.remainder, channel, window[r + 1]);
    for (i64 row = top; row < top + kRows && row < a.height; row++) {
      slide(window);
      filter_across<T, V>(a, taps, b, row + 2, column.remainder, channel, window[3]);
      S v[V];
#pragma unroll
      for (int k = 0; k < V; k++)
        v[k] = taps.of[0] * window[0][k] + taps.of[1] * window[1][k] + taps.of[2] * window[2][k] +
               taps.of[3] * window[3][k];
      finish(row, v);
    }
  } else {
    S v[V];
    load_vector<T, V>(a.x, (b * a.height * a.width + top * a.width + column.remainder) * a.channels + channel, v);
    finish(top, v);
  }
}

// The block's sums over its pixels, to partials[part]: first over the pixels of a warp, then over warps. `shared` has
// kSumPlaces<V>.
template <int K, typename S, int V>
__device__ __forceinline__ void write_sums(const LayerEpilogueArgs& a, const S (&sums)[kLayerSums][V], S* shared,
                                           i64 part, i64 chunk) {
  constexpr int kinds = K > 1 ? kLayerSums : kLayerSums - 1, columns = kLanes * V;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int sum = 0; sum < kinds; sum++)
#pragma unroll
    for (int k = 0; k < V; k++) {
      S value = sums[sum][k];
      for (int distance = kLanes; distance < 32; distance *= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
      if (lane < kLanes) shared[(sum * kWarps + warp) * columns + lane * V + k] = value;
    }
  __syncthreads();
  for (int place = threadIdx.x; place < kinds * columns; place += kThreads) {
    const int sum = place / columns, column = place % columns;
    const i64 channel = chunk * columns + column;
    S total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) total += shared[(sum * kWarps + w) * columns + column];
    if (channel < a.channels) static_cast<S*>(a.partials)[(part * kLayerSums + sum) * a.channels + channel] = total;
  }
  __syncthreads();
}

// What a thread of the backward kernels knows of its V channels.
template <typename T, int V, int K>
struct LayerLane {
  using S = Compute<T>;
  S demod[V], bias[V], style[K][V], sums[kLayerSums][V];
  LeakyClamp<S> f;
  S strength;

  __device__ __forceinline__ LayerLane(const LayerEpilogueArgs& a, i64 b, i64 channel)
      : f(activation_of<S>(a)), strength(strength_of<S>(a)) {
    read_vector<S, V>(a.demod, b * a.channels + channel, S(1), demod);
    read_vector<S, V>(a.bias, channel, S(0), bias);
#pragma unroll
    for (int j = 0; j < K; j++) read_vector<S, V>(a.style[j], b * a.channels + channel, S(1), style[j]);
#pragma unroll
    for (int sum = 0; sum < kLayerSums; sum++)
#pragma unroll
      for (int k = 0; k < V; k++) sums[sum][k] = 0;
  }

  __device__ __forceinline__ void read(const LayerEpilogueArgs& a, i64 offset, S (&x)[V]) const {
    load_vector<T, V>(a.x, offset, x);
  }

  // gu of one pixel; adds to the sums.
  __device__ __forceinline__ void backward(const S (&x)[V], const S (&grad)[K][V], S noise, S (&gu)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      const S v = x[k], u = layer_preactivation(v, demod[k], strength * noise, bias[k]);
      S grad_y = grad[0][k] * style[0][k];
      if (K > 1) grad_y += grad[K - 1][k] * style[K - 1][k];
      const LayerGradient<S> e(f, u, grad_y);
      gu[k] = e.gu;
      sums[kSumDemod][k] += e.gu * v;
      sums[kSumBias][k] += e.gu;
      sums[kSumNoise][k] += e.gu * noise;
      sums[kSumStyle0][k] += grad[0][k] * e.y;
      if (K > 1) sums[kSumStyle1][k] += grad[K - 1][k] * e.y;
    }
  }

  __device__ __forceinline__ void finish(const LayerEpilogueArgs&, i64) {}
};

// The same from an output y style instead of x: the one that there is, or of two that of the larger style. Its sign is that
// of u; what is at the clamp, as it was stored, was clipped; and since u f'(u) = y where it was not,
//   sum gu v = (sum grad_y y - strength sum gu noise - bias sum gu) / demod.
// Where that style or demod is 0, what would be divided by it is 0.
template <typename T, int V, int K>
struct OutputLane {
  using S = Compute<T>;
  S demod[V], factor[K][V], along[V], limit[V], sums[kLayerSums][V];
  S slope;
  bool bounded, second[V];

  __device__ __forceinline__ OutputLane(const LayerEpilogueArgs& a, i64 b, i64 channel)
      : slope(static_cast<S>(a.slope)) {
    const S clamp = static_cast<S>(a.clamp), gain = static_cast<S>(a.gain);
    bounded = clamp - clamp == S(0);
    read_vector<S, V>(a.demod, b * a.channels + channel, S(1), demod);
#pragma unroll
    for (int j = 0; j < K; j++) read_vector<S, V>(a.style[j], b * a.channels + channel, S(1), factor[j]);
#pragma unroll
    for (int k = 0; k < V; k++) {
      second[k] = K > 1 && a.out[1] && (!a.out[0] || absolute(factor[K - 1][k]) > absolute(factor[0][k]));
      along[k] = second[k] ? factor[K - 1][k] : factor[0][k];
      limit[k] = Storage<T>::load(Storage<T>::store(clamp * absolute(along[k])));
      along[k] *= gain;
#pragma unroll
      for (int j = 0; j < K; j++) factor[j][k] *= gain;
    }
#pragma unroll
    for (int sum = 0; sum < kLayerSums; sum++)
#pragma unroll
      for (int k = 0; k < V; k++) sums[sum][k] = 0;
  }

  // The output that tells of one pixel.
  __device__ __forceinline__ void read(const LayerEpilogueArgs& a, i64 offset, S (&out)[V]) const {
    load_vector<T, V>(a.out[0] ? a.out[0] : a.out[1], offset, out);
    if (K > 1 && a.out[0] && a.out[1]) {
      S other[V];
      load_vector<T, V>(a.out[1], offset, other);
#pragma unroll
      for (int k = 0; k < V; k++) out[k] = second[k] ? other[k] : out[k];
    }
  }

  // gu of that pixel; adds to the sums where `own`.
  __device__ __forceinline__ void backward(const S (&out)[V], const S (&grad)[K][V], S noise, S (&gu)[V],
                                           bool own = true) {
#pragma unroll
    for (int k = 0; k < V; k++) {
      S grad_y = grad[0][k] * factor[0][k];
      if (K > 1) grad_y += grad[K - 1][k] * factor[K - 1][k];
      grad_y = bounded & !(absolute(out[k]) < limit[k]) ? S(0) : grad_y;
      gu[k] = out[k] * along[k] > S(0) ? grad_y : slope * grad_y;
      if (own) {
        sums[kSumDemod][k] += grad_y * out[k];
        sums[kSumBias][k] += gu[k];
        sums[kSumNoise][k] += gu[k] * noise;
        sums[kSumStyle0][k] += grad[0][k] * out[k];
        if (K > 1) sums[kSumStyle1][k] += grad[K - 1][k] * out[k];
      }
    }
  }

  // From sums of products with the output to those that `LayerLane` has.
  __device__ __forceinline__ void finish(const LayerEpilogueArgs& a, i64 channel) {
    const S strength = strength_of<S>(a), gain = static_cast<S>(a.gain);
    S bias[V];
    read_vector<S, V>(a.bias, channel, S(0), bias);
#pragma unroll
    for (int k = 0; k < V; k++) {
      const S known = strength * sums[kSumNoise][k] + bias[k] * sums[kSumBias][k];
      sums[kSumDemod][k] = quotient(quotient(sums[kSumDemod][k], along[k]) - known, demod[k]);
      sums[kSumStyle0][k] = quotient(gain * sums[kSumStyle0][k], along[k]);
      if (K > 1) sums[kSumStyle1][k] = quotient(gain * sums[kSumStyle1][k], along[k]);
    }
  }

 private:
  static __device__ __forceinline__ S absolute(S x) { return x < S(0) ? -x : x; }
  static __device__ __forceinline__ S quotient(S x, S by) { return by == S(0) ? S(0) : x / by; }
};

template <int V>
constexpr int kSumPlaces = kLayerSums * kWarps * kLanes * V;

// The sum over channels of a pixel: over the vector, then over the 8 threads side by side. The first of them adds it to
// the map, chunk after chunk of the channels.
template <typename S, int V>
__device__ __forceinline__ void add_to_map(void* map, i64 place, const S (&gu)[V], bool first_chunk, bool write) {
  S total = 0;
#pragma unroll
  for (int k = 0; k < V; k++) total += gu[k];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    total += __shfl_down_sync(0xffffffffu, total, distance, kLanes);
  if (threadIdx.x % kLanes == 0 && write) {
    S* m = static_cast<S*>(map) + place;
    *m = first_chunk ? total : *m + total;
  }
}

template <bool FIRST, typename A, typename B>
struct Choice {
  using Type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using Type = B;
};

// Which chunks of channels a block handles: one of them, or with a map, to which all add, every one.
struct ChannelChunks {
  i64 first, last;
  __device__ __forceinline__ ChannelChunks(const LayerEpilogueArgs& a, int v) {
    const i64 all = ceil_div(a.channels, kLanes * v);
    first = a.map || a.gradient_map ? 0 : blockIdx.z;
    last = a.map || a.gradient_map ? all : first + 1;
  }
};

// One block: as many pixels of image blockIdx.y as make a part, from x or from the outputs.
template <typename T, int V, int K, bool FROM_OUTPUTS>
__global__ void __launch_bounds__(kThreads, 1) layer_epilogue_bwd_kernel(const LayerEpilogueArgs a) {
  using S = Compute<T>;
  using Lane = typename Choice<FROM_OUTPUTS, OutputLane<T, V, K>, LayerLane<T, V, K>>::Type;
  __shared__ S shared[kSumPlaces<V>];
  const i64 b = blockIdx.y, pixels = a.height * a.width, part = b * layer_parts(a) + blockIdx.x;
  const i64 each = layer_epilogue_pixels_cuda(pixels);
  const i64 start = blockIdx.x * each + threadIdx.x / kLanes, end = minimum<i64>(pixels, (blockIdx.x + 1) * each);
  const ChannelChunks chunks(a, V);
  for (i64 chunk = chunks.first; chunk < chunks.last; chunk++) {
    const i64 wanted = (chunk * kLanes + threadIdx.x % kLanes) * V;
    const bool active = wanted < a.channels;
    const i64 channel = active ? wanted : 0;
    Lane lane(a, b, channel);
    for (i64 pixel = start; pixel < start + each; pixel += kPixels) {
      S gu[V];
#pragma unroll
      for (int k = 0; k < V; k++) gu[k] = 0;
      if (active && pixel < end) {
        const i64 offset = (b * pixels + pixel) * a.channels + channel;
        S read[V], grad[K][V], grad_x[V];
        lane.read(a, offset, read);
#pragma unroll
        for (int j = 0; j < K; j++) load_vector<T, V>(a.grad_out[j], offset, grad[j]);
        lane.backward(read, grad, noise_at<S>(a, b, pixel), gu);
#pragma unroll
        for (int k = 0; k < V; k++) grad_x[k] = gu[k] * lane.demod[k];
        store_vector<T, V>(a.grad_x, offset, grad_x);
      }
      if (a.map) add_to_map(a.map, b * pixels + pixel, gu, chunk == 0, pixel < end);
    }
    lane.finish(a, channel);
    write_sums<K>(a, lane.sums, shared, part, chunk);
  }
}

// One block: kLayerRows x kOwnColumns of grad_x, from gu of three more rows and columns, which comes from the outputs. A
// thread owns a column of gu and filters it along the height; a few rows of that are filtered along the width
// through shared memory.
template <typename T, int V, int K>
__global__ void __launch_bounds__(kThreads, K > 1 ? 1 : 2) layer_epilogue_blurred_bwd_kernel(const LayerEpilogueArgs a) {
  using S = Compute<T>;
  constexpr int kRowsAtOnce = K > 1 ? 2 : 4;  // as many as registers allow
  constexpr int kBuffer = kRowsAtOnce * kThreads * V;
  static_assert(2 * kBuffer >= kSumPlaces<V>, "sums take the same place");
  alignas(16) __shared__ S shared[2 * kBuffer];
  const i64 b = blockIdx.y, tiles = ceil_div(a.width + 1, kOwnColumns), part = b * layer_parts(a) + blockIdx.x;
  const Quotient tile = divide(blockIdx.x, tiles);
  const i64 top = tile.quotient * kLayerRows, bottom = minimum<i64>(top + kLayerRows, a.height + 1);
  const i64 left = tile.remainder * kOwnColumns;
  const int place = threadIdx.x / kLanes, side = threadIdx.x % kLanes;
  const i64 column = left - 2 + place;  // of gu
  const bool inside = column >= 0 && column < a.width, own_column = place >= 2 && place < 2 + kOwnColumns;
  const i64 out_column = left + place;  // of grad_x
  const bool writes = place < kOwnColumns && out_column <= a.width;
  const LayerTaps<S> taps(a);
  const ChannelChunks chunks(a, V);
  for (i64 chunk = chunks.first; chunk < chunks.last; chunk++) {
    const i64 wanted = (chunk * kLanes + side) * V;
    const bool active = wanted < a.channels;
    const i64 channel = active ? wanted : 0;
    OutputLane<T, V, K> lane(a, b, channel);
    S window[4][V];  // rows of gu
    auto next_row = [&](i64 row) {
      slide(window);
#pragma unroll
      for (int k = 0; k < V; k++) window[3][k] = 0;
      const bool there = row >= 0 && row < a.height, own = own_column && inside && there && row >= top && row < bottom;
      if (active && inside && there) {
        const i64 pixel = row * a.width + column, offset = (b * a.height * a.width + pixel) * a.channels + channel;
        S out[V], grad[K][V];
        lane.read(a, offset, out);
#pragma unroll
        for (int j = 0; j < K; j++) load_vector<T, V>(a.grad_out[j], offset, grad[j]);
        lane.backward(out, grad, noise_at<S>(a, b, pixel), window[3], own);
      }
      if (a.map) add_to_map(a.map, (b * a.height + row) * a.width + column, window[3], chunk == 0, own);
    };
    for (int r = 0; r < 3; r++) next_row(top - 2 + r);
    int buffer = 0;
    for (i64 first = top; first < bottom; first += kRowsAtOnce) {  // of grad_x
      S* rows = shared + buffer * kBuffer;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; r++) {
        next_row(first + r + 1);
#pragma unroll
        for (int k = 0; k < V; k++)
          rows[(r * kThreads + threadIdx.x) * V + k] = taps.of[0] * window[3][k] + taps.of[1] * window[2][k] +
                                                       taps.of[2] * window[1][k] + taps.of[3] * window[0][k];
      }
      __syncthreads();
      buffer ^= 1;
      if (!writes || !active) continue;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; r++) {
        if (first + r >= bottom) break;
        S grad_x[V];
#pragma unroll
        for (int k = 0; k < V; k++) grad_x[k] = 0;
#pragma unroll
        for (int q = 0; q < 4; q++)
#pragma unroll
          for (int k = 0; k < V; k++)
            grad_x[k] += taps.of[q] * rows[(r * kThreads + (place + 3 - q) * kLanes + side) * V + k];
#pragma unroll
        for (int k = 0; k < V; k++) grad_x[k] *= lane.demod[k];
        store_vector<T, V>(
            a.grad_x, ((b * (a.height + 1) + first + r) * (a.width + 1) + out_column) * a.channels + channel, grad_x);
      }
    }
    lane.finish(a, channel);
    write_sums<K>(a, lane.sums, shared, part, chunk);
  }
}

// One block: as many pixels of image blockIdx.y as make a part; no blur.
template <typename T, int V, int K>
__global__ void __launch_bounds__(kThreads, 1) layer_epilogue_double_bwd_kernel(const LayerEpilogueArgs a) {
  using S = Compute<T>;
  __shared__ S shared[kSumPlaces<V>];
  const i64 b = blockIdx.y, pixels = a.height * a.width, part = b * layer_parts(a) + blockIdx.x;
  const i64 each = layer_epilogue_pixels_cuda(pixels);
  const i64 start = blockIdx.x * each + threadIdx.x / kLanes, end = minimum<i64>(pixels, (blockIdx.x + 1) * each);
  const ChannelChunks chunks(a, V);
  for (i64 chunk = chunks.first; chunk < chunks.last; chunk++) {
    const i64 wanted = (chunk * kLanes + threadIdx.x % kLanes) * V;
    const bool active = wanted < a.channels;
    const i64 channel = active ? wanted : 0, vector = b * a.channels + channel;
    LayerLane<T, V, K> lane(a, b, channel);
    S dot_demod[V], dot_bias[V], dot_style[K][V];
    read_vector<S, V>(a.dot_demod, vector, S(0), dot_demod);
    read_vector<S, V>(a.dot_bias, channel, S(0), dot_bias);
#pragma unroll
    for (int j = 0; j < K; j++) read_vector<S, V>(a.dot_style[j], vector, S(0), dot_style[j]);
    const LayerDots dots(a);
    for (i64 pixel = start; pixel < start + each; pixel += kPixels) {
      S gu[V], gu_dot[V];
#pragma unroll
      for (int k = 0; k < V; k++) gu[k] = gu_dot[k] = 0;
      if (active && pixel < end) {
        const i64 offset = (b * pixels + pixel) * a.channels + channel;
        const S noise = noise_at<S>(a, b, pixel);
        const S dot_noise = a.dot_noise ? static_cast<const S*>(a.dot_noise)[b * pixels + pixel] : S(0);
        S x[V], dot_x[V], grad[K][V], grad_x[V], grad_grad[K][V];
        load_vector<T, V>(a.x, offset, x);
#pragma unroll
        for (int k = 0; k < V; k++) dot_x[k] = 0;
        if (a.dot_x) load_vector<T, V>(a.dot_x, offset, dot_x);
#pragma unroll
        for (int j = 0; j < K; j++) load_vector<T, V>(a.grad_out[j], offset, grad[j]);
#pragma unroll
        for (int k = 0; k < V; k++) {
          const S u = layer_preactivation(x[k], lane.demod[k], lane.strength * noise, lane.bias[k]);
          const S tangent = only_if(dots.x, lane.demod[k] * dot_x[k]) + only_if(dots.demod, dot_demod[k] * x[k]) +
                            dot_bias[k] + dot_noise;
          S grad_y = grad[0][k] * lane.style[0][k], grad_y_dot = only_if(dots.style0, grad[0][k] * dot_style[0][k]);
          if (K > 1) {
            grad_y += grad[K - 1][k] * lane.style[K - 1][k];
            grad_y_dot += only_if(dots.style1, grad[K - 1][k] * dot_style[K - 1][k]);
          }
          const LayerSecond<S> e(lane.f, u, tangent, grad_y, grad_y_dot);
          gu[k] = e.gu;
          gu_dot[k] = e.gu_dot;
          grad_x[k] = only_if(dots.second, lane.demod[k] * e.gu_dot) + only_if(dots.demod, dot_demod[k] * e.gu);
#pragma unroll
          for (int j = 0; j < K; j++)
            grad_grad[j][k] = only_if(dots.any_tangent, lane.style[j][k] * e.y_dot) +
                              only_if(j ? dots.style1 : dots.style0, dot_style[j][k] * e.y);
          lane.sums[kSumDemod][k] += only_if(dots.x, e.gu * dot_x[k]) + only_if(dots.second, e.gu_dot * x[k]);
          lane.sums[kSumBias][k] += e.gu_dot;
          lane.sums[kSumNoise][k] += only_if(dots.second, e.gu_dot * noise);
          lane.sums[kSumStyle0][k] += only_if(dots.any_tangent, grad[0][k] * e.y_dot);
          if (K > 1) lane.sums[kSumStyle1][k] += only_if(dots.any_tangent, grad[K - 1][k] * e.y_dot);
        }
        store_vector<T, V>(a.grad_x, offset, grad_x);
#pragma unroll
        for (int j = 0; j < K; j++) store_vector<T, V>(a.grad_grad_out[j], offset, grad_grad[j]);
      }
      if (a.map) add_to_map(a.map, b * pixels + pixel, gu_dot, chunk == 0, pixel < end);
      if (a.gradient_map) add_to_map(a.gradient_map, b * pixels + pixel, gu, chunk == 0, pixel < end);
    }
    write_sums<K>(a, lane.sums, shared, part, chunk);
  }
}

// Adds up slices of `each` parts of an image: image blockIdx.z, slice blockIdx.y, 32 channels. A sum goes to the place of
// the first part; of the noise's, which is one over channels too, to the first channel of the 32.
template <typename S>
__global__ void __launch_bounds__(kThreads) layer_slices_kernel(const LayerEpilogueArgs a, i64 each) {
  __shared__ double shared[kLayerSums][kWarps][32];
  const int side = threadIdx.x % 32, row = threadIdx.x / 32;
  const i64 parts = layer_parts(a), c = static_cast<i64>(blockIdx.x) * 32 + side;
  const i64 first = blockIdx.y * each, last = minimum(first + each, parts);
  const bool wanted[kLayerSums] = {a.grad_demod != nullptr, a.grad_bias != nullptr, a.grad_strength != nullptr,
                                   a.grad_style[0] != nullptr, a.grad_style[1] != nullptr};
  S* partials = static_cast<S*>(a.partials) + blockIdx.z * parts * kLayerSums * a.channels;
  double totals[kLayerSums] = {};
  if (c < a.channels)
    for (i64 part = first + row; part < last; part += kWarps)
#pragma unroll
      for (int sum = 0; sum < kLayerSums; sum++)
        if (wanted[sum]) totals[sum] += static_cast<double>(partials[(part * kLayerSums + sum) * a.channels + c]);
#pragma unroll
  for (int sum = 0; sum < kLayerSums; sum++) shared[sum][row][side] = totals[sum];
  __syncthreads();
  if (row >= kLayerSums) return;  // a warp adds up one of the sums
  double total = 0;
  for (int k = 0; k < kWarps; k++) total += shared[row][k][side];
  S* to = partials + (first * kLayerSums + row) * a.channels + c;
  if (row != kSumNoise) {
    if (c < a.channels) *to = static_cast<S>(total);
    return;
  }
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  if (side == 0) *to = static_cast<S>(total);
}

// Sums of parts 0, each, 2 each, ... of the images to gradients: block row y < 3B makes 32 channels of demod, style0 or
// style1 of an image, the next one those of the bias, the last one the strength, from every `step`th channel.
template <typename S>
__global__ void __launch_bounds__(kThreads) layer_sums_kernel(const LayerEpilogueArgs a, i64 each, i64 step) {
  __shared__ double shared[kThreads];
  const i64 parts = layer_parts(a), slices = ceil_div(parts, each), y = blockIdx.y;
  const bool one_image = y < 3 * a.batch, whole = y == 3 * a.batch + 1;
  const i64 role = one_image ? y / a.batch : 3;
  const int side = threadIdx.x % 32, row = threadIdx.x / 32;
  const i64 c = static_cast<i64>(blockIdx.x) * 32 + side;
  const int sum = whole ? kSumNoise : role >= 3 ? kSumBias : role == 0 ? kSumDemod : role == 1 ? kSumStyle0 : kSumStyle1;
  void* to = a.grad_style[1];  // by selection, not by index: arguments have one address for all threads
  if (role == 0) to = a.grad_demod;
  if (role == 1) to = a.grad_style[0];
  if (role == 3) to = whole ? a.grad_strength : a.grad_bias;
  if (!to || (whole && blockIdx.x > 0)) return;
  const i64 first = one_image ? y % a.batch : 0, last = one_image ? first + 1 : a.batch;  // of the images
  const S* partials = static_cast<const S*>(a.partials);
  double total = 0;
  const i64 of_slice = each * kLayerSums * a.channels;
  for (i64 b = first; b < last; b++) {
    const S* from = partials + (b * parts * kLayerSums + sum) * a.channels + row * of_slice;
    for (i64 slice = row; slice < slices; slice += kWarps, from += kWarps * of_slice) {
      if (whole)
        for (i64 channel = side * step; channel < a.channels; channel += 32 * step)
          total += static_cast<double>(from[channel]);
      else if (c < a.channels)
        total += static_cast<double>(from[c]);
    }
  }
  shared[threadIdx.x] = total;
  for (int half = kThreads / 2; half >= (whole ? 1 : 32); half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (whole) {
    if (threadIdx.x == 0) *static_cast<S*>(to) = static_cast<S>(shared[0]);
  } else if (row == 0 && c < a.channels) {
    static_cast<S*>(to)[one_image ? y % a.batch * a.channels + c : c] = static_cast<S>(shared[side]);
  }
}

// ---- modulation

constexpr int kImages = kWarps;  // that a block treats at once, at most
constexpr int kStage = 9 * kThreads;  // numbers of the weight that it holds
static_assert(kStage >= kImages * kThreads, "sums take the same place");

template <typename S>
__device__ __forceinline__ S sum_of_warp(S value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// styles[b, i] by the affine; `warps` warps make one of them.
template <typename S>
__global__ void __launch_bounds__(kThreads) modulation_styles_kernel(const ModulationArgs a, S* styles, int warps) {
  __shared__ S shared[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % warps;
  const Quotient place = divide((static_cast<i64>(blockIdx.x) * kWarps + warp) / warps, a.batch);
  const i64 i = place.quotient, b = place.remainder;
  S value = 0;
  if (i < a.c_in) {
    const S* row = static_cast<const S*>(a.affine) + i * a.w_dim;
    const S* w = static_cast<const S*>(a.w) + b * a.w_stride;
    for (i64 d = part * 32 + lane; d < a.w_dim; d += 32 * warps) value += row[d] * w[d];
  }
  value = sum_of_warp(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (lane > 0 || part > 0 || i >= a.c_in) return;
  for (int k = 1; k < warps; k++) value += shared[warp + k];
  styles[b * a.c_in + i] = static_cast<S>(a.factor) * value + static_cast<const S*>(a.affine_bias)[i];
}

// What `combine` makes of all threads' values[j], in warp j. `shared` has kImages x kThreads places.
template <typename S, typename F>
__device__ __forceinline__ S of_block(S* shared, const S (&values)[kImages], int images, const F& combine) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kImages; j++)
    if (j < images) shared[j * kThreads + threadIdx.x] = values[j];
  __syncthreads();
  if (warp >= images) return S(0);
  S value = shared[warp * kThreads + lane];
  for (int k = 1; k < kWarps; k++) value = combine(value, shared[warp * kThreads + k * 32 + lane]);
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// One block: output channel blockIdx.x of the images from blockIdx.y * images on. A thread sums over every kThreads-th
// input channel, a warp finishes an image. `styles` are not normalized; block x normalizes some of them.
template <typename S>
__global__ void __launch_bounds__(kThreads) modulation_fwd_kernel(const ModulationArgs a, const S* styles, int images) {
  __shared__ S shared[kStage];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const i64 o = blockIdx.x, b0 = static_cast<i64>(blockIdx.y) * images, c_in = a.c_in;
  const int here = static_cast<int>(minimum<i64>(images, a.batch - b0));
  const i64 channels = maximum<i64>(1, minimum<i64>(kThreads, kStage / maximum<i64>(a.taps, 1)));
  S sums[kImages];
#pragma unroll
  for (int j = 0; j < kImages; j++) sums[j] = 0;
  for (i64 first = 0; first < c_in && o < a.c_out; first += channels) {
    const i64 count = minimum(channels, c_in - first), i = first + thread;
    S energy = 0;
    for (i64 tap = 0; tap < a.taps; tap += kStage) {  // more than one round only for a single channel
      const i64 length = minimum<i64>(a.taps - tap, kStage);
      const S* weight = static_cast<const S*>(a.weight) + (o * c_in + first) * a.taps + tap;
      __syncthreads();
      for (i64 e = thread; e < count * length; e += kThreads) shared[e] = weight[e];
      __syncthreads();
      if (thread < count)
        for (i64 k = 0; k < length; k++) energy += shared[thread * length + k] * shared[thread * length + k];
    }
    if (thread >= count) continue;
    if (blockIdx.y == 0) static_cast<S*>(a.energy)[o * c_in + i] = energy;
#pragma unroll
    for (int j = 0; j < kImages; j++)
      if (j < here) {
        const S style = styles[(b0 + j) * c_in + i];
        sums[j] += style * style * energy;
      }
  }
  const S sum = of_block(shared, sums, here, [](S x, S y) { return x + y; });
  S scale = 1;
  if (a.scale) {
    S largest[kImages];
#pragma unroll
    for (int j = 0; j < kImages; j++) {
      largest[j] = static_cast<S>(a.tiny);
      for (i64 i = thread; j < here && i < c_in; i += kThreads) {
        const S value = styles[(b0 + j) * c_in + i];
        largest[j] = maximum_or_nan(largest[j], value < S(0) ? -value : value);
      }
    }
    scale = S(1) / of_block(shared, largest, here, [](S x, S y) { return maximum_or_nan(x, y); });
  }
  if (warp >= here) return;
  const i64 b = b0 + warp;
  if (a.scale) {
    for (i64 i = blockIdx.x * 32 + lane; i < c_in; i += gridDim.x * 32)
      static_cast<S*>(a.style)[b * c_in + i] = scale * styles[b * c_in + i];
    if (lane == 0 && blockIdx.x == 0) static_cast<S*>(a.scale)[b] = scale;
  }
  if (lane == 0 && o < a.c_out)
    static_cast<S*>(a.demod)[b * a.c_out + o] = S(1) / sqrt(scale * sum * scale + static_cast<S>(a.epsilon));
}

// Twice the gradient to demod^-2: demod = (...)^(-1/2).
template <typename S>
__device__ __forceinline__ S demodulation_inner(const ModulationArgs& a, i64 b, i64 o) {
  const S d = static_cast<const S*>(a.demod)[b * a.c_out + o];
  return -static_cast<const S*>(a.grad_demod)[b * a.c_out + o] * d * d * d;
}

// One thread: an element of the weight.
template <typename S>
__global__ void __launch_bounds__(kThreads) modulation_bwd_weight_kernel(const ModulationArgs a, i64 count) {
  const i64 index = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const Quotient tap = divide(index, a.taps), in = divide(tap.quotient, a.c_in);
  const i64 o = in.quotient, i = in.remainder;
  S factor = 0;
  for (i64 b = 0; b < a.batch; b++) {
    const S s = static_cast<const S*>(a.style)[b * a.c_in + i];
    factor += demodulation_inner<S>(a, b, o) * s * s;
  }
  S grad = factor * static_cast<const S*>(a.weight)[index];
  if (a.grad_weight)
    grad += static_cast<const S*>(a.grad_weight)[o * a.stride_out + i * a.stride_in + tap.remainder * a.stride_tap];
  static_cast<S*>(a.grad_weight_out)[index] = grad;
}

// One block: 32 input channels of image blockIdx.y.
template <typename S>
__global__ void __launch_bounds__(kThreads) modulation_bwd_style_kernel(const ModulationArgs a) {
  __shared__ S shared[kThreads];
  const i64 i = static_cast<i64>(blockIdx.x) * 32 + threadIdx.x % 32, b = blockIdx.y;
  S sum = 0;
  if (i < a.c_in)
    for (i64 o = threadIdx.x / 32; o < a.c_out; o += kThreads / 32)
      sum += demodulation_inner<S>(a, b, o) * static_cast<const S*>(a.energy)[o * a.c_in + i];
  shared[threadIdx.x] = sum;
  for (int half = kThreads / 2; half >= 32; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x >= 32 || i >= a.c_in) return;
  S grad = shared[threadIdx.x] * static_cast<const S*>(a.style)[b * a.c_in + i];
  if (a.grad_style) grad += static_cast<const S*>(a.grad_style)[b * a.c_in + i];
  if (a.scale) grad *= static_cast<const S*>(a.scale)[b];
  static_cast<S*>(a.grad_style_out)[b * a.c_in + i] = grad;
}

}  // namespace EPIGRAF_ISA

#if !defined(__CUDACC_RTC__)

namespace {

using namespace device;

std::string sizes_of(const LayerEpilogueArgs& a) {
  return "an output of [" + std::to_string(a.batch) + ", " + std::to_string(a.channels) + ", " +
         std::to_string(a.height) + ", " + std::to_string(a.width) + "]";
}

std::string sizes_of(const ModulationArgs& a) {
  return "batch " + std::to_string(a.batch) + ", a weight of [" + std::to_string(a.c_out) + ", " +
         std::to_string(a.c_in) + "] x " + std::to_string(a.taps);
}

unsigned grid_size(const char* op, i64 blocks, i64 most = kMostBlocks) {
  if (blocks > most) throw std::runtime_error(std::string(op) + ": the sizes are beyond what a grid covers");
  return static_cast<unsigned>(blocks);
}

void require_channels_last(const char* op, const LayerEpilogueArgs& a) {
  if (!a.channels_last) throw std::runtime_error(std::string(op) + ": memory must be channels_last on the GPU");
}

bool all_aligned(const LayerEpilogueArgs& a) {
  for (const void* p : {a.x, static_cast<const void*>(a.out[0]), static_cast<const void*>(a.out[1]), a.grad_out[0],
                        a.grad_out[1], static_cast<const void*>(a.grad_x), a.dot_x,
                        static_cast<const void*>(a.grad_grad_out[0]), static_cast<const void*>(a.grad_grad_out[1])})
    if (!aligned(p)) return false;
  return true;
}

template <typename T, int V, int K>
void launch_fwd(const LayerEpilogueArgs& a, cudaStream_t stream) {
  const i64 rows = a.taps ? ceil_div(a.height, kRows) : a.height;
  const i64 threads = a.batch * rows * a.width * (a.channels / V);
  const unsigned grid = grid_size("layer_epilogue_fwd", ceil_div(threads, kThreads));
  if (a.taps)
    layer_epilogue_fwd_kernel<T, V, K, true><<<grid, kThreads, 0, stream>>>(a, threads);
  else
    layer_epilogue_fwd_kernel<T, V, K, false><<<grid, kThreads, 0, stream>>>(a, threads);
}

dim3 grid_of(const char* op, const LayerEpilogueArgs& a, int v) {
  const i64 parts = layer_epilogue_parts_cuda(a.height, a.width, a.taps != nullptr);
  const i64 chunks = a.map || a.gradient_map ? 1 : ceil_div(a.channels, kLanes * v);
  return dim3(grid_size(op, parts), grid_size(op, a.batch, 65535), grid_size(op, chunks, 65535));
}

template <typename T, int V, int K>
void launch_bwd(const LayerEpilogueArgs& a, cudaStream_t stream) {
  const dim3 grid = grid_of("layer_epilogue_bwd", a, V);
  if (a.taps)
    layer_epilogue_blurred_bwd_kernel<T, V, K><<<grid, kThreads, 0, stream>>>(a);
  else if (a.out[0] || a.out[1])
    layer_epilogue_bwd_kernel<T, V, K, true><<<grid, kThreads, 0, stream>>>(a);
  else
    layer_epilogue_bwd_kernel<T, V, K, false><<<grid, kThreads, 0, stream>>>(a);
}

template <typename T, int V, int K>
void launch_double_bwd(const LayerEpilogueArgs& a, cudaStream_t stream) {
  const dim3 grid = grid_of("layer_epilogue_double_bwd", a, V);
  layer_epilogue_double_bwd_kernel<T, V, K><<<grid, kThreads, 0, stream>>>(a);
}

// Partial sums of a kind up to which one step adds them up: more launches take longer than what they save.
constexpr i64 kFewSums = 32768;

template <typename S>
void launch_sums(const LayerEpilogueArgs& a, cudaStream_t stream) {
  if (a.channels == 0) return;
  const i64 parts = layer_epilogue_parts_cuda(a.height, a.width, a.taps != nullptr), groups = ceil_div(a.channels, 32);
  i64 each = 1, step = 1;
  if (a.batch * parts * a.channels > kFewSums) {
    const Slices slices = slices_of(parts, groups * a.batch);
    const dim3 grid(grid_size("layer_epilogue", groups), grid_size("layer_epilogue", slices.count, 65535),
                    grid_size("layer_epilogue", a.batch, 65535));
    layer_slices_kernel<S><<<grid, kThreads, 0, stream>>>(a, slices.each);
    each = slices.each;
    step = 32;
  }
  const dim3 grid(grid_size("layer_epilogue", groups), grid_size("layer_epilogue", 3 * a.batch + 2, 65535));
  layer_sums_kernel<S><<<grid, kThreads, 0, stream>>>(a, each, step);
}

void launch_sums(const LayerEpilogueArgs& a, cudaStream_t stream) {
  if (a.dtype == DType::f64)
    launch_sums<double>(a, stream);
  else
    launch_sums<float>(a, stream);
}

template <typename S>
void launch_modulation(const ModulationArgs& a, cudaStream_t stream) {
  S* styles = static_cast<S*>(a.scale ? a.partials : a.style);
  if (a.affine) {
    const i64 dots = a.batch * a.c_in;
    int warps = 1;
    while (warps < kWarps && dots * warps < kFill * kWarps) warps *= 2;
    const unsigned grid = grid_size("modulation_fwd", ceil_div(dots * warps, kWarps));
    modulation_styles_kernel<S><<<grid, kThreads, 0, stream>>>(a, styles, warps);
  } else if (a.scale) {
    const auto size = static_cast<size_t>(a.batch * a.c_in) * sizeof(S);
    cudaMemcpyAsync(styles, a.style, size, cudaMemcpyDeviceToDevice, stream);
  }
  int images = kImages;
  while (images > 1 && a.c_out * ceil_div(a.batch, images) < kFill) images /= 2;
  const dim3 grid(grid_size("modulation_fwd", maximum<i64>(1, a.c_out)),
                  grid_size("modulation_fwd", ceil_div(a.batch, images), 65535));
  modulation_fwd_kernel<S><<<grid, kThreads, 0, stream>>>(a, styles, images);
}

// Calls f<T, V, K>: V is `vector` where channels and addresses allow, else 1, and for fp64, which is for tests, always 1.
#define EPIGRAF_LAYER_LAUNCH(f, vector, outputs, a, stream)                                     \
  EPIGRAF_BY_DTYPE((a).dtype, T, {                                                              \
    constexpr int most = sizeof(T) == 8 ? 1 : vector<T>;                                        \
    const bool wide = (a).channels % most == 0 && all_aligned(a), two = (outputs) > 1;          \
    if (wide)                                                                                   \
      two ? f<T, most, 2>(a, stream) : f<T, most, 1>(a, stream);                                \
    else                                                                                        \
      two ? f<T, 1, 2>(a, stream) : f<T, 1, 1>(a, stream);                                      \
  })

bool is_empty(const LayerEpilogueArgs& a) { return a.batch * a.channels * a.height * a.width == 0; }

// What is summed over channels, of which there are none.
void clear_sums(const LayerEpilogueArgs& a, cudaStream_t stream) {
  const auto size = static_cast<size_t>(a.dtype == DType::f64 ? 8 : 4);
  const auto pixels = static_cast<size_t>(a.batch * a.height * a.width);
  for (void* map : {a.map, a.gradient_map})
    if (map) cudaMemsetAsync(map, 0, pixels * size, stream);
  if (a.grad_strength) cudaMemsetAsync(a.grad_strength, 0, size, stream);
}

}  // namespace

void layer_epilogue_fwd_cuda(const LayerEpilogueArgs& a, uintptr_t stream) {
  require_channels_last("layer_epilogue_fwd", a);
  if (is_empty(a)) return;
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  EPIGRAF_LAYER_LAUNCH(launch_fwd, kVector, a.out[1] ? 2 : 1, a, cuda_stream)
  check_launch("layer_epilogue_fwd", sizes_of(a));
}

void layer_epilogue_bwd_cuda(const LayerEpilogueArgs& a, uintptr_t stream) {
  require_channels_last("layer_epilogue_bwd", a);
  if (a.taps && a.x && !is_empty(a))
    throw std::runtime_error("layer_epilogue_bwd: with the blur the GPU needs outputs, not x");
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  if (is_empty(a))
    clear_sums(a, cuda_stream);
  else
    EPIGRAF_LAYER_LAUNCH(launch_bwd, kShortVector, a.grad_out[1] ? 2 : 1, a, cuda_stream)
  check_launch("layer_epilogue_bwd", sizes_of(a));
  launch_sums(a, cuda_stream);
  check_launch("layer_epilogue_bwd, its sums", sizes_of(a));
}

void layer_epilogue_double_bwd_cuda(const LayerEpilogueArgs& a, uintptr_t stream) {
  require_channels_last("layer_epilogue_double_bwd", a);
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  if (is_empty(a))
    clear_sums(a, cuda_stream);
  else
    EPIGRAF_LAYER_LAUNCH(launch_double_bwd, kShortVector, a.grad_out[1] ? 2 : 1, a, cuda_stream)
  check_launch("layer_epilogue_double_bwd", sizes_of(a));
  launch_sums(a, cuda_stream);
  check_launch("layer_epilogue_double_bwd, its sums", sizes_of(a));
}

void modulation_fwd_cuda(const ModulationArgs& a, uintptr_t stream) {
  if (a.scale && a.partials == nullptr) throw std::runtime_error("modulation_fwd: the GPU needs partials for a scale");
  if (a.batch == 0) return;
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  if (a.dtype == DType::f64)
    launch_modulation<double>(a, cuda_stream);
  else
    launch_modulation<float>(a, cuda_stream);
  check_launch("modulation_fwd", sizes_of(a));
}

void modulation_bwd_cuda(const ModulationArgs& a, uintptr_t stream) {
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  const i64 count = a.c_out * a.c_in * a.taps;
  if (a.grad_weight_out && count > 0) {
    const unsigned grid = grid_size("modulation_bwd", ceil_div(count, kThreads));
    if (a.dtype == DType::f64)
      modulation_bwd_weight_kernel<double><<<grid, kThreads, 0, cuda_stream>>>(a, count);
    else
      modulation_bwd_weight_kernel<float><<<grid, kThreads, 0, cuda_stream>>>(a, count);
    check_launch("modulation_bwd", sizes_of(a));
  }
  if (a.grad_style_out && a.batch > 0) {
    const dim3 grid(grid_size("modulation_bwd", ceil_div(a.c_in, 32)), grid_size("modulation_bwd", a.batch, 65535));
    if (a.dtype == DType::f64)
      modulation_bwd_style_kernel<double><<<grid, kThreads, 0, cuda_stream>>>(a);
    else
      modulation_bwd_style_kernel<float><<<grid, kThreads, 0, cuda_stream>>>(a);
    check_launch("modulation_bwd, of styles", sizes_of(a));
  }
}

#endif

}  // namespace epigraf
