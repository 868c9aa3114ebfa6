// CUDA's words on one thread of a CPU, for tests: X.cu runs as it is, without a GPU.
//
// The threads of a block are fibers. One runs until it waits for others, at __syncthreads or a shuffle; then the next one
// does. Blocks run one after the other. What is found so are wrong indices, sums and forgotten barriers of shared memory
// that the order of threads shows; what is not are races within a warp, and speed.
//
// Where there is a recorder, kernels are not run here but handed to it: see bench/ptx/csrc_host.py. Where a driver is open,
// they go to it: csrc/driver/ is tested so, with a stand-in for the driver.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "../../driver/driver.h"

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t count, cudaStream_t) {
  memset(memory, value, count);
  return cudaSuccess;
}

namespace emulation {

enum class Waits { no, for_warp, for_block, done };

// A fiber is made once, and then runs one thread of a block after the other.
struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits; much cheaper than a context, which has the signals' mask in it
  bool started;
  std::vector<char> stack;
  Waits waits;
  dim3 index;
  unsigned char slot[16];  // what a shuffle hands over
};

constexpr size_t kStackBytes = 1 << 17;
inline std::deque<Fiber> fibers;  // as many as the largest block had
inline size_t current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mutex one_launch;

inline void wait(Waits what) {
  Fiber& fiber = fibers[current];
  fiber.waits = what;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

inline void run_threads() {
  for (;;) {
    body();
    wait(Waits::done);
  }
}

inline void resume(size_t i) {
  Fiber& fiber = fibers[i];
  current = i;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void add_fiber() {
  fibers.emplace_back();
  Fiber& fiber = fibers.back();
  fiber.started = false;
  fiber.stack.resize(kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.start, run_threads, 0);
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; i++) {
    fibers[i].waits = Waits::no;
    fibers[i].index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  for (;;) {
    for (size_t i = 0; i < threads; i++)
      if (fibers[i].waits == Waits::no) resume(i);
    // Now all wait or are done: those that are all there may go on.
    auto release = [&](size_t from, size_t to, Waits what) {
      bool waiting = false;
      for (size_t i = from; i < to; i++) {
        if (fibers[i].waits != what && fibers[i].waits != Waits::done) return false;
        waiting = waiting || fibers[i].waits == what;
      }
      for (size_t i = from; i < to; i++)
        if (fibers[i].waits == what) fibers[i].waits = Waits::no;
      return waiting;
    };
    bool released = false, left = false;
    for (size_t i = 0; i < threads; i++) left = left || fibers[i].waits != Waits::done;
    if (!left) return;
    for (size_t i = 0; i < threads; i += 32)
      released = release(i, i + 32 < threads ? i + 32 : threads, Waits::for_warp) || released;
    if (!released && !release(0, threads, Waits::for_block)) {
      fprintf(stderr, "emulation: threads of a block wait for each other for ever\n");
      abort();
    }
  }
}

// A kernel's mangled name, grid, block, and its arguments as a GPU gets them: one after the other, each aligned.
using Recorder = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, const void* arguments,
                          size_t bytes);
inline Recorder recorder = nullptr;

template <typename P>
void append(std::vector<unsigned char>& buffer, const P& argument) {
  const size_t at = (buffer.size() + alignof(P) - 1) / alignof(P) * alignof(P);
  buffer.resize(at + sizeof(P));
  memcpy(buffer.data() + at, &argument, sizeof(P));
}

template <typename... P>
void launch(dim3 grid, dim3 block, void (*kernel)(P...), P... arguments) {
  if (recorder != nullptr) {
    std::vector<unsigned char> buffer;
    (append<P>(buffer, arguments), ...);
    Dl_info symbol{};
    dladdr(reinterpret_cast<void*>(kernel), &symbol);
    const unsigned grid_sizes[] = {grid.x, grid.y, grid.z}, block_sizes[] = {block.x, block.y, block.z};
    return recorder(symbol.dli_sname ? symbol.dli_sname : "", grid_sizes, block_sizes, buffer.data(), buffer.size());
  }
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t threads = size_t(block.x) * block.y * block.z;
  while (fibers.size() < threads) add_fiber();
  body = [=] { kernel(arguments...); };
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
}

template <typename S>
S shuffle(S value, size_t from) {
  static_assert(sizeof(S) <= sizeof(Fiber::slot), "a slot is too small");
  memcpy(fibers[current].slot, &value, sizeof(S));
  wait(Waits::for_warp);
  memcpy(&value, fibers[from].slot, sizeof(S));
  wait(Waits::for_warp);
  return value;
}

}  // namespace emulation

extern "C" inline __attribute__((used)) void emulation_record(emulation::Recorder recorder) {
  emulation::recorder = recorder;
}

template <typename... P>
void start_kernel(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, P... arguments) {
  if (epigraf::driver::is_open()) return epigraf::driver::start(kernel, grid, block, stream, arguments...);
  emulation::launch(grid, block, kernel, arguments...);
}

inline void __syncthreads() { emulation::wait(emulation::Waits::for_block); }
template <typename S>
S __shfl_xor_sync(unsigned, S value, int mask) {
  return emulation::shuffle(value, emulation::current ^ static_cast<size_t>(mask));
}
template <typename S>
S __shfl_down_sync(unsigned, S value, int distance, int width = 32) {
  const size_t lane = emulation::current % static_cast<size_t>(width), step = static_cast<size_t>(distance);
  return emulation::shuffle(value, emulation::current + (lane + step < static_cast<size_t>(width) ? step : 0));
}
