// CUDA's words for a compiler that knows only C++.
#pragma once

#include <stddef.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // what fails has thrown
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
