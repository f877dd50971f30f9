// Products of a few rows with a matrix stored [out, in], for one instruction set. Included once per set, by grouped_dot.cc,
// with
//   ISA        the namespace,
//   AT         the function attribute that enables the set,
//   W          floats a vector,
//   ROWS, OUTS rows and outputs of the accumulator block that fits its registers.

namespace ISA {

#include "vectors.h"

INLINE vf load_weights(const float* p) { return load(p); }
// bfloat16: the upper half of the float of the same value.
INLINE vf load_weights(const uint16_t* p) {
#if W == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif W == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  vu bits;
  for (int i = 0; i < W; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  return (vf)bits;
#endif
}

INLINE float weight_at(const float* p) { return *p; }
INLINE float weight_at(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// y[r][o] = x[r] . w[o] over `inputs`
template <typename T, int R, int N>
INLINE void tile(const float* x, const T* w, int64_t inputs, float* y, int64_t stride) {
  vf acc[R][N] = {};
  int64_t i = 0;
  for (; i + W <= inputs; i += W) {
    vf b[N];
    UNROLL for (int o = 0; o < N; ++o) b[o] = load_weights(w + o * inputs + i);
    UNROLL for (int r = 0; r < R; ++r) {
      const vf a = load(x + r * inputs + i);
      UNROLL for (int o = 0; o < N; ++o) acc[r][o] = fma(a, b[o], acc[r][o]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < N; ++o) {
      float total = sum_lanes(acc[r][o]);
      for (int64_t j = i; j < inputs; ++j) total += x[r * inputs + j] * weight_at(w + o * inputs + j);
      y[r * stride + o] = total;
    }
  }
}

template <typename T, int N>
INLINE void tiles_of_rows(const float* x, int64_t rows, const T* w, int64_t inputs, float* y, int64_t stride) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) tile<T, ROWS, N>(x + r * inputs, w, inputs, y + r * stride, stride);
  for (; r < rows; ++r) tile<T, 1, N>(x + r * inputs, w, inputs, y + r * stride, stride);
}

// y[rows][outputs] = x[rows][inputs] w[outputs][inputs]^T: the weights come from memory once, the rows from the cache.
template <typename T>
AT void dot(const float* x, int64_t rows, const T* w, int64_t outputs, int64_t inputs, float* y, int64_t stride) {
  int64_t o = 0;
  for (; o + OUTS <= outputs; o += OUTS) tiles_of_rows<T, OUTS>(x, rows, w + o * inputs, inputs, y + o, stride);
  for (; o < outputs; ++o) tiles_of_rows<T, 1>(x, rows, w + o * inputs, inputs, y + o, stride);
}

#undef INLINE

}  // namespace ISA
