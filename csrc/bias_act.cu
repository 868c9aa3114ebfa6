// bias_act on the GPU: 16 bytes a load where layout and alignment allow it.
#include "bias_act.h"

#include "gpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr int kThreads = 256, kRowThreads = 8, kWarp = 32;

enum Order : int { kFwd, kBwd, kDoubleBwd };

// What an order computes of V elements; `sums` is what they add to the gradient of the bias.
template <int ACT, Order ORDER, typename S, int V>
__device__ __forceinline__ void activate(const BiasActArgs& args, const S (&u)[V], const S (&g)[V], const S (&h)[V],
                                         S (&out)[V], S (&sums)[V]) {
  const BiasAct<ACT, S> f{static_cast<S>(args.gain), static_cast<S>(args.clamp)};
#pragma unroll
  for (int k = 0; k < V; k++) {
    if constexpr (ORDER == kFwd) out[k] = f.value(u[k]);
    if constexpr (ORDER == kBwd) sums[k] = f.backward(u[k], g[k]);
    if constexpr (ORDER == kDoubleBwd) {
      out[k] = f.forward(u[k], h[k]);
      sums[k] = f.second(u[k], g[k], h[k]);
    }
  }
}

// The activation is known when a kernel is launched, not when it is compiled: that makes few kernels, and a branch that
// all threads take alike, once for a vector. CURVED parts those with exponentials from those without.
template <bool CURVED, Order ORDER, typename S, int V>
__device__ __forceinline__ void activate_any(const BiasActArgs& args, const S (&u)[V], const S (&g)[V], const S (&h)[V],
                                             S (&out)[V], S (&sums)[V]) {
#define EPIGRAF_CASE(ACT) \
  case ACT: return activate<ACT, ORDER>(args, u, g, h, out, sums);
  if constexpr (CURVED) {
    switch (args.act) {
      EPIGRAF_CASE(kTanh)
      EPIGRAF_CASE(kSigmoid)
      EPIGRAF_CASE(kElu)
      EPIGRAF_CASE(kSelu)
      EPIGRAF_CASE(kSoftplus)
      default: return activate<kSwish, ORDER>(args, u, g, h, out, sums);
    }
  } else {
    switch (args.act) {
      EPIGRAF_CASE(kLinear)
      EPIGRAF_CASE(kRelu)
      default: return activate<kLrelu, ORDER>(args, u, g, h, out, sums);
    }
  }
#undef EPIGRAF_CASE
}

// V neighbouring elements; what they add to the gradient of the bias is returned in `sums`.
template <typename T, int V, bool CURVED, Order ORDER>
__device__ __forceinline__ void compute(const BiasActArgs& args, i64 first, const Compute<T> (&bias)[V],
                                        const Compute<T> (&grad_grad_bias)[V], Compute<T> (&sums)[V]) {
  using S = Compute<T>;
  S x[V], g[V] = {}, h[V] = {}, out[V];
  load_vector<T, V>(ORDER == kFwd || args.x ? args.x : args.grad_y, first, x);  // null: the slope is the same everywhere
  if constexpr (ORDER != kFwd) load_vector<T, V>(args.grad_y, first, g);
  if constexpr (ORDER == kDoubleBwd) {
    if (args.grad_grad_x) load_vector<T, V>(args.grad_grad_x, first, h);
  }
#pragma unroll
  for (int k = 0; k < V; k++) {
    x[k] += bias[k];
    h[k] += grad_grad_bias[k];
  }
  activate_any<CURVED, ORDER>(args, x, g, h, out, sums);
  if constexpr (ORDER == kFwd) store_vector<T, V>(args.y, first, out);
  if constexpr (ORDER == kBwd) store_vector<T, V>(args.grad_x, first, sums);
  if constexpr (ORDER == kDoubleBwd) {
    if (args.grad_grad_y) store_vector<T, V>(args.grad_grad_y, first, out);
    if (args.grad_x) store_vector<T, V>(args.grad_x, first, sums);
  }
}

// The vectors of V channels from c on; 0 where there is none.
template <typename S, int V>
__device__ __forceinline__ void load_channels(const void* vector, i64 c, S (&out)[V]) {
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = vector ? static_cast<const S*>(vector)[c + k] : S(0);
}
template <typename S, int V>
__device__ __forceinline__ void load_channel(const void* vector, i64 c, S (&out)[V]) {
  const S value = vector ? static_cast<const S*>(vector)[c] : S(0);
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = value;
}

