// The layer's epilogue on the GPU, thread by thread: what a thread knows of its channels, from x or from the outputs, the taps
// of the blur, and the sums that leave a block. Included by layer_epilogue.cu only.
#pragma once

#include "gpu.h"
#include "layer_epilogue.h"

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

// The block's sums over its pixels, to partials[part]: first over the pixels of a warp, then over warps. `shared` has
// kSumPlaces<V>; between this and any other use of it, before or after, the caller waits at a barrier.
template <int K, typename S, int V>
__device__ __forceinline__ void write_sums(const LayerEpilogueArgs& a, const S (&sums)[kLayerSums][V], S* shared,
                                           i64 part, i64 chunk) {
  constexpr int kinds = K > 1 ? kLayerSums : kLayerSums - 1, columns = kLanes * V;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
