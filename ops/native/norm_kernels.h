// A row's norm, for one instruction set. Included once per set, by norm.cc, with
//   ISA  the namespace,
//   AT   the function attribute that enables the set,
//   W    floats a vector.

namespace ISA {

#include "vectors.h"

// The sum of (x - mean)^2, or of x with `plain`: four sums a lane, then the lanes and what is behind the last whole vectors, always
// in this order.
AT static float sum_of(const float* x, int64_t n, float mean, bool plain) {
  vf parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int j = 0; j < 4; ++j) {
      const vf d = load(x + i + j * W) - splat(mean);
      parts[j] = plain ? parts[j] + d : fma(d, d, parts[j]);
    }
  }
  float rest = 0;
  for (; i < n; ++i) {
    const float d = x[i] - mean;
    rest += plain ? d : d * d;
  }
  return sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3])) + rest;
}

AT static void norm_row(const Norm& norm, const float* x, float* y) {
  const int64_t n = norm.width;
  const float mean = norm.centred ? sum_of(x, n, 0.0f, true) / static_cast<float>(n) : 0.0f;
  const float unit = 1.0f / std::sqrt(sum_of(x, n, mean, false) / static_cast<float>(n) + norm.eps);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf value = (load(x + i) - splat(mean)) * splat(unit);
    if (norm.scale != nullptr) value *= load(norm.scale + i);
    if (norm.bias != nullptr) value += load(norm.bias + i);
    store(y + i, value);
  }
  for (; i < n; ++i) {
    float value = (x[i] - mean) * unit;
    if (norm.scale != nullptr) value *= norm.scale[i];
    if (norm.bias != nullptr) value += norm.bias[i];
    y[i] = value;
  }
}

#undef INLINE
}  // namespace ISA