// One thread: V elements, and then those a whole grid further.
template <typename T, int V, bool CURVED, Order ORDER>
__global__ void __launch_bounds__(kThreads) bias_act_elements_kernel(const BiasActArgs args) {
  using S = Compute<T>;
  const i64 stride = static_cast<i64>(gridDim.x) * kThreads * V;
  for (i64 e = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) * V; e < args.count; e += stride) {
    S bias[V], grad_grad_bias[V], sums[V];
    if (args.inner == 1) {
      const i64 c = divide(e, args.channels).remainder;
      load_channels(args.bias, c, bias);
      load_channels(args.grad_grad_bias, c, grad_grad_bias);
    } else {
      const i64 c = divide(divide(e, args.inner).quotient, args.channels).remainder;
      load_channel(args.bias, c, bias);
      load_channel(args.grad_grad_bias, c, grad_grad_bias);
    }
    compute<T, V, CURVED, ORDER>(args, e, bias, grad_grad_bias, sums);
  }
}

// The channel runs fastest. One block: a part, of the bias's gradient, of V channels for each of `across` threads side by
// side, which is a power of two; one thread: every `down`th row of V.
template <typename T, int V, bool CURVED, Order ORDER>
__global__ void __launch_bounds__(kThreads, 1) bias_act_rows_kernel(const BiasActArgs args, int across) {
  using S = Compute<T>;
  __shared__ S shared[kThreads * V];
  const int thread = threadIdx.x, side = thread % across, down = kThreads / across, columns = across * V;
  const i64 channels = args.channels, rows = bias_act_part_rows(channels), part = blockIdx.x;
  const i64 left = static_cast<i64>(blockIdx.y) * columns, c = left + side * V;
  const i64 end = minimum(args.count / channels, (part + 1) * rows);
  S bias[V], grad_grad_bias[V], sums[V], total[V];
#pragma unroll
  for (int k = 0; k < V; k++) total[k] = S(0);
  if (c < channels) {
    load_channels(args.bias, c, bias);
    load_channels(args.grad_grad_bias, c, grad_grad_bias);
    for (i64 row = part * rows + thread / across; row < end; row += down) {
      compute<T, V, CURVED, ORDER>(args, row * channels + c, bias, grad_grad_bias, sums);
#pragma unroll
      for (int k = 0; k < V; k++) total[k] += sums[k];
    }
  }
  // Element [row][column] of all that the threads have; then [kThreads / columns][column].
#pragma unroll
  for (int k = 0; k < V; k++) shared[thread * V + k] = total[k];
  __syncthreads();
  S sum = S(0);
#pragma unroll
  for (int k = 0; k < V; k++) sum += shared[(thread / columns * V + k) * columns + thread % columns];
  __syncthreads();
  shared[thread] = sum;
  __syncthreads();
  if (thread >= columns || left + thread >= channels) return;
  double total_of_block = sum;  // of few channels, up to 256 sums one after the other
  for (int other = thread + columns; other < kThreads; other += columns) total_of_block += shared[other];
  static_cast<S*>(args.partials)[part * channels + left + thread] = static_cast<S>(total_of_block);
}

// Runs of `inner` elements of one channel. One warp: a part of kPartInner elements.
template <typename T, int V, bool CURVED, Order ORDER>
__global__ void __launch_bounds__(kThreads) bias_act_runs_kernel(const BiasActArgs args) {
  using S = Compute<T>;
  const i64 pieces = ceil_div(args.inner, kPartInner), all = args.count / args.inner * pieces;
  const i64 item = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (item >= all) return;  // the whole warp
  const Quotient run = divide(item, pieces), channel = divide(run.quotient, args.channels);
  const i64 c = channel.remainder, start = run.remainder * kPartInner;
  const i64 first = run.quotient * args.inner + start, n = minimum(kPartInner, args.inner - start);
  S bias[V], grad_grad_bias[V], sums[V], total = S(0);
  load_channel(args.bias, c, bias);
  load_channel(args.grad_grad_bias, c, grad_grad_bias);
  for (i64 i = static_cast<i64>(threadIdx.x % kWarp) * V; i < n; i += kWarp * V) {
    compute<T, V, CURVED, ORDER>(args, first + i, bias, grad_grad_bias, sums);
#pragma unroll
    for (int k = 0; k < V; k++) total += sums[k];
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  const i64 part = channel.quotient * pieces + run.remainder;
  if (threadIdx.x % kWarp == 0) static_cast<S*>(args.partials)[part * args.channels + c] = total;
}

// The sum of parts first, first + stride, ... of a channel, always in the same order. One block: 32 channels, and of the
// parts the `each` that blockIdx.y counts. The sum goes to the place of the first of them or, where these are all, to
// grad_bias.
template <typename S>
__global__ void __launch_bounds__(kThreads) bias_act_sum_parts_kernel(const BiasActArgs args, i64 parts, i64 stride,
                                                                      i64 each) {
  __shared__ double shared[kRowThreads][kWarp];
  const i64 c = static_cast<i64>(blockIdx.x) * kWarp + threadIdx.x, first = blockIdx.y * each;
  const i64 end = minimum(parts, first + each);
  S* partials = static_cast<S*>(args.partials);
  double total = 0;
  if (c < args.channels)
    for (i64 part = first + threadIdx.y; part < end; part += kRowThreads)
      total += static_cast<double>(partials[part * stride * args.channels + c]);
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= args.channels) return;
  for (int k = 1; k < kRowThreads; k++) total += shared[k][threadIdx.x];
  S* to = each < parts ? partials + first * stride * args.channels : static_cast<S*>(args.grad_bias);
  to[c] = static_cast<S>(total);
}

