// The sums of the layer's epilogue on the GPU: blocks' partial sums are added up by two small kernels, in one order. Included
// by layer_epilogue.cu only.
#pragma once

#include "layer_lanes.h"

namespace epigraf {
namespace EPIGRAF_ISA {

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

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
