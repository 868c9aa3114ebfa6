// The modulation on the GPU: demodulation coefficients, a block for each output channel; and the gradients to weight and
// style.
#include "modulation.h"

#include "gpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kImages = kWarps;  // that a block treats at once, at most
constexpr int kStage = 9 * kThreads;  // numbers of the weight that it holds
static_assert(kStage >= kImages * kThreads, "sums take the same place");

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
// input channel, a warp finishes an image. Block x normalizes some of the styles.
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
    if (a.known && thread < count) energy = static_cast<const S*>(a.energy)[o * c_in + i];
    for (i64 tap = 0; tap < a.taps && !a.known; tap += kStage) {  // more than one round only for a single channel
      const i64 length = minimum<i64>(a.taps - tap, kStage);
      const S* weight = static_cast<const S*>(a.weight) + (o * c_in + first) * a.taps + tap;
      __syncthreads();
      for (i64 e = thread; e < count * length; e += kThreads) shared[e] = weight[e];
      __syncthreads();
      if (thread < count)
        for (i64 k = 0; k < length; k++) energy += shared[thread * length + k] * shared[thread * length + k];
    }
    if (thread >= count) continue;
    if (blockIdx.y == 0 && !a.known) static_cast<S*>(a.energy)[o * c_in + i] = energy;
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

std::string sizes_of(const ModulationArgs& a) {
  return "batch " + std::to_string(a.batch) + ", a weight of [" + std::to_string(a.c_out) + ", " +
         std::to_string(a.c_in) + "] x " + std::to_string(a.taps);
}

template <typename S>
void launch_modulation(const ModulationArgs& a, cudaStream_t stream) {
  int images = kImages;
  while (images > 1 && a.c_out * ceil_div(a.batch, images) < kFill) images /= 2;
  const dim3 grid(grid_size("modulation_fwd", maximum<i64>(1, a.c_out)),
                  grid_size("modulation_fwd", ceil_div(a.batch, images), 65535));
  launch_kernel(modulation_fwd_kernel<S>, grid, kThreads, stream, a, static_cast<const S*>(a.given), images);
}

}  // namespace

void modulation_fwd_cuda(const ModulationArgs& a, uintptr_t stream) {
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
      launch_kernel(modulation_bwd_weight_kernel<double>, grid, kThreads, cuda_stream, a, count);
    else
      launch_kernel(modulation_bwd_weight_kernel<float>, grid, kThreads, cuda_stream, a, count);
    check_launch("modulation_bwd", sizes_of(a));
  }
  if (a.grad_style_out && a.batch > 0) {
    const dim3 grid(grid_size("modulation_bwd", ceil_div(a.c_in, 32)), grid_size("modulation_bwd", a.batch, 65535));
    if (a.dtype == DType::f64)
      launch_kernel(modulation_bwd_style_kernel<double>, grid, kThreads, cuda_stream, a);
    else
      launch_kernel(modulation_bwd_style_kernel<float>, grid, kThreads, cuda_stream, a);
    check_launch("modulation_bwd, of styles", sizes_of(a));
  }
}

#endif

}  // namespace epigraf
