// Low-rank adapters for one instruction set, included once per set with AT and W (see vectors.h), TOKENS and COLS.
// Matrices of bfloat16 are widened as they are read: their products with float32 are exact. B of float is rows, of bfloat16
// panels of pairs (see lora.h).

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
AT void dots(const float* const* x, const E* a, int64_t inputs, float* h, int64_t stride) {
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
      h[t * stride + r] = total;
    }
  }
}

template <int N, typename E>
AT void shrink_rows(const float* const* x, const E* a, int ranks, int64_t inputs, float* h, int64_t stride) {
  int r = 0;
  for (; r + RANKS <= ranks; r += RANKS) dots<N, RANKS>(x, a + r * inputs, inputs, h + r, stride);
  for (; r < ranks; ++r) dots<N, 1>(x, a + r * inputs, inputs, h + r, stride);
}

// M vectors of columns of a B of floats.
template <int N, int M>
AT void add(const float* h, int64_t stride, const float* b, int ranks, int64_t outputs, int64_t at, float* const* y) {
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

template <int N>
AT void expand_rows(const float* h, int64_t stride, const float* b, int ranks, int64_t outputs, int64_t begin, int64_t end,
                    float* const* y) {
  b += begin;
  const int64_t columns = end - begin;
  int64_t at = 0;
  for (; at + COLS * W <= columns; at += COLS * W) add<N, COLS>(h, stride, b, ranks, outputs, at, y);
  for (; at + W <= columns; at += W) add<N, 1>(h, stride, b, ranks, outputs, at, y);
  for (; at < columns; ++at) {
    for (int t = 0; t < N; ++t) {
      float total = y[t][at];
      for (int r = 0; r < ranks; ++r) total += h[t * stride + r] * b[r * outputs + at];
      y[t][at] = total;
    }
  }
}

// A vector of pairs as its lower and its upper numbers.
INLINE vf lower(vu pairs) { return (vf)(pairs << 16); }
INLINE vf upper(vu pairs) { return (vf)(pairs & 0xffff0000u); }

template <int N>
AT void expand_rows(const float* h, int64_t stride, const Bits* b, int ranks, int64_t, int64_t begin, int64_t end,
                    float* const* y) {
  const int half = (ranks + 1) / 2;
  for (int64_t column = begin, next; column < end; column = next) {
    const int64_t first = column / kPanel * kPanel;
    const Bits* panel = b + first * 2 * half;
    next = first + kPanel < end ? first + kPanel : end;
    for (int64_t at = column; at < next;) {
      const bool whole = at + W <= next;
      for (int t = 0; t < N; ++t) {
        float* to = y[t] + at - begin;
        if (!whole) {
          for (int r = 0; r < ranks; ++r) *to += h[t * stride + r] * one(panel + ((r / 2) * kPanel + at - first) * 2 + r % 2);
          continue;
        }
        vf sum = load(to);
        for (int r = 0; r < ranks; r += 2) {
          const Bits* pairs = panel + ((r / 2) * kPanel + at - first) * 2;
          const vu both = load(reinterpret_cast<const uint32_t*>(pairs));
          sum = fma(splat(h[t * stride + r]), lower(both), sum);
          if (r + 1 < ranks) sum = fma(splat(h[t * stride + r + 1]), upper(both), sum);
        }
        store(to, sum);
      }
      at += whole ? W : 1;
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
               void* hidden, int64_t stride) {
  const Scaled in = scaled(x, count, gain, eps, inputs);
  const E* rows = static_cast<const E*>(a);
  float* h = static_cast<float*>(hidden);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS) shrink_rows<TOKENS>(in.x + t, rows, ranks, inputs, h + t * stride, stride);
  for (; t < count; ++t) shrink_rows<1>(in.x + t, rows, ranks, inputs, h + t * stride, stride);
  if (gain == nullptr) return;
  for (t = 0; t < count; ++t) {
    for (int r = 0; r < ranks; ++r) h[t * stride + r] *= in.norm[t];
  }
}

template <typename E>
AT void expand(const void* hidden, int64_t stride, int count, const void* b, int ranks, int64_t outputs, int64_t begin,
               int64_t end, float* const* y) {
  const float* h = static_cast<const float*>(hidden);
  const E* matrix = static_cast<const E*>(b);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS)
    expand_rows<TOKENS>(h + t * stride, stride, matrix, ranks, outputs, begin, end, y + t);
  for (; t < count; ++t) expand_rows<1>(h + t * stride, stride, matrix, ranks, outputs, begin, end, y + t);
}

template <typename E>
Kernels kernels() {
  return {sizeof(float), shrink<E>, expand<E>};
}

#undef INLINE

}  // namespace
}  // namespace jaxserve::lora
