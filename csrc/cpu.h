// The host's side of common.h: rows of storage types, scratch memory, threads. Included by X.cpp files only.
#pragma once

#include "common.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(EPIGRAF_STD_THREADS)
#include <thread>
#include <vector>
#endif

namespace epigraf {
namespace EPIGRAF_ISA {

// f(chunk) for every chunk. Who computes a chunk may vary, what it computes may not: results are the same for every
// number of threads. (The thread sanitizer knows std::thread, and does not know OpenMP's runtime.)
template <typename F>
inline void parallel(i64 chunks, int threads, const F& f) {
#if defined(EPIGRAF_STD_THREADS)
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; t++)
    pool.emplace_back([&, t] {
      for (i64 chunk = t; chunk < chunks; chunk += threads) f(chunk);
    });
  for (auto& thread : pool) thread.join();
#else
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
#endif
  for (i64 chunk = 0; chunk < chunks; chunk++) f(chunk);
#endif
  (void)threads;
}

// Scratch memory, uninitialized, aligned to 64 bytes. Not std::vector, whose code the linker could take from the file
// that was compiled for a newer processor.
template <typename S>
class Scratch {
 public:
  explicit Scratch(i64 count = 0) : data_(nullptr) { allocate(count); }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void allocate(i64 count) {
    if (count > 0 && posix_memalign(reinterpret_cast<void**>(&data_), 64, static_cast<size_t>(count) * sizeof(S)))
      throw std::bad_alloc();
  }
  S* get() const { return data_; }
  S& operator[](i64 i) const { return data_[i]; }

 private:
  S* data_;
};

// Rows of n numbers from storage to the type that is computed with, and back.
template <typename T>
inline void load_row(const T* __restrict src, Compute<T>* __restrict dst, i64 n) {
  for (i64 i = 0; i < n; i++) dst[i] = Storage<T>::load(src[i]);
}
template <typename T>
inline void store_row(const Compute<T>* __restrict src, T* __restrict dst, i64 n) {
  for (i64 i = 0; i < n; i++) dst[i] = Storage<T>::store(src[i]);
}
#if defined(__F16C__)
template <>
inline void load_row<Half>(const Half* __restrict src, float* __restrict dst, i64 n) {
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; i++) dst[i] = half_to_float(src[i]);
}
template <>
inline void store_row<Half>(const float* __restrict src, Half* __restrict dst, i64 n) {
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; i++) dst[i] = float_to_half(src[i]);
}
#endif

// Elements first .. first+n of a tensor in the type that is computed with: where they lie, or converted into `buffer`.
// What is computed then is compiled for S alone, and not for every storage type.
template <typename S>
inline const S* read_row(DType dtype, const void* tensor, i64 first, i64 n, S* buffer) {
  if constexpr (sizeof(S) == 4) {
    if (dtype == DType::f16) load_row<Half>(static_cast<const Half*>(tensor) + first, buffer, n);
    if (dtype == DType::bf16) load_row<BFloat16>(static_cast<const BFloat16*>(tensor) + first, buffer, n);
    if (dtype != DType::f32) return buffer;
  }
  return static_cast<const S*>(tensor) + first;
}

// Where to compute elements first .. of a tensor, which may be absent; `write_row` then stores what lies in `buffer`.
template <typename S>
inline S* row_place(DType dtype, void* tensor, i64 first, S* buffer) {
  return tensor && size_of(dtype) == sizeof(S) ? static_cast<S*>(tensor) + first : buffer;
}
template <typename S>
inline void write_row(DType dtype, void* tensor, i64 first, i64 n, const S* row) {
  if constexpr (sizeof(S) == 4) {
    if (tensor && dtype == DType::f16) store_row<Half>(row, static_cast<Half*>(tensor) + first, n);
    if (tensor && dtype == DType::bf16) store_row<BFloat16>(row, static_cast<BFloat16*>(tensor) + first, n);
  }
}

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
