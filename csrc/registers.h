// The numbers of one vector register of the CPU. Included by X.cpp files only.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace epigraf {
namespace EPIGRAF_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#if defined(__AVX2__)
// What the processor has instructions for: numbers first .. end of a register, and stores past the caches.
template <typename S>
struct Whole;

#if defined(__AVX512F__)
inline unsigned mask_of(i64 first, i64 end) { return (1u << end) - (1u << first); }

template <>
struct Whole<float> {
  static EPIGRAF_HD __m512 load(const float* p, i64 first, i64 end) {
    return _mm512_maskz_loadu_ps(mask_of(first, end), p);
  }
  static EPIGRAF_HD void store(float* p, i64 count, __m512 v) { _mm512_mask_storeu_ps(p, mask_of(0, count), v); }
  static EPIGRAF_HD void stream(float* p, __m512 v) { _mm512_stream_ps(p, v); }
};

template <>
struct Whole<double> {
  static EPIGRAF_HD __m512d load(const double* p, i64 first, i64 end) {
    return _mm512_maskz_loadu_pd(mask_of(first, end), p);
  }
  static EPIGRAF_HD void store(double* p, i64 count, __m512d v) { _mm512_mask_storeu_pd(p, mask_of(0, count), v); }
  static EPIGRAF_HD void stream(double* p, __m512d v) { _mm512_stream_pd(p, v); }
};
#else
template <>
struct Whole<float> {
  static EPIGRAF_HD __m256i mask(i64 first, i64 end) {
    const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(first)), i),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(end)), i));
  }
  static EPIGRAF_HD __m256 load(const float* p, i64 first, i64 end) { return _mm256_maskload_ps(p, mask(first, end)); }
  static EPIGRAF_HD void store(float* p, i64 count, __m256 v) { _mm256_maskstore_ps(p, mask(0, count), v); }
  static EPIGRAF_HD void stream(float* p, __m256 v) { _mm256_stream_ps(p, v); }
};

template <>
struct Whole<double> {
  static EPIGRAF_HD __m256i mask(i64 first, i64 end) {
    const __m256i i = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(first), i),
                               _mm256_cmpgt_epi64(_mm256_set1_epi64x(end), i));
  }
  static EPIGRAF_HD __m256d load(const double* p, i64 first, i64 end) {
    return _mm256_maskload_pd(p, mask(first, end));
  }
  static EPIGRAF_HD void store(double* p, i64 count, __m256d v) { _mm256_maskstore_pd(p, mask(0, count), v); }
  static EPIGRAF_HD void stream(double* p, __m256d v) { _mm256_stream_pd(p, v); }
};
#endif
#endif

// N numbers, N a power of two. Addresses need not be aligned.
template <typename S, int N = kRegisterBytes / static_cast<int>(sizeof(S))>
struct Register {
  static constexpr int kSize = N;
  typedef S V __attribute__((vector_size(N * sizeof(S))));
  V v;

  static EPIGRAF_HD Register of(S x) { return Register{x - V{}}; }

  static EPIGRAF_HD Register load(const S* p) {
    Register r;
    memcpy(&r.v, p, sizeof(V));
    return r;
  }

  // Numbers first .. end of those at p; 0 for the others, which are not read.
  static EPIGRAF_HD Register load(const S* p, i64 first, i64 end) {
    if (first <= 0 && end >= N) return load(p);
    return first < end && first < N && end > 0 ? load_some(p, maximum<i64>(first, 0), minimum<i64>(end, N)) : of(0);
  }

  EPIGRAF_HD void store(S* p) const { memcpy(p, &v, sizeof(V)); }

  // The first `count` numbers, or all; these past the caches if the processor can: p is aligned to the register then.
  EPIGRAF_HD void store(S* p, i64 count, bool past_caches) const {
    if (count <= 0) return;
    if (count < N)
      store_some(p, count);
    else if (past_caches)
      store_past_caches(p);
    else
      store(p);
  }

  friend EPIGRAF_HD Register operator+(Register a, Register b) { return Register{a.v + b.v}; }
  friend EPIGRAF_HD Register operator*(Register a, Register b) { return Register{a.v * b.v}; }
  friend EPIGRAF_HD Register operator*(S a, Register b) { return Register{a * b.v}; }
  friend EPIGRAF_HD Register operator/(Register a, S b) { return Register{a.v / b}; }
  EPIGRAF_HD void operator+=(Register b) { v += b.v; }

 private:
  static EPIGRAF_HD Register load_some(const S* p, i64 first, i64 end) {
#if defined(__AVX2__)
    if constexpr (kWhole) return Register{Whole<S>::load(p, first, end)};
#endif
    S some[N] = {};
    for (i64 i = first; i < end; i++) some[i] = p[i];
    return load(some);
  }

  EPIGRAF_HD void store_some(S* p, i64 count) const {
#if defined(__AVX2__)
    if constexpr (kWhole) return Whole<S>::store(p, count, v);
#endif
    for (i64 i = 0; i < count; i++) p[i] = v[i];
  }

  EPIGRAF_HD void store_past_caches(S* p) const {
#if defined(__AVX2__)
    if constexpr (kWhole) return Whole<S>::stream(p, v);
#endif
    store(p);
  }

  static constexpr bool kWhole = N * sizeof(S) == kRegisterBytes;
};

// Other threads see what went past the caches.
inline void end_of_stores_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Numbers I... of the 2 N that a and b hold.
template <typename S, int N, int... I>
EPIGRAF_HD Register<S, N> pick(Register<S, N> a, Register<S, N> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return {__builtin_shufflevector(a.v, b.v, I...)};
#else
  using Index = std::conditional_t<sizeof(S) == 4, int, i64>;
  typedef Index Indices __attribute__((vector_size(N * sizeof(S))));
  return {__builtin_shuffle(a.v, b.v, Indices{I...})};
#endif
}

template <int FIRST, int STRIDE, int... I>
constexpr std::integer_sequence<int, FIRST + STRIDE * I...> strided(std::integer_sequence<int, I...>) {
  return {};
}

template <int N, int FIRST, int... I>
constexpr std::integer_sequence<int, (FIRST + I / 2 + I % 2 * N)...> alternating(std::integer_sequence<int, I...>) {
  return {};
}

// Numbers FIRST, FIRST + STRIDE, ... of those that a and b hold.
template <int FIRST, int STRIDE, typename S, int N>
EPIGRAF_HD Register<S, N> every(Register<S, N> a, Register<S, N> b) {
  return pick(a, b, strided<FIRST, STRIDE>(std::make_integer_sequence<int, N>()));
}

// a[FIRST], b[FIRST], a[FIRST + 1], b[FIRST + 1], ...
template <int FIRST, typename S, int N>
EPIGRAF_HD Register<S, N> alternate(Register<S, N> a, Register<S, N> b) {
  return pick(a, b, alternating<N, FIRST>(std::make_integer_sequence<int, N>()));
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
