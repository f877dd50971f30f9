// Low-rank adapters' kernels for CPUs that multiply pairs of bfloat16: matrices of bfloat16, twice the products a cycle.

#include "lora.h"

#if JAXSERVE_X86
#define AT TARGET_BF16
#define W 16

namespace jaxserve::lora {
namespace {

#include "vectors.h"

constexpr int TOKENS = 4;  // rows of x at once
constexpr int RANKS = 4;   // rows of A at once
constexpr int ROWS = 6;    // of y at once
constexpr int PAIRS = 2;   // pairs of vectors of B at once: 64 columns

INLINE __m512i load_bits(const Bits* p) { return _mm512_loadu_si512(p); }
INLINE vf dot(vf sum, __m512i a, __m512i b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }
INLINE __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// x, or x * gain, in bfloat16, zeros up to whole vectors of 32; what the norm multiplies it with.
AT float round_row(const float* x, const float* gain, float eps, int64_t inputs, Bits* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 32) {
    const __mmask32 there = first(inputs - i);
    const __mmask16 below = static_cast<__mmask16>(there), above = static_cast<__mmask16>(there >> 16);
    __m512 low = _mm512_maskz_loadu_ps(below, x + i), high = _mm512_maskz_loadu_ps(above, x + i + 16);
    if (gain != nullptr) {
      squares = _mm512_fmadd_ps(high, high, _mm512_fmadd_ps(low, low, squares));
      low = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(below, gain + i));
      high = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(above, gain + i + 16));
    }
    _mm512_storeu_si512(to + i, rounded(low, high));
  }
  if (gain == nullptr) return 1.0f;
  return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / static_cast<float>(inputs) + eps);
}

