// Low-rank adapters for one instruction set, included once per set with AT and W (see vectors.h), TOKENS and COLS.
// Matrices of bfloat16 are widened as they are read: their products with float32 are exact.

#include "lora.h"

namespace jaxserve::lora {
namespace {

#include "vectors.h"

constexpr int RANKS = 4;  // rows of A at once

INLINE float one(const float* p) { return *p; }
INLINE float one(const Bits* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

INLINE vf load(const Bits* p) {
#if W == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif W == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  return vf{one(p), one(p + 1), one(p + 2), one(p + 3)};
#endif
}

template <int N, int M, typename E>
AT void dots(const float* const* x, const E* a, int64_t inputs, float* h, int ranks) {
  vf sum[N][M];
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int r = 0; r < M; ++r) sum[t][r] = splat(0.0f);
  }
  int64_t i = 0;
  for (; i + W <= inputs; i += W) {
    vf in[N];
    UNROLL for (int t = 0; t < N; ++t) in[t] = load(x[t] + i);
    UNROLL for (int r = 0; r < M; ++r) {
      const vf row = load(a + r * inputs + i);
      UNROLL for (int t = 0; t < N; ++t) sum[t][r] = fma(in[t], row, sum[t][r]);
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int r = 0; r < M; ++r) {
      float total = sum_lanes(sum[t][r]);
      for (int64_t j = i; j < inputs; ++j) total += x[t][j] * one(a + r * inputs + j);
      h[t * ranks + r] = total;
    }
  }
}

template <int N, typename E>
AT void shrink_rows(const float* const* x, const E* a, int ranks, int64_t inputs, float* h) {
  int r = 0;
  for (; r + RANKS <= ranks; r += RANKS) dots<N, RANKS>(x, a + r * inputs, inputs, h + r, ranks);
  for (; r < ranks; ++r) dots<N, 1>(x, a + r * inputs, inputs, h + r, ranks);
}

template <int N, int M, typename E>
AT void add(const float* h, int64_t stride, const E* b, int ranks, int64_t outputs, int64_t at, float* const* y) {
  vf sum[N][M];
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) sum[t][j] = load(y[t] + at + j * W);
  }
  for (int r = 0; r < ranks; ++r) {
    vf row[M];
    UNROLL for (int j = 0; j < M; ++j) row[j] = load(b + r * outputs + at + j * W);
    UNROLL for (int t = 0; t < N; ++t) {
      const vf by = splat(h[t * stride + r]);
      UNROLL for (int j = 0; j < M; ++j) sum[t][j] = fma(by, row[j], sum[t][j]);
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) store(y[t] + at + j * W, sum[t][j]);
  }
}

template <int N, typename E>
AT void expand_rows(const float* h, int64_t stride, const E* b, int ranks, int64_t outputs, int64_t columns,
                    float* const* y) {
  int64_t at = 0;
  for (; at + COLS * W <= columns; at += COLS * W) add<N, COLS>(h, stride, b, ranks, outputs, at, y);
  for (; at + W <= columns; at += W) add<N, 1>(h, stride, b, ranks, outputs, at, y);
  for (; at < columns; ++at) {
    for (int t = 0; t < N; ++t) {
      float total = y[t][at];
      for (int r = 0; r < ranks; ++r) total += h[t * stride + r] * one(b + r * outputs + at);
      y[t][at] = total;
    }
  }
}

// x * gain of some rows, and each one's norm; of none x itself and 1.
struct Scaled {
  const float* x[kBlock];
  float norm[kBlock];
};

AT Scaled scaled(const float* const* x, int count, const float* gain, float eps, int64_t inputs) {
  Scaled out;
  float* copy = gain == nullptr ? nullptr : static_cast<float*>(scratch(7, count * inputs * sizeof(float)));
  for (int t = 0; t < count; ++t) {
    out.x[t] = x[t];
    out.norm[t] = 1.0f;
    if (gain == nullptr) continue;
    float* to = copy + t * inputs;
    vf squares = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= inputs; i += W) {
      const vf in = load(x[t] + i);
      squares = fma(in, in, squares);
      store(to + i, in * load(gain + i));
    }
    float total = sum_lanes(squares);
    for (; i < inputs; ++i) {
      total += x[t][i] * x[t][i];
      to[i] = x[t][i] * gain[i];
    }
    out.x[t] = to;
    out.norm[t] = 1.0f / __builtin_sqrtf(total / static_cast<float>(inputs) + eps);
  }
  return out;
}

template <typename E>
AT void shrink(const float* const* x, int count, const float* gain, float eps, const void* a, int ranks, int64_t inputs,
               void* hidden) {
  const Scaled in = scaled(x, count, gain, eps, inputs);
  const E* rows = static_cast<const E*>(a);
  float* h = static_cast<float*>(hidden);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS) shrink_rows<TOKENS>(in.x + t, rows, ranks, inputs, h + t * ranks);
  for (; t < count; ++t) shrink_rows<1>(in.x + t, rows, ranks, inputs, h + t * ranks);
  if (gain == nullptr) return;
  for (t = 0; t < count; ++t) {
    for (int r = 0; r < ranks; ++r) h[t * ranks + r] *= in.norm[t];
  }
}

template <typename E>
AT void expand(const void* hidden, int64_t stride, int count, const void* b, int ranks, int64_t outputs, int64_t begin,
               int64_t end, float* const* y) {
  const float* h = static_cast<const float*>(hidden);
  const E* rows = static_cast<const E*>(b) + begin;
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS)
    expand_rows<TOKENS>(h + t * stride, stride, rows, ranks, outputs, end - begin, y + t);
  for (; t < count; ++t) expand_rows<1>(h + t * stride, stride, rows, ranks, outputs, end - begin, y + t);
}

template <typename E>
Kernels kernels() {
  return {sizeof(float), shrink<E>, expand<E>};
}

#undef INLINE

}  // namespace
}  // namespace jaxserve::lora
