// What every op shares: storage types and their arithmetic, 64-bit offsets, and loops over threads.
//
// Device code compiles with nvcc and with NVRTC alone: outside of the host's section nothing is included.
// A .cpp file is compiled once for each instruction set; EPIGRAF_ISA names the namespace, so that the linker cannot take
// a function of one set for another.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#endif

#if defined(__CUDACC__)
#define EPIGRAF_HD __host__ __device__ __forceinline__
#else
#define EPIGRAF_HD inline __attribute__((always_inline))
#endif

#if !defined(EPIGRAF_ISA)
#define EPIGRAF_ISA device
#endif

namespace epigraf {

using i64 = long long;

// The codes that Python passes.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

#if !defined(__CUDACC_RTC__)
inline i64 size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
#endif

namespace EPIGRAF_ISA {

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

EPIGRAF_HD unsigned float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
#endif
}

EPIGRAF_HD float bits_float(unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}

// IEEE binary16, rounded to nearest, ties to even; subnormal numbers, infinities and NaN included.
EPIGRAF_HD Half float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#else
  const unsigned bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    out = 0x7c00u;  // 65536 and above
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the last bits, rounded by the hardware.
    out = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<unsigned short>(out | sign)};
#endif
}

EPIGRAF_HD float half_to_float(Half h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  const unsigned sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 puts the exponent right, for subnormal numbers too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 5.192296858534828e33f));
#endif
}

EPIGRAF_HD BFloat16 float_to_bfloat16(float x) {
  const unsigned bits = float_bits(x);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<unsigned short>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

EPIGRAF_HD float bfloat16_to_float(BFloat16 b) { return bits_float(static_cast<unsigned>(b.bits) << 16); }

// Storage type -> the type that is computed with, and the way there and back.
template <typename T>
struct Storage;
template <>
struct Storage<float> {
  using Compute = float;
  static EPIGRAF_HD float load(float x) { return x; }
  static EPIGRAF_HD float store(float x) { return x; }
};
template <>
struct Storage<double> {
  using Compute = double;
  static EPIGRAF_HD double load(double x) { return x; }
  static EPIGRAF_HD double store(double x) { return x; }
};
template <>
struct Storage<Half> {
  using Compute = float;
  static EPIGRAF_HD float load(Half x) { return half_to_float(x); }
  static EPIGRAF_HD Half store(float x) { return float_to_half(x); }
};
template <>
struct Storage<BFloat16> {
  using Compute = float;
  static EPIGRAF_HD float load(BFloat16 x) { return bfloat16_to_float(x); }
  static EPIGRAF_HD BFloat16 store(float x) { return float_to_bfloat16(x); }
};
template <typename T>
using Compute = typename Storage<T>::Compute;

template <typename S>
EPIGRAF_HD S minimum(S a, S b) {
  return a < b ? a : b;
}
template <typename S>
EPIGRAF_HD S maximum(S a, S b) {
  return a > b ? a : b;
}
// Of two numbers that may be NaN, which then is the larger one.
template <typename S>
EPIGRAF_HD S maximum_or_nan(S a, S b) {
  return b > a || b != b ? b : a;
}
// y limited to [-clamp, clamp]; NaN stays NaN.
template <typename S>
EPIGRAF_HD S clamped(S y, S clamp) {
  return y > clamp ? clamp : y < -clamp ? -clamp : y;
}
// Whether a clamp stops the gradient to y: where y is not inside, as NaN never is, but not yet at the bound itself. An
// infinite clamp stands for none, and stops nothing.
template <typename S>
EPIGRAF_HD bool is_clipped(S y, S clamp) {
  // One condition of y, and no `&` with one that all elements share: vectors then select by one mask, not by a dozen.
  const S probe = clamp - clamp == S(0) ? y : S(0);
  return !((probe <= clamp) & (probe >= -clamp));
}
EPIGRAF_HD i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }  // of a >= 0

// Offsets of element (c, y, x) of an image [C, H, W].
EPIGRAF_HD i64 contiguous_offset(i64 c, i64 y, i64 x, i64 height, i64 width) { return (c * height + y) * width + x; }
EPIGRAF_HD i64 channels_last_offset(i64 c, i64 y, i64 x, i64 width, i64 channels) {
  return (y * width + x) * channels + c;
}

}  // namespace EPIGRAF_ISA

#if !defined(__CUDACC_RTC__)

// Calls f with a value of the storage type of a dtype.
#define EPIGRAF_BY_DTYPE(dtype, T, ...)     \
  switch (dtype) {                          \
    case ::epigraf::DType::f32: {           \
      using T = float;                      \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case ::epigraf::DType::f16: {           \
      using T = ::epigraf::EPIGRAF_ISA::Half; \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case ::epigraf::DType::bf16: {          \
      using T = ::epigraf::EPIGRAF_ISA::BFloat16; \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case ::epigraf::DType::f64: {           \
      using T = double;                     \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
  }

#endif

}  // namespace epigraf