// The sums of 16 vectors, vector i's in lane i.
INLINE __m512 sums_of(const vf (&v)[16]) {
  __m512 quad[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    __m512 two[2];
    UNROLL for (int j = 0; j < 2; ++j) {
      const __m512 a = (__m512)v[4 * i + 2 * j], b = (__m512)v[4 * i + 2 * j + 1];
      two[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(two[0]), b = _mm512_castps_pd(two[1]);
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 half[2];
  UNROLL for (int i = 0; i < 2; ++i) {
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0x88),
                            _mm512_shuffle_f32x4(quad[2 * i], quad[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}

// h[t][r] of N rows of x and M of A. Whoever is among them, a row's sums are added up in the same order.
template <int N, int M>
AT void dots(const Bits* x, int64_t width, const Bits* a, int64_t inputs, float* h, int ranks) {
  vf sum[16];
  UNROLL for (int i = 0; i < 16; ++i) sum[i] = splat(0.0f);
  int64_t i = 0;
  for (; i + 32 <= inputs; i += 32) {
    __m512i in[N];
    UNROLL for (int t = 0; t < N; ++t) in[t] = load_bits(x + t * width + i);
    UNROLL for (int r = 0; r < M; ++r) {
      const __m512i row = load_bits(a + r * inputs + i);
      UNROLL for (int t = 0; t < N; ++t) sum[t * 4 + r] = dot(sum[t * 4 + r], in[t], row);
    }
  }
  if (i < inputs) {
    UNROLL for (int r = 0; r < M; ++r) {
      const __m512i row = _mm512_maskz_loadu_epi16(first(inputs - i), a + r * inputs + i);
      UNROLL for (int t = 0; t < N; ++t) sum[t * 4 + r] = dot(sum[t * 4 + r], load_bits(x + t * width + i), row);
    }
  }
  alignas(64) float found[16];
  _mm512_store_ps(found, sums_of(sum));
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int r = 0; r < M; ++r) h[t * ranks + r] = found[t * 4 + r];
  }
}

template <int N>
AT void shrink_rows(const Bits* x, int64_t width, const Bits* a, int ranks, int64_t inputs, float* h) {
  int r = 0;
  for (; r + RANKS <= ranks; r += RANKS) dots<N, RANKS>(x, width, a + r * inputs, inputs, h + r, ranks);
  for (; r < ranks; ++r) dots<N, 1>(x, width, a + r * inputs, inputs, h + r, ranks);
}

AT void shrink(const float* const* x, int count, const float* gain, float eps, const void* a, int ranks, int64_t inputs,
               void* hidden) {
  const int64_t width = ceil_div(inputs, 32) * 32;
  Bits* in = static_cast<Bits*>(scratch(7, count * width * sizeof(Bits) + count * ranks * sizeof(float)));
  float* h = reinterpret_cast<float*>(in + count * width);
  float norm[kBlock];
  for (int t = 0; t < count; ++t) norm[t] = round_row(x[t], gain, eps, inputs, in + t * width);
  const Bits* rows = static_cast<const Bits*>(a);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS)
    shrink_rows<TOKENS>(in + t * width, width, rows, ranks, inputs, h + t * ranks);
  switch (count - t) {
    case 3: shrink_rows<3>(in + t * width, width, rows, ranks, inputs, h + t * ranks); break;
    case 2: shrink_rows<2>(in + t * width, width, rows, ranks, inputs, h + t * ranks); break;
    case 1: shrink_rows<1>(in + t * width, width, rows, ranks, inputs, h + t * ranks); break;
    default: break;
  }
  Bits* to = static_cast<Bits*>(hidden);
  for (t = 0; t < count; ++t) {
    const __m512 by = _mm512_set1_ps(norm[t]);
    for (int r = 0; r < ranks; r += 32) {
      const __mmask32 there = first(ranks - r);
      const float* from = h + t * ranks + r;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
      _mm512_mask_storeu_epi16(to + t * ranks + r, there, rounded(_mm512_mul_ps(low, by), _mm512_mul_ps(high, by)));
    }
  }
}

// Columns [at, at + 32) of two rows of B as pairs: those of columns at.. in `low`, of at + 16.. in `high`.
INLINE void pair_up(__m512i even, __m512i odd, __m512i* low, __m512i* high) {
  const __m512i columns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(even, columns, odd);
  *high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(columns, _mm512_set1_epi16(16)), odd);
}

// Two neighbours of a row of h, or the last one and a zero.
INLINE __m512i both(const Bits* h, bool two) {
  uint32_t pair = *h;
  if (two) __builtin_memcpy(&pair, h, sizeof(pair));
  return _mm512_set1_epi32(static_cast<int>(pair));
}

template <int N, int M>
AT void add(const Bits* h, int64_t stride, const Bits* b, int ranks, int64_t outputs, int64_t at, int64_t columns,
            float* const* y) {
  vf sum[N][2 * M];
  __mmask32 there[M];
  UNROLL for (int j = 0; j < M; ++j) there[j] = first(columns - at - 32 * j);
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) {
      sum[t][2 * j] = (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>(there[j]), y[t] + at + 32 * j);
      sum[t][2 * j + 1] = (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>(there[j] >> 16), y[t] + at + 32 * j + 16);
    }
  }
  for (int r = 0; r < ranks; r += 2) {
    const bool two = r + 1 < ranks;
    const Bits* even = b + r * outputs + at;
    const Bits* odd = two ? even + outputs : even;  // times zero where it is not there
    __m512i low[M], high[M];
    UNROLL for (int j = 0; j < M; ++j) {
      pair_up(_mm512_maskz_loadu_epi16(there[j], even + 32 * j), _mm512_maskz_loadu_epi16(there[j], odd + 32 * j),
              &low[j], &high[j]);
    }
    UNROLL for (int t = 0; t < N; ++t) {
      const __m512i by = both(h + t * stride + r, two);
      UNROLL for (int j = 0; j < M; ++j) {
        sum[t][2 * j] = dot(sum[t][2 * j], by, low[j]);
        sum[t][2 * j + 1] = dot(sum[t][2 * j + 1], by, high[j]);
      }
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) {
      _mm512_mask_storeu_ps(y[t] + at + 32 * j, static_cast<__mmask16>(there[j]), (__m512)sum[t][2 * j]);
      _mm512_mask_storeu_ps(y[t] + at + 32 * j + 16, static_cast<__mmask16>(there[j] >> 16), (__m512)sum[t][2 * j + 1]);
    }
  }
}

template <int N>
AT void expand_rows(const Bits* h, int64_t stride, const Bits* b, int ranks, int64_t outputs, int64_t columns,
                    float* const* y) {
  int64_t at = 0;
  for (; at + 32 * PAIRS <= columns; at += 32 * PAIRS) add<N, PAIRS>(h, stride, b, ranks, outputs, at, columns, y);
  for (; at < columns; at += 32) add<N, 1>(h, stride, b, ranks, outputs, at, columns, y);
}

AT void expand(const void* hidden, int64_t stride, int count, const void* matrix, int ranks, int64_t outputs,
               int64_t begin, int64_t end, float* const* y) {
  const Bits* h = static_cast<const Bits*>(hidden);
  const Bits* b = static_cast<const Bits*>(matrix) + begin;
  const int64_t columns = end - begin;
  int t = 0;
  for (; t + ROWS <= count; t += ROWS) expand_rows<ROWS>(h + t * stride, stride, b, ranks, outputs, columns, y + t);
  for (; t + 2 <= count; t += 2) expand_rows<2>(h + t * stride, stride, b, ranks, outputs, columns, y + t);
  if (t < count) expand_rows<1>(h + t * stride, stride, b, ranks, outputs, columns, y + t);
}

#undef INLINE

}  // namespace

Kernels bf16_kernels() { return {sizeof(Bits), shrink, expand}; }

}  // namespace jaxserve::lora
#endif
