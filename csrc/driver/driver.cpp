#include "driver.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace epigraf {
namespace driver {
namespace {

using Result = int;  // 0 is success
using Context = void*;
using Module = void*;
using Function = void*;

// What is called of the driver; names and arguments are those of its documentation.
struct Library {
  Result (*ctx_get_current)(Context*);
  Result (*ctx_set_current)(Context);
  Result (*device_get)(int*, int);
  Result (*device_primary_ctx_retain)(Context*, int);
  Result (*module_load_data)(Module*, const void*);
  Result (*module_get_function)(Function*, Module, const char*);
  Result (*launch_kernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                          void**);
  Result (*memset_async)(uint64_t, unsigned char, size_t, void*);
  Result (*get_error_string)(Result, const char**);
};

std::mutex lock;
Library library{};
bool opened = false;
Compiler compiler;
std::map<std::pair<Context, const void*>, Function> functions;  // stay as long as their contexts, which torch keeps

void check(Result result, const std::string& what) {
  if (result == 0) return;
  const char* words = nullptr;
  library.get_error_string(result, &words);
  throw std::runtime_error(what + ": " + (words ? words : "CUDA error " + std::to_string(result)));
}

template <typename F>
void find(void* handle, const char* path, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  if (!function) throw std::runtime_error(std::string(path) + " has no " + name + ": update the driver");
}

void open_locked(const char* path) {
  if (opened) return;
  void* handle = dlopen(path, RTLD_NOW);
  if (!handle) throw std::runtime_error(std::string("the GPU's driver cannot be opened: ") + dlerror());
  find(handle, path, "cuCtxGetCurrent", library.ctx_get_current);
  find(handle, path, "cuCtxSetCurrent", library.ctx_set_current);
  find(handle, path, "cuDeviceGet", library.device_get);
  find(handle, path, "cuDevicePrimaryCtxRetain", library.device_primary_ctx_retain);
  find(handle, path, "cuModuleLoadData", library.module_load_data);
  find(handle, path, "cuModuleGetFunction", library.module_get_function);
  find(handle, path, "cuLaunchKernel", library.launch_kernel);
  find(handle, path, "cuMemsetD8Async", library.memset_async);
  find(handle, path, "cuGetErrorString", library.get_error_string);
  opened = true;
}

// The mangled name, and that of C++ without the arguments: void f<(E)1>(A) -> f<(E)1>.
std::pair<std::string, std::string> names_of(const void* kernel) {
  Dl_info symbol{};
  if (!dladdr(kernel, &symbol) || !symbol.dli_sname) throw std::runtime_error("a kernel has no name in the extension");
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, &status);
  std::string name = readable ? readable : symbol.dli_sname;
  free(readable);
  if (name.rfind("void ", 0) == 0) name = name.substr(5);
  return {symbol.dli_sname, name.substr(0, name.rfind('('))};
}

// Compiled once for all threads: it takes seconds.
Function function_of(const void* kernel) {
  Context context = nullptr;
  check(library.ctx_get_current(&context), "the current GPU");
  const auto found = functions.find({context, kernel});
  if (found != functions.end()) return found->second;
  const auto [symbol, name] = names_of(kernel);
  if (!compiler) throw std::runtime_error(name + ": nobody compiles it");
  const std::string code = compiler(name);
  Module module = nullptr;
  Function function = nullptr;
  check(library.module_load_data(&module, code.data()), name + ": its code does not load");
  check(library.module_get_function(&function, module, symbol.c_str()), name + ": its code has another kernel");
  return functions[{context, kernel}] = function;
}

}  // namespace

void set_compiler(Compiler given) {
  const std::lock_guard<std::mutex> guard(lock);
  compiler = std::move(given);
}

void open(const char* path) {
  const std::lock_guard<std::mutex> guard(lock);
  open_locked(path);
}

bool is_open() { return opened; }

void use_device(int index) {
  open();
  Context context = nullptr;
  check(library.ctx_get_current(&context), "the current GPU");
  if (context != nullptr) return;
  int device = 0;
  check(library.device_get(&device, index), "GPU " + std::to_string(index));
  check(library.device_primary_ctx_retain(&context, device), "the context of GPU " + std::to_string(index));
  check(library.ctx_set_current(context), "the context of GPU " + std::to_string(index));
}

void launch(const void* kernel, dim3 grid, dim3 block, cudaStream_t stream, void** arguments) {
  Function function = nullptr;
  {
    const std::lock_guard<std::mutex> guard(lock);
    open_locked("libcuda.so.1");
    function = function_of(kernel);
  }
  const int result = library.launch_kernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, 0, stream,
                                           arguments, nullptr);
  if (result != 0) check(result, names_of(kernel).second + ": the launch failed");
}

void fill(void* memory, unsigned char value, size_t bytes, cudaStream_t stream) {
  open();
  check(library.memset_async(reinterpret_cast<uint64_t>(memory), value, bytes, stream), "filling memory");
}

}  // namespace driver
}  // namespace epigraf
