// X.cu as C++, where there is no nvcc: what the host does is compiled; kernels are only named here, and run as NVRTC compiles
// them, see driver.h.
#pragma once

#include <string.h>

#include "driver.h"

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  epigraf::driver::fill(memory, static_cast<unsigned char>(value), bytes, stream);
  return cudaSuccess;
}

inline void __syncthreads() {}
template <typename S>
S __shfl_xor_sync(unsigned, S value, int) {
  return value;
}
template <typename S>
S __shfl_down_sync(unsigned, S value, int, int = 32) {
  return value;
}

template <typename... P>
void start_kernel(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, P... arguments) {
  epigraf::driver::start(kernel, grid, block, stream, arguments...);
}
