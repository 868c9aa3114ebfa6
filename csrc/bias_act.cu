// bias_act on the GPU: 16 bytes a load where layout and alignment allow it.
#include "bias_act.h"

#include "gpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr int kThreads = 256, kRowThreads = 8, kWarp = 32;

enum Order : int { kFwd, kBwd, kDoubleBwd };

// The activation is known when a kernel is launched, not when it is compiled: that makes few kernels, and a branch that
// all threads take alike. CURVED parts those with exponentials from those without.
template <bool CURVED, typename S>
struct AnyAct {
  int act;
  S gain, clamp;

#define EPIGRAF_CASE(ACT, call) \
  case ACT: return BiasAct<ACT, S>{gain, clamp}.call;
#define EPIGRAF_SWITCH(call)                                                                              \
  if constexpr (CURVED) {                                                                                 \
    switch (act) {                                                                                        \
      EPIGRAF_CASE(kTanh, call)                                                                           \
      EPIGRAF_CASE(kSigmoid, call)                                                                        \
      EPIGRAF_CASE(kElu, call)                                                                            \
      EPIGRAF_CASE(kSelu, call)                                                                           \
      EPIGRAF_CASE(kSoftplus, call)                                                                       \
      default: return BiasAct<kSwish, S>{gain, clamp}.call;                                               \
    }                                                                                                     \
  } else {                                                                                                \
    switch (act) {                                                                                        \
      EPIGRAF_CASE(kLinear, call)                                                                         \
      EPIGRAF_CASE(kRelu, call)                                                                           \
      default: return BiasAct<kLrelu, S>{gain, clamp}.call;                                               \
    }                                                                                                     \
  }
  __device__ __forceinline__ S value(S u) const { EPIGRAF_SWITCH(value(u)) }
  __device__ __forceinline__ S backward(S u, S g) const { EPIGRAF_SWITCH(backward(u, g)) }
  __device__ __forceinline__ S forward(S u, S h) const { EPIGRAF_SWITCH(forward(u, h)) }
  __device__ __forceinline__ S second(S u, S g, S h) const { EPIGRAF_SWITCH(second(u, g, h)) }
#undef EPIGRAF_SWITCH
#undef EPIGRAF_CASE
};

