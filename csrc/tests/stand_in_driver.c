// A stand-in for the GPU's driver (libcuda.so.1), for tests: what csrc/driver/ calls, without a GPU.
//
// Loaded code is what was given; a function is its name; launches and fills go to whoever has set a recorder, which gives the
// driver's answer: 0, or the number of an error.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*Recorder)(const char* kernel, const unsigned* sizes, void** arguments);

static Recorder recorder;
static intptr_t context;
static int loads;

void stand_in_record(Recorder given) { recorder = given; }
void stand_in_use_context(int number) { context = number; }
int stand_in_context(void) { return (int)context; }
int stand_in_loads(void) { return loads; }

int cuCtxGetCurrent(void** found) {
  *found = (void*)context;
  return 0;
}

int cuCtxSetCurrent(void* given) {
  context = (intptr_t)given;
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return index < 8 ? 0 : 101;
}

int cuDevicePrimaryCtxRetain(void** found, int device) {
  *found = (void*)(intptr_t)(100 + device);
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return 200;
  loads++;
  *module = (void*)image;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  *function = strdup(name);
  return 0;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  const unsigned sizes[] = {gx, gy, gz, bx, by, bz};
  (void)stream;
  if (shared != 0 || extra != NULL) return 1;
  return recorder(function, sizes, arguments);
}

int cuMemsetD8Async(uint64_t memory, unsigned char value, size_t bytes, void* stream) {
  (void)stream;
  memset((void*)memory, value, bytes);
  return 0;
}

int cuGetErrorString(int error, const char** words) {
  *words = error == 101 ? "invalid device ordinal" : error == 200 ? "device kernel image is invalid" : error == 1 ? "invalid argument" : NULL;
  return 0;
}
