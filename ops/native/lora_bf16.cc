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
constexpr int PANELS = 2;  // of B at once: 64 columns

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

// h[t][r] of N rows of x and M of A. Whoever is among them, a row's sums are added up in the same order. With AHEAD the next M
// rows of A are asked for, line by line.
template <int N, int M, bool AHEAD>
AT void dots(const Bits* x, int64_t width, const Bits* a, int64_t inputs, float* h, int ranks) {
  vf sum[16];
  UNROLL for (int i = 0; i < 16; ++i) sum[i] = splat(0.0f);
  int64_t i = 0;
  for (; i + 32 <= inputs; i += 32) {
    __m512i in[N];
    UNROLL for (int t = 0; t < N; ++t) in[t] = load_bits(x + t * width + i);
    UNROLL for (int r = 0; r < M; ++r) {
      const __m512i row = load_bits(a + r * inputs + i);
      if (AHEAD) __builtin_prefetch(a + (M + r) * inputs + i, 0, 3);
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

// A few rows of A: they stay in the first cache for all rows of x.
template <int M>
AT void shrink_ranks(const Bits* x, int count, int64_t width, const Bits* a, int64_t inputs, float* h, int ranks) {
  int t = 0;
  if (count >= TOKENS) dots<TOKENS, M, true>(x, width, a, inputs, h, ranks), t = TOKENS;
  for (; t + TOKENS <= count; t += TOKENS) dots<TOKENS, M, false>(x + t * width, width, a, inputs, h + t * ranks, ranks);
  switch (count - t) {
    case 3: return dots<3, M, true>(x + t * width, width, a, inputs, h + t * ranks, ranks);
    case 2: return dots<2, M, true>(x + t * width, width, a, inputs, h + t * ranks, ranks);
    case 1: return dots<1, M, true>(x + t * width, width, a, inputs, h + t * ranks, ranks);
    default: return;
  }
}

AT void shrink(const float* const* x, int count, const float* gain, float eps, const void* a, int ranks, int64_t inputs,
               void* hidden, int64_t stride) {
  const int64_t width = ceil_div(inputs, 32) * 32;
  Bits* in = static_cast<Bits*>(scratch(7, count * width * sizeof(Bits) + count * ranks * sizeof(float)));
  float* h = reinterpret_cast<float*>(in + count * width);
  float norm[kBlock];
  for (int t = 0; t < count; ++t) norm[t] = round_row(x[t], gain, eps, inputs, in + t * width);
  const Bits* rows = static_cast<const Bits*>(a);
  int r = 0;
  for (; r + RANKS <= ranks; r += RANKS)
    shrink_ranks<RANKS>(in, count, width, rows + r * inputs, inputs, h + r, ranks);
  for (; r < ranks; ++r) shrink_ranks<1>(in, count, width, rows + r * inputs, inputs, h + r, ranks);
  Bits* to = static_cast<Bits*>(hidden);
  for (int t = 0; t < count; ++t) {
    const __m512 by = _mm512_set1_ps(norm[t]);
    for (r = 0; r < stride; r += 32) {
      const __mmask32 there = first(ranks - r);  // and a zero where the row is one longer
      const float* from = h + t * ranks + r;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
      _mm512_mask_storeu_epi16(to + t * stride + r, first(stride - r),
                               rounded(_mm512_mul_ps(low, by), _mm512_mul_ps(high, by)));
    }
  }
}

INLINE __m512i both(const Bits* h) {  // two neighbours of a row of h
  int32_t pair;
  __builtin_memcpy(&pair, h, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

// M panels of B. Where the ranks are odd their last one's partner in B is zero.
template <int N, int M>
AT void add(const Bits* h, int64_t stride, const Bits* panel, int half, float* const* y, int64_t at) {
  vf sum[N][2 * M];
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < 2 * M; ++j) sum[t][j] = load(y[t] + at + 16 * j);
  }
  for (int r = 0; r < half; ++r) {
    __m512i b[2 * M];
    UNROLL for (int j = 0; j < 2 * M; ++j) b[j] = load_bits(panel + (j / 2 * half + r) * kPanel * 2 + j % 2 * 32);
    UNROLL for (int t = 0; t < N; ++t) {
      const __m512i by = both(h + t * stride + 2 * r);
      UNROLL for (int j = 0; j < 2 * M; ++j) sum[t][j] = dot(sum[t][j], by, b[j]);
    }
  }
  UNROLL for (int t = 0; t < N; ++t) {
    UNROLL for (int j = 0; j < 2 * M; ++j) store(y[t] + at + 16 * j, sum[t][j]);
  }
}

// Some columns of one panel, of which column `from` is y's first.
AT void add_some(const Bits* h, const Bits* panel, int half, int64_t from, int64_t to, float* y) {
  UNROLL for (int j = 0; j < 2; ++j) {
    const int64_t begin = from - 16 * j, end = to - 16 * j;
    const uint32_t below = end >= 16 ? 0xffffu : end <= 0 ? 0u : (1u << end) - 1;
    const __mmask16 there = static_cast<__mmask16>(begin >= 16 ? 0u : begin <= 0 ? below : below & ~((1u << begin) - 1));
    vf sum = (vf)_mm512_maskz_loadu_ps(there, y + 16 * j - from);
    for (int r = 0; r < half; ++r) sum = dot(sum, both(h + 2 * r), load_bits(panel + r * kPanel * 2 + j * 32));
    _mm512_mask_storeu_ps(y + 16 * j - from, there, (__m512)sum);
  }
}

template <int N>
AT void expand_rows(const Bits* h, int64_t stride, const Bits* b, int half, int64_t begin, int64_t end, float* const* y) {
  for (int64_t column = begin, next; column < end; column = next) {
    const int64_t in = column % kPanel;
    const Bits* panel = b + (column - in) * 2 * half;
    if (in == 0 && column + PANELS * kPanel <= end) {
      next = column + PANELS * kPanel;
      add<N, PANELS>(h, stride, panel, half, y, column - begin);
    } else if (in == 0 && column + kPanel <= end) {
      next = column + kPanel;
      add<N, 1>(h, stride, panel, half, y, column - begin);
    } else {
      next = column - in + kPanel < end ? column - in + kPanel : end;
      for (int t = 0; t < N; ++t) add_some(h + t * stride, panel, half, in, in + next - column, y[t] + column - begin);
    }
  }
}

AT void expand(const void* hidden, int64_t stride, int count, const void* matrix, int ranks, int64_t, int64_t begin,
               int64_t end, float* const* y) {
  const Bits* h = static_cast<const Bits*>(hidden);
  const Bits* b = static_cast<const Bits*>(matrix);
  const int half = (ranks + 1) / 2;
  int t = 0;
  for (; t + ROWS <= count; t += ROWS) expand_rows<ROWS>(h + t * stride, stride, b, half, begin, end, y + t);
  for (; t + 2 <= count; t += 2) expand_rows<2>(h + t * stride, stride, b, half, begin, end, y + t);
  if (t < count) expand_rows<1>(h + t * stride, stride, b, half, begin, end, y + t);
}

#undef INLINE

}  // namespace

Kernels bf16_kernels() { return {sizeof(Bits), shrink, expand}; }

}  // namespace jaxserve::lora
#endif
