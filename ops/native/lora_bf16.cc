// Low-rank adapters' kernels for CPUs that multiply pairs of bfloat16: matrices of bfloat16, twice the products a cycle.

#include "lora.h"

#if JAXSERVE_X86
#define AT TARGET_BF16
#define W 16

namespace jaxserve::lora {
namespace {

#include "vectors.h"

constexpr int TOKENS = 4;  // at once
constexpr int RANKS = 4;   // rows of A at once
constexpr int PAIRS = 2;   // pairs of vectors of B at once: 64 columns

INLINE __m512i load_bits(const Bits* p) { return _mm512_loadu_si512(p); }
INLINE vf dot(vf sum, __m512i a, __m512i b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE __mmask32 first(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// x in bfloat16, zeros up to whole vectors of 32.
AT void round_row(const float* x, int64_t inputs, Bits* to) {
  for (int64_t i = 0; i < inputs; i += 32) {
    const __mmask32 there = first(inputs - i);
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), x + i);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), x + i + 16);
    _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <int N, int M>
AT void dots(const Bits* x, int64_t width, const Bits* a, int64_t inputs, float* h, int ranks) {
  vf sum[N][M];
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int r = 0; r < M; ++r) sum[t][r] = splat(0.0f);
  }
  int64_t i = 0;
  for (; i + 32 <= inputs; i += 32) {
    __m512i in[N];
    UNROLL for (int t = 0; t < N; ++t) in[t] = load_bits(x + t * width + i);
    UNROLL for (int r = 0; r < M; ++r) {
      const __m512i row = load_bits(a + r * inputs + i);
      UNROLL for (int t = 0; t < N; ++t) sum[t][r] = dot(sum[t][r], in[t], row);
    }
  }
  if (i < inputs) {
    UNROLL for (int r = 0; r < M; ++r) {
      const __m512i row = _mm512_maskz_loadu_epi16(first(inputs - i), a + r * inputs + i);
      UNROLL for (int t = 0; t < N; ++t) sum[t][r] = dot(sum[t][r], load_bits(x + t * width + i), row);
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int r = 0; r < M; ++r) h[t * ranks + r] = sum_lanes(sum[t][r]);
  }
}

template <int N>
AT void shrink_rows(const Bits* x, int64_t width, const Bits* a, int ranks, int64_t inputs, float* h) {
  int r = 0;
  for (; r + RANKS <= ranks; r += RANKS) dots<N, RANKS>(x, width, a + r * inputs, inputs, h + r, ranks);
  for (; r < ranks; ++r) dots<N, 1>(x, width, a + r * inputs, inputs, h + r, ranks);
}

AT void shrink(const float* const* x, int count, const Bits* a, int ranks, int64_t inputs, float* h) {
  const int64_t width = ceil_div(inputs, 32) * 32;
  Bits* rounded = static_cast<Bits*>(scratch(0, count * width * sizeof(Bits)));
  for (int t = 0; t < count; ++t) round_row(x[t], inputs, rounded + t * width);
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS)
    shrink_rows<TOKENS>(rounded + t * width, width, a, ranks, inputs, h + t * ranks);
  for (; t < count; ++t) shrink_rows<1>(rounded + t * width, width, a, ranks, inputs, h + t * ranks);
}

// Columns [at, at + 32) of two rows of B as pairs: those of columns at.. in `low`, of at + 16.. in `high`.
INLINE void pair_up(__m512i even, __m512i odd, __m512i* low, __m512i* high) {
  const __m512i columns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(even, columns, odd);
  *high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(columns, _mm512_set1_epi16(16)), odd);
}

// `pairs` [N][half] are two neighbours of a row of h in bfloat16 each, the lower one first. Of the last pair the
// second row of B may not be there: it is then the first again, and its number in `pairs` is zero.
template <int N, int M>
AT void add(const uint32_t* pairs, int half, const Bits* b, int ranks, int64_t outputs, int64_t at, int64_t end,
            float* const* y) {
  vf sum[N][2 * M];
  __mmask16 low_there[M], high_there[M];
  UNROLL for (int j = 0; j < M; ++j) {
    const __mmask32 there = first(end - at - 32 * j);
    low_there[j] = static_cast<__mmask16>(there);
    high_there[j] = static_cast<__mmask16>(there >> 16);
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) {
      sum[t][2 * j] = (vf)_mm512_maskz_loadu_ps(low_there[j], y[t] + at + 32 * j);
      sum[t][2 * j + 1] = (vf)_mm512_maskz_loadu_ps(high_there[j], y[t] + at + 32 * j + 16);
    }
  }
  for (int r = 0; r < half; ++r) {
    const Bits* even = b + 2 * r * outputs + at;
    const Bits* odd = 2 * r + 1 < ranks ? even + outputs : even;
    UNROLL for (int j = 0; j < M; ++j) {
      const __mmask32 there = low_there[j] | static_cast<__mmask32>(high_there[j]) << 16;
      __m512i low, high;
      pair_up(_mm512_maskz_loadu_epi16(there, even + 32 * j), _mm512_maskz_loadu_epi16(there, odd + 32 * j), &low,
              &high);
      UNROLL for (int t = 0; t < N; ++t) {
        const __m512i by = _mm512_set1_epi32(static_cast<int>(pairs[t * half + r]));
        sum[t][2 * j] = dot(sum[t][2 * j], by, low);
        sum[t][2 * j + 1] = dot(sum[t][2 * j + 1], by, high);
      }
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < M; ++j) {
      _mm512_mask_storeu_ps(y[t] + at + 32 * j, low_there[j], (__m512)sum[t][2 * j]);
      _mm512_mask_storeu_ps(y[t] + at + 32 * j + 16, high_there[j], (__m512)sum[t][2 * j + 1]);
    }
  }
}

template <int N>
AT void expand_rows(const uint32_t* pairs, int half, const Bits* b, int ranks, int64_t outputs, int64_t begin,
                    int64_t end, float* const* y) {
  int64_t at = begin;
  for (; at + 32 * PAIRS <= end; at += 32 * PAIRS) add<N, PAIRS>(pairs, half, b, ranks, outputs, at, end, y);
  for (; at < end; at += 32) add<N, 1>(pairs, half, b, ranks, outputs, at, end, y);
}

AT void expand(const float* h, int stride, int count, const Bits* b, int ranks, int64_t outputs, int64_t begin,
               int64_t end, float* const* y) {
  const int half = (ranks + 1) / 2;
  uint32_t* pairs = static_cast<uint32_t*>(scratch(0, count * half * sizeof(uint32_t) + 64));
  for (int t = 0; t < count; ++t) {
    for (int r = 0; r < half; r += 16) {
      const int left = ranks - 2 * r;
      const __mmask32 there = first(left);
      const float* from = h + t * stride + 2 * r;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
      const __mmask16 kept = half - r >= 16 ? 0xffff : (1u << (half - r)) - 1;
      _mm512_mask_storeu_epi32(pairs + t * half + r, kept, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
  int t = 0;
  for (; t + TOKENS <= count; t += TOKENS)
    expand_rows<TOKENS>(pairs + t * half, half, b, ranks, outputs, begin, end, y + t);
  for (; t < count; ++t) expand_rows<1>(pairs + t * half, half, b, ranks, outputs, begin, end, y + t);
}

#undef INLINE

}  // namespace

Kernels<Bits> bf16_kernels() { return {shrink, expand}; }

}  // namespace jaxserve::lora
#endif
