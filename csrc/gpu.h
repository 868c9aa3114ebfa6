// The device's side of common.h: vector loads, divisions, and launches that are checked. Included by X.cu files only.
#pragma once

#include "common.h"

namespace epigraf {
namespace EPIGRAF_ISA {

// As many elements as one load of 16 bytes takes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
  T of[V];
};

template <typename T, int V>
__device__ __forceinline__ void load_vector(const void* tensor, i64 first, Compute<T> (&out)[V]) {
  const Vector<T, V> loaded = *reinterpret_cast<const Vector<T, V>*>(static_cast<const T*>(tensor) + first);
#pragma unroll
  for (int k = 0; k < V; k++) out[k] = Storage<T>::load(loaded.of[k]);
}

// Words of 4 bytes, 2 or 4 of them, by one instruction. The compiler takes vectors that come out of branches and loops
// apart, and then stores every element, with a sector for each.
template <int COUNT>
__device__ __forceinline__ void store_words(void* to, const unsigned (&words)[COUNT]) {
#if defined(__CUDA_ARCH__)
  const auto address = __cvta_generic_to_global(to);
  if constexpr (COUNT == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
  else
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(address), "r"(words[0]), "r"(words[1]));
#else
  memcpy(to, words, sizeof(words));
#endif
}

// To memory that the kernel does not read.
template <typename T, int V>
__device__ __forceinline__ void store_vector(void* tensor, i64 first, const Compute<T> (&values)[V]) {
  T* to = static_cast<T*>(tensor) + first;
  if constexpr (V * sizeof(T) < 8 || sizeof(T) == 8) {
#pragma unroll
    for (int k = 0; k < V; k++) to[k] = Storage<T>::store(values[k]);
  } else {
    unsigned words[V * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int k = 0; k < V; k++) words[k] = float_bits(values[k]);
    } else {
#pragma unroll
      for (int k = 0; k < V; k += 2)
        words[k / 2] = Storage<T>::store(values[k]).bits | Storage<T>::store(values[k + 1]).bits << 16;
    }
    store_words(to, words);
  }
}

struct Quotient {
  i64 quotient, remainder;
};

// Of numbers >= 0. Those of 32 bits, nearly all, are divided many times faster.
__device__ __forceinline__ Quotient divide(i64 a, i64 b) {
  if (((a | b) >> 32) == 0) {
    const unsigned q = static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return Quotient{q, static_cast<unsigned>(a) - q * static_cast<unsigned>(b)};
  }
  return Quotient{a / b, a % b};
}

// How rows of partial sums are added up in two steps: slices of `each` rows, the last one of fewer, then their sums.
struct Slices {
  i64 each, count;
};

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace epigraf {

constexpr i64 kMostBlocks = (i64(1) << 31) - 1;

// Blocks that fill a GPU: two for each of the 132 multiprocessors of an H100. What is cut by it, and sums with that, has
// one value on all GPUs.
constexpr i64 kFill = 2 * 132;

// As many slices as it takes for kFill blocks, `blocks` of which every slice has.
inline device::Slices slices_of(i64 rows, i64 blocks) {
  const i64 each = device::maximum<i64>(1, rows / device::ceil_div(kFill, blocks));
  return device::Slices{each, device::ceil_div(rows, each)};
}

template <typename P>
struct Given {
  using type = P;  // by the kernel, not by the argument
};

// kernel<<<grid, block, 0, stream>>>(arguments...), in whose place other compilers have a function.
template <typename... P>
void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream,
                   typename Given<P>::type... arguments) {
#if defined(__CUDACC__)
  kernel<<<grid, block, 0, stream>>>(arguments...);
#else
  start_kernel(kernel, grid, block, stream, arguments...);
#endif
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A size of a grid, for the op that is named.
inline unsigned grid_size(const char* op, i64 blocks, i64 most = kMostBlocks) {
  if (blocks > most) throw std::runtime_error(std::string(op) + ": the sizes are beyond what a grid covers");
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* op, const std::string& sizes) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the launch for " + sizes + " failed: " + cudaGetErrorString(error));
}

}  // namespace epigraf

#endif
