// The layer's epilogue on the GPU, channels-last only: 8 threads side by side own 8 vectors of channels of one pixel (or
// column), 32 pixels make a block. Sums over pixels leave a block as partial sums, which the kernels of layer_sums.h add up.
#include "layer_epilogue.h"

#include "layer_lanes.h"
#include "layer_sums.h"

namespace epigraf {
namespace EPIGRAF_ISA {

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
    if (chunk > chunks.first) __syncthreads();  // the chunk before has read its sums
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
    __syncthreads();  // the last rows are read
    write_sums<K>(a, lane.sums, shared, part, chunk);
    __syncthreads();  // the sums are
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
    if (chunk > chunks.first) __syncthreads();  // the chunk before has read its sums
    write_sums<K>(a, lane.sums, shared, part, chunk);
  }
}

}  // namespace EPIGRAF_ISA

#if !defined(__CUDACC_RTC__)

namespace {

using namespace device;

std::string sizes_of(const LayerEpilogueArgs& a) {
  return "an output of [" + std::to_string(a.batch) + ", " + std::to_string(a.channels) + ", " +
         std::to_string(a.height) + ", " + std::to_string(a.width) + "]";
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
    launch_kernel(layer_epilogue_fwd_kernel<T, V, K, true>, grid, kThreads, stream, a, threads);
  else
    launch_kernel(layer_epilogue_fwd_kernel<T, V, K, false>, grid, kThreads, stream, a, threads);
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
    launch_kernel(layer_epilogue_blurred_bwd_kernel<T, V, K>, grid, kThreads, stream, a);
  else if (a.out[0] || a.out[1])
    launch_kernel(layer_epilogue_bwd_kernel<T, V, K, true>, grid, kThreads, stream, a);
  else
    launch_kernel(layer_epilogue_bwd_kernel<T, V, K, false>, grid, kThreads, stream, a);
}

template <typename T, int V, int K>
void launch_double_bwd(const LayerEpilogueArgs& a, cudaStream_t stream) {
  const dim3 grid = grid_of("layer_epilogue_double_bwd", a, V);
  launch_kernel(layer_epilogue_double_bwd_kernel<T, V, K>, grid, kThreads, stream, a);
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
    launch_kernel(layer_slices_kernel<S>, grid, kThreads, stream, a, slices.each);
    each = slices.each;
    step = 32;
  }
  const dim3 grid(grid_size("layer_epilogue", groups), grid_size("layer_epilogue", 3 * a.batch + 2, 65535));
  launch_kernel(layer_sums_kernel<S>, grid, kThreads, stream, a, each, step);
}

void launch_sums(const LayerEpilogueArgs& a, cudaStream_t stream) {
  if (a.dtype == DType::f64)
    launch_sums<double>(a, stream);
  else
    launch_sums<float>(a, stream);
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

#endif

}  // namespace epigraf
