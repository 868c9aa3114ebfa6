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

template <typename T, int V>
__device__ __forceinline__ void store_vector(void* tensor, i64 first, const Compute<T> (&values)[V]) {
  Vector<T, V> stored;
#pragma unroll
  for (int k = 0; k < V; k++) stored.of[k] = Storage<T>::store(values[k]);
  *reinterpret_cast<Vector<T, V>*>(static_cast<T*>(tensor) + first) = stored;
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

}  // namespace EPIGRAF_ISA
}  // namespace epigraf

#if !defined(__CUDACC_RTC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace epigraf {

constexpr i64 kMostBlocks = (i64(1) << 31) - 1;

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline void check_launch(const char* op, const std::string& sizes) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the launch for " + sizes + " failed: " + cudaGetErrorString(error));
}

}  // namespace epigraf

#endif
