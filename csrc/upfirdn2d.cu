// upfirdn2d on the GPU. Channels-last, threads run along channels, 16 bytes each where they can; else along the width.
#include "upfirdn2d.h"

#include "gpu.h"

namespace epigraf {
namespace EPIGRAF_ISA {

constexpr int kThreads = 256;
constexpr int kTaps = 4, kRun = 4;  // of the fast kernel: taps an axis, outputs of a thread

// The V lanes that a thread owns, of `run` outputs one below the other.
struct Place {
  i64 plane, oy, ox, lane;
};

template <int V>
__device__ __forceinline__ Place place_of(const UpFirDnArgs& args, i64 index, i64 lanes, int run) {
  const Quotient lane = divide(index, lanes / V), column = divide(lane.quotient, args.out_width);
  const Quotient row = divide(column.quotient, ceil_div(args.out_height, run));
  return Place{row.quotient, row.remainder * run, column.remainder, lane.remainder * V};
}

__device__ __forceinline__ i64 thread_index() { return static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; }

// Adds to V outputs, the first of them number `first`, what is to be added.
template <typename T, int V>
__device__ __forceinline__ void add_to(const UpFirDnArgs& args, const Place& at, i64 first, Compute<T> (&sum)[V]) {
  using S = Compute<T>;
  if (!args.added) return;
  S more[V];
  if (args.added_dtype == DType::f16) {
    float halves[V];
    load_vector<Half, V>(args.added, first, halves);
#pragma unroll
    for (int k = 0; k < V; k++) more[k] = halves[k];
  } else {
    load_vector<T, V>(args.added, first, more);
  }
  const i64 channel = args.channels_last ? at.lane : divide(at.plane, args.channels).remainder;
#pragma unroll
  for (int k = 0; k < V; k++) {
    const S bias = args.bias ? static_cast<const S*>(args.bias)[channel + k] : S(0);
    sum[k] += BiasAct<kLinear, S>{S(1), static_cast<S>(args.clamp)}.value(more[k] + bias);
  }
}

// Any filter. One thread: V lanes of one output.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) upfirdn2d_kernel(const UpFirDnArgs args, i64 lanes, i64 threads) {
  using S = Compute<T>;
  const i64 index = thread_index();
  if (index >= threads) return;
  const Place at = place_of<V>(args, index, lanes, 1);
  const Taps rows = taps_of(at.oy, args.up, args.down, args.pad_y);
  const Taps columns = taps_of(at.ox, args.up, args.down, args.pad_x);
  const S* taps = static_cast<const S*>(args.taps);
  S sum[V], x[V];
#pragma unroll
  for (int k = 0; k < V; k++) sum[k] = S(0);
  for (i64 i = rows.first, iy = rows.sample; i < args.taps_y && iy < args.in_height; i += args.up, iy++) {
    if (iy < 0) continue;
    const i64 row = args.flip ? i : args.taps_y - 1 - i;
    for (i64 j = columns.first, ix = columns.sample; j < args.taps_x && ix < args.in_width; j += args.up, ix++) {
      if (ix < 0) continue;
      const i64 column = args.flip ? j : args.taps_x - 1 - j;
      const S tap = args.separable ? taps[row] * taps[column] : taps[row * args.taps_x + column];
      load_vector<T, V>(args.x, ((at.plane * args.in_height + iy) * args.in_width + ix) * lanes + at.lane, x);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += tap * x[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; k++) sum[k] *= static_cast<S>(args.gain);
  const i64 first = ((at.plane * args.out_height + at.oy) * args.out_width + at.ox) * lanes + at.lane;
  add_to<T, V>(args, at, first, sum);
  store_vector<T, V>(args.y, first, sum);
}

// Four separable taps. One thread: V lanes of kRun outputs of a column; every input row is filtered along x once.
template <typename T, int V, int UP, int DOWN>
__global__ void __launch_bounds__(kThreads) upfirdn2d_four_taps_kernel(const UpFirDnArgs args, i64 lanes, i64 threads) {
  using S = Compute<T>;
  __shared__ S across[kTaps], down[kTaps];
  if (threadIdx.x < kTaps) {
    const S tap = static_cast<const S*>(args.taps)[args.flip ? threadIdx.x : kTaps - 1 - threadIdx.x];
    across[threadIdx.x] = tap;
    down[threadIdx.x] = tap * static_cast<S>(args.gain);
  }
  __syncthreads();
  const i64 index = thread_index();
  if (index >= threads) return;
  const Place at = place_of<V>(args, index, lanes, kRun);
  const Taps rows = taps_of(at.oy, UP, DOWN, args.pad_y), columns = taps_of(at.ox, UP, DOWN, args.pad_x);
  S sum[kRun][V];
#pragma unroll
  for (int r = 0; r < kRun; r++)
#pragma unroll
    for (int k = 0; k < V; k++) sum[r][k] = S(0);
  constexpr int kRows = ((kRun - 1) * DOWN + kTaps - 1) / UP + 1;  // input rows that the outputs meet at most
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const i64 iy = rows.sample + i;
    if (iy < 0 || iy >= args.in_height) continue;
    S filtered[V], x[V];
#pragma unroll
    for (int k = 0; k < V; k++) filtered[k] = S(0);
#pragma unroll
    for (int j = 0; j < kTaps / UP; j++) {
      const i64 ix = columns.sample + j;
      if (ix < 0 || ix >= args.in_width) continue;
      const S tap = across[columns.first + j * UP];
      load_vector<T, V>(args.x, ((at.plane * args.in_height + iy) * args.in_width + ix) * lanes + at.lane, x);
#pragma unroll
      for (int k = 0; k < V; k++) filtered[k] += tap * x[k];
    }
#pragma unroll
    for (int r = 0; r < kRun; r++) {
      const i64 tap = rows.first + i * UP - r * DOWN;
      if (tap < 0 || tap >= kTaps) continue;
#pragma unroll
      for (int k = 0; k < V; k++) sum[r][k] += down[tap] * filtered[k];
    }
  }
#pragma unroll
  for (int r = 0; r < kRun; r++) {
    const i64 oy = at.oy + r;
    if (oy >= args.out_height) break;
    const i64 first = ((at.plane * args.out_height + oy) * args.out_width + at.ox) * lanes + at.lane;
    add_to<T, V>(args, at, first, sum[r]);
    store_vector<T, V>(args.y, first, sum[r]);
  }
}

#if !defined(__CUDACC_RTC__)

namespace {

template <typename T, int V>
void launch(const UpFirDnArgs& args, cudaStream_t stream) {
  const i64 lanes = args.channels_last ? args.channels : 1;
  const i64 planes = args.channels_last ? args.batch : args.batch * args.channels;
  const i64 factors = args.separable && args.taps_x == kTaps ? 10 * args.up + args.down : 0;
  const bool fast = factors == 11 || factors == 21 || factors == 12;
  const i64 rows = fast ? ceil_div(args.out_height, kRun) : args.out_height;
  const i64 threads = planes * rows * args.out_width * (lanes / V), blocks = ceil_div(threads, kThreads);
  if (blocks > kMostBlocks) throw std::runtime_error("upfirdn2d: the output has more elements than a grid can cover");
  const auto grid = static_cast<unsigned>(blocks);
  switch (factors) {
    case 11: return launch_kernel(upfirdn2d_four_taps_kernel<T, V, 1, 1>, grid, kThreads, stream, args, lanes, threads);
    case 21: return launch_kernel(upfirdn2d_four_taps_kernel<T, V, 2, 1>, grid, kThreads, stream, args, lanes, threads);
    case 12: return launch_kernel(upfirdn2d_four_taps_kernel<T, V, 1, 2>, grid, kThreads, stream, args, lanes, threads);
    default: return launch_kernel(upfirdn2d_kernel<T, V>, grid, kThreads, stream, args, lanes, threads);
  }
}

}  // namespace

#endif

}  // namespace EPIGRAF_ISA

#if !defined(__CUDACC_RTC__)

void upfirdn2d_cuda(const UpFirDnArgs& args, uintptr_t stream) {
  using namespace device;
  if (args.batch * args.channels * args.out_height * args.out_width == 0) return;
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  EPIGRAF_BY_DTYPE(args.dtype, T, {
    constexpr int most = sizeof(T) == 8 ? 1 : kVector<T>;  // fp64 is for tests
    const bool all_aligned = aligned(args.x) && aligned(args.y) && aligned(args.added);
    if (args.channels_last && args.channels % most == 0 && all_aligned)
      launch<T, most>(args, cuda_stream);
    else
      launch<T, 1>(args, cuda_stream);
  })
  check_launch("upfirdn2d", "x [" + std::to_string(args.batch) + ", " + std::to_string(args.channels) + ", " +
                                std::to_string(args.in_height) + ", " + std::to_string(args.in_width) + "], up " +
                                std::to_string(args.up) + ", down " + std::to_string(args.down));
}

#endif

}  // namespace epigraf