// V neighbouring elements; what they add to the gradient of the bias is returned in `sums`.
template <typename T, int V, bool CURVED, Order ORDER>
__device__ __forceinline__ void compute(const BiasActArgs& args, i64 first, const Compute<T> (&bias)[V],
                                        const Compute<T> (&grad_grad_bias)[V], Compute<T> (&sums)[V]) {
  using S = Compute<T>;
  const AnyAct<CURVED, S> f{args.act, static_cast<S>(args.gain), static_cast<S>(args.clamp)};
  S x[V], g[V], h[V], out[V];
  if constexpr (ORDER == kFwd) {
    load_vector<T, V>(args.x, first, x);
#pragma unroll
    for (int k = 0; k < V; k++) out[k] = f.value(x[k] + bias[k]);
    store_vector<T, V>(args.y, first, out);
  } else {
    load_vector<T, V>(args.grad_y, first, g);
    load_vector<T, V>(args.x ? args.x : args.grad_y, first, x);  // null: the slope is the same everywhere
    if constexpr (ORDER == kBwd) {
#pragma unroll
      for (int k = 0; k < V; k++) sums[k] = f.backward(x[k] + bias[k], g[k]);
      store_vector<T, V>(args.grad_x, first, sums);
    } else {
#pragma unroll
      for (int k = 0; k < V; k++) h[k] = S(0);
      if (args.grad_grad_x) load_vector<T, V>(args.grad_grad_x, first, h);
#pragma unroll
      for (int k = 0; k < V; k++) {
        const S u = x[k] + bias[k], s = h[k] + grad_grad_bias[k];
        out[k] = f.forward(u, s);
        sums[k] = f.second(u, g[k], s);
      }
      if (args.grad_grad_y) store_vector<T, V>(args.grad_grad_y, first, out);
      if (args.grad_x) store_vector<T, V>(args.grad_x, first, sums);
    }
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

// The channel runs fastest. One block: a part, of the bias's gradient, of 32 V channels; one thread: every 8th row of V.
template <typename T, int V, bool CURVED, Order ORDER>
__global__ void __launch_bounds__(kThreads, 1) bias_act_rows_kernel(const BiasActArgs args) {
  using S = Compute<T>;
  __shared__ S shared[kRowThreads][kWarp * V];
  const i64 channels = args.channels, rows = bias_act_part_rows(channels), part = blockIdx.x;
  const i64 c = (static_cast<i64>(blockIdx.y) * kWarp + threadIdx.x) * V;
  const i64 end = minimum(args.count / channels, (part + 1) * rows);
  S bias[V], grad_grad_bias[V], sums[V], total[V];
#pragma unroll
  for (int k = 0; k < V; k++) total[k] = S(0);
  if (c < channels) {
    load_channels(args.bias, c, bias);
    load_channels(args.grad_grad_bias, c, grad_grad_bias);
    for (i64 row = part * rows + threadIdx.y; row < end; row += kRowThreads) {
      compute<T, V, CURVED, ORDER>(args, row * channels + c, bias, grad_grad_bias, sums);
#pragma unroll
      for (int k = 0; k < V; k++) total[k] += sums[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; k++) shared[threadIdx.y][threadIdx.x * V + k] = total[k];
  __syncthreads();
  for (int i = threadIdx.y * kWarp + threadIdx.x; i < kWarp * V; i += kThreads) {
    const i64 channel = static_cast<i64>(blockIdx.y) * kWarp * V + i;
    S sum = S(0);
    for (int k = 0; k < kRowThreads; k++) sum += shared[k][i];
    if (channel < channels) static_cast<S*>(args.partials)[part * channels + channel] = sum;
  }
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

// grad_bias[c] = the sum of its parts, always in the same order. One block: 32 channels.
template <typename S>
__global__ void __launch_bounds__(kThreads) bias_act_sum_parts_kernel(const BiasActArgs args, i64 parts) {
  __shared__ double shared[kRowThreads][kWarp];
  const i64 c = static_cast<i64>(blockIdx.x) * kWarp + threadIdx.x;
  double total = 0;
  if (c < args.channels)
    for (i64 part = threadIdx.y; part < parts; part += kRowThreads)
      total += static_cast<double>(static_cast<const S*>(args.partials)[part * args.channels + c]);
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= args.channels) return;
  for (int k = 1; k < kRowThreads; k++) total += shared[k][threadIdx.x];
  static_cast<S*>(args.grad_bias)[c] = static_cast<S>(total);
}

#if !defined(__CUDACC_RTC__)

namespace {

template <typename T, int V, bool CURVED, Order ORDER>
void launch(const BiasActArgs& args, cudaStream_t stream) {
  // Without a second derivative nothing is added to the gradient of the bias.
  constexpr bool kSums = ORDER == kBwd || (ORDER == kDoubleBwd && CURVED);
  const dim3 rows(kWarp, kRowThreads);
  if (args.count > 0) {
    bool summed = false;
    if constexpr (kSums) {
      if (args.grad_bias && args.inner == 1) {
        const i64 parts = bias_act_parts(args.count, args.channels, 1);
        const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(args.channels, kWarp * V)));
        bias_act_rows_kernel<T, V, CURVED, ORDER><<<grid, rows, 0, stream>>>(args);
        summed = true;
      } else if (args.grad_bias) {
        const i64 warps = args.count / args.inner * ceil_div(args.inner, kPartInner);
        const auto grid = static_cast<unsigned>(ceil_div(warps * kWarp, kThreads));
        bias_act_runs_kernel<T, V, CURVED, ORDER><<<grid, kThreads, 0, stream>>>(args);
        summed = true;
      }
    }
    if (!summed) {
      const auto grid = static_cast<unsigned>(minimum(ceil_div(args.count / V, kThreads), kMostBlocks));
      bias_act_elements_kernel<T, V, CURVED, ORDER><<<grid, kThreads, 0, stream>>>(args);
    }
  }
  if (ORDER != kFwd && args.grad_bias && args.channels > 0) {
    const i64 parts = args.count > 0 ? bias_act_parts(args.count, args.channels, args.inner) : 0;
    const auto grid = static_cast<unsigned>(ceil_div(args.channels, kWarp));
    bias_act_sum_parts_kernel<Compute<T>><<<grid, rows, 0, stream>>>(args, kSums ? parts : 0);
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