#if !defined(__CUDACC_RTC__)

namespace {

// Threads side by side for channels that are `vectors` vectors: a power of two, so that few have none.
int threads_across(i64 vectors) {
  int across = 1;
  while (across < kWarp && across < vectors) across *= 2;
  return across;
}

// Parts up to which one step adds them up: more launches take longer than what they save.
constexpr i64 kFewParts = 256;

template <typename S>
void launch_sum_parts(const BiasActArgs& args, i64 parts, cudaStream_t stream) {
  const dim3 threads(kWarp, kRowThreads);
  const auto groups = static_cast<unsigned>(ceil_div(args.channels, kWarp));
  i64 stride = 1;
  if (parts > kFewParts) {
    const Slices slices = slices_of(parts, groups);
    const dim3 grid(groups, static_cast<unsigned>(slices.count));
    launch_kernel(bias_act_sum_parts_kernel<S>, grid, threads, stream, args, parts, 1, slices.each);
    stride = slices.each;
    parts = slices.count;
  }
  launch_kernel(bias_act_sum_parts_kernel<S>, groups, threads, stream, args, parts, stride, parts);
}

template <typename T, int V, bool CURVED, Order ORDER>
void launch(const BiasActArgs& args, cudaStream_t stream) {
  // Without a second derivative nothing is added to the gradient of the bias.
  constexpr bool kSums = ORDER == kBwd || (ORDER == kDoubleBwd && CURVED);
  if (args.count > 0) {
    bool summed = false;
    if constexpr (kSums) {
      if (args.grad_bias && args.inner == 1) {
        const i64 parts = bias_act_parts(args.count, args.channels, 1);
        const int across = threads_across(args.channels / V);
        const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(args.channels, across * V)));
        launch_kernel(bias_act_rows_kernel<T, V, CURVED, ORDER>, grid, kThreads, stream, args, across);
        summed = true;
      } else if (args.grad_bias) {
        const i64 warps = args.count / args.inner * ceil_div(args.inner, kPartInner);
        const auto grid = static_cast<unsigned>(ceil_div(warps * kWarp, kThreads));
        launch_kernel(bias_act_runs_kernel<T, V, CURVED, ORDER>, grid, kThreads, stream, args);
        summed = true;
      }
    }
    if (!summed) {
      const auto grid = static_cast<unsigned>(minimum(ceil_div(args.count / V, kThreads), kMostBlocks));
      launch_kernel(bias_act_elements_kernel<T, V, CURVED, ORDER>, grid, kThreads, stream, args);
    }
  }
  if (ORDER != kFwd && args.grad_bias && args.channels > 0) {
    const i64 parts = args.count > 0 ? bias_act_parts(args.count, args.channels, args.inner) : 0;
    launch_sum_parts<Compute<T>>(args, kSums ? parts : 0, stream);
  }
}

template <Order ORDER>
void launch(const char* op, const BiasActArgs& args, uintptr_t stream_number) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_number);
  bool fits = true;
  for (const void* tensor : {args.grad_grad_x, args.grad_y, args.x, static_cast<const void*>(args.y),
                             static_cast<const void*>(args.grad_grad_y), static_cast<const void*>(args.grad_x)})
    fits = fits && aligned(tensor);
  const i64 fastest = args.inner == 1 ? args.channels : args.inner;
  EPIGRAF_BY_DTYPE(args.dtype, T, {
    if (is_curved(args.act))
      launch<T, 1, true, ORDER>(args, stream);
    else if (fits && fastest % kVector<T> == 0)
      launch<T, kVector<T>, false, ORDER>(args, stream);
    else
      launch<T, 1, false, ORDER>(args, stream);
  })
  check_launch(op, "x of " + std::to_string(args.count) + " elements, " + std::to_string(args.channels) +
                       " channels, inner " + std::to_string(args.inner));
}

}  // namespace

#endif

}  // namespace EPIGRAF_ISA

#if !defined(__CUDACC_RTC__)

void bias_act_fwd_cuda(const BiasActArgs& args, uintptr_t stream) {
  device::launch<device::kFwd>("bias_act_fwd", args, stream);
}
void bias_act_bwd_cuda(const BiasActArgs& args, uintptr_t stream) {
  device::launch<device::kBwd>("bias_act_bwd", args, stream);
}
void bias_act_double_bwd_cuda(const BiasActArgs& args, uintptr_t stream) {
  device::launch<device::kDoubleBwd>("bias_act_double_bwd", args, stream);
}

#endif

}  // namespace epigraf
