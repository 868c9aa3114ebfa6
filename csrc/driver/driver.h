// Launches without CUDA's runtime: kernels come as machine code that was compiled for the GPU at hand, see ops/nvrtc.py, and
// go to the driver's library.
#pragma once

#include <stddef.h>

#include <functional>
#include <string>

#include "words.h"

namespace epigraf {
namespace driver {

// Machine code (a cubin) that holds the kernel of a C++ name, for the current GPU.
using Compiler = std::function<std::string(const std::string& name)>;
void set_compiler(Compiler compiler);

// Opens the driver's library, on first use.
// Throws std::runtime_error: it cannot be opened, or is too old.
void open(const char* path = "libcuda.so.1");
bool is_open();

// For a thread that has used no GPU yet, as one of autograd's may not have: it takes the one of torch's number. Others keep
// theirs, which is torch's.
void use_device(int index);

// `kernel` is where the host's function of the kernel's name stands; `arguments` points to each argument.
// Throws std::runtime_error: no name, no code, or what the driver says.
void launch(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream, void** arguments);
void fill(void* memory, unsigned char value, size_t bytes, cudaStream_t stream);

template <typename... P>
void start(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, P... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch(reinterpret_cast<const void*>(kernel), grid, block, stream, pointers);
}

}  // namespace driver
}  // namespace epigraf
