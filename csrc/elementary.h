// exp, expm1, log1p and tanh. On the CPU those of floats are branch-free, so that loops over them become vectors; they
// err by a few units of the last place.
#pragma once

#include "common.h"

namespace epigraf {
namespace EPIGRAF_ISA {

EPIGRAF_HD double exp_of(double x) { return exp(x); }
EPIGRAF_HD double expm1_of(double x) { return expm1(x); }
EPIGRAF_HD double log1p_of(double x) { return log1p(x); }
EPIGRAF_HD double tanh_of(double x) { return tanh(x); }

#if defined(__CUDACC__) || defined(EPIGRAF_EMULATED)

EPIGRAF_HD float exp_of(float x) { return expf(x); }
EPIGRAF_HD float expm1_of(float x) { return expm1f(x); }
EPIGRAF_HD float log1p_of(float x) { return log1pf(x); }
EPIGRAF_HD float tanh_of(float x) { return tanhf(x); }

#else

// e^x = 2^n e^r = 2 half_power (1 + tail), |r| <= ln(2) / 2; half of it stays finite where e^x just does.
struct ExpParts {
  float half_power, tail;
};

EPIGRAF_HD ExpParts exp_parts(float x) {
  const float bounded = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
  const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (bounded * 1.44269504f + whole) - whole;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.0f / 40320;
  p = p * r + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return ExpParts{bits_float(static_cast<unsigned>(static_cast<int>(n) + 126) << 23), (p * r) * r + r};
}

// 0 below -87, where a float still has a few digits.
EPIGRAF_HD float exp_of(float x) {
  const ExpParts e = exp_parts(x);
  const float y = 2.0f * (e.half_power * e.tail + e.half_power);
  return x != x ? x : x < -87.0f ? 0.0f : x > 89.0f ? HUGE_VALF : y;
}

EPIGRAF_HD float expm1_of(float x) {
  const ExpParts e = exp_parts(x);
  const float y = 2.0f * (e.half_power * e.tail + (e.half_power - 0.5f));
  return x != x ? x : x < -87.0f ? -1.0f : x > 89.0f ? HUGE_VALF : y;
}

// Of 0 <= x <= 1: 2 atanh(x / (2 + x)).
EPIGRAF_HD float log1p_of(float x) {
  const float z = x / (2.0f + x), s = z * z;
  float p = 1.0f / 17;
  p = p * s + 1.0f / 15;
  p = p * s + 1.0f / 13;
  p = p * s + 1.0f / 11;
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  return 2.0f * z * (p * s) + 2.0f * z;
}

EPIGRAF_HD float tanh_of(float x) {
  const float t = expm1_of(x < 0.0f ? x + x : -(x + x)), y = -t / (t + 2.0f);
  return x < 0.0f ? -y : y;
}

#endif

}  // namespace EPIGRAF_ISA
}  // namespace epigraf
