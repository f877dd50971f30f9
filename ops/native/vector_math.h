// exp and what is made of it, for AVX-512 and AVX2 registers.

#pragma once

#include "common.h"

#if JAXSERVE_X86

namespace jaxserve {

// exp(x) with a relative error below 3e-7; 0 below -87.3, the largest float above 88.3. x = n ln 2 + r, |r| <= ln 2 / 2, and a Taylor
// polynomial of degree 6 in r.
TARGET_AVX512 inline __m512 exp512(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

TARGET_AVX2 inline __m256 exp256(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504089f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 720);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

// gelu by the normal distribution: x (1 / 2 + x P(x^2)) up to |x| = 4.6, max(x, 0) beyond; the error is below 3e-6 up to 3, and 4e-5
// anywhere. The highest power first.
constexpr float kGelu[] = {4.99943545e-14f, -6.91546256e-12f, 4.31977093e-10f, -1.62227725e-08f, 4.12484724e-07f, -7.60191733e-06f,
                           0.000106238447f, -0.00115760043f, 0.00991665572f, -0.0664354265f, 0.398923695f};
constexpr float kGeluEnd = 4.6f;

TARGET_AVX512 inline __m512 gelu512(__m512 x) {
  const __m512 end = _mm512_set1_ps(kGeluEnd), inside = _mm512_max_ps(_mm512_min_ps(x, end), _mm512_set1_ps(-kGeluEnd));
  const __m512 square = _mm512_mul_ps(inside, inside);
  __m512 p = _mm512_set1_ps(kGelu[0]);
  for (int i = 1; i < 11; ++i) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(kGelu[i]));
  const __m512 y = _mm512_mul_ps(x, _mm512_fmadd_ps(inside, p, _mm512_set1_ps(0.5f)));
  return _mm512_mask_mov_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_cmp_ps_mask(x, inside, _CMP_EQ_OQ), y);
}

TARGET_AVX2 inline __m256 gelu256(__m256 x) {
  const __m256 end = _mm256_set1_ps(kGeluEnd), inside = _mm256_max_ps(_mm256_min_ps(x, end), _mm256_set1_ps(-kGeluEnd));
  const __m256 square = _mm256_mul_ps(inside, inside);
  __m256 p = _mm256_set1_ps(kGelu[0]);
  for (int i = 1; i < 11; ++i) p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(kGelu[i]));
  const __m256 y = _mm256_mul_ps(x, _mm256_fmadd_ps(inside, p, _mm256_set1_ps(0.5f)));
  return _mm256_blendv_ps(_mm256_max_ps(x, _mm256_setzero_ps()), y, _mm256_cmp_ps(x, inside, _CMP_EQ_OQ));
}

// act(x): 1 silu, 2 gelu (tanh form), 3 relu, 4 gelu, 5 quick gelu. The smooth ones but gelu are x * sigmoid(z): z = x,
// 2 sqrt(2 / pi) (x + 0.044715 x^3), 1.702 x.
TARGET_AVX512 inline __m512 gate512(__m512 x, int activation) {
  if (activation == 3) return _mm512_max_ps(x, _mm512_setzero_ps());
  if (activation == 4) return gelu512(x);
  __m512 z = x;
  if (activation == 2) {
    const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
    z = _mm512_mul_ps(_mm512_add_ps(x, cubic), _mm512_set1_ps(1.5957691216057308f));
  }
  if (activation == 5) z = _mm512_mul_ps(x, _mm512_set1_ps(1.702f));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), z))));
}

TARGET_AVX2 inline __m256 gate256(__m256 x, int activation) {
  if (activation == 3) return _mm256_max_ps(x, _mm256_setzero_ps());
  if (activation == 4) return gelu256(x);
  __m256 z = x;
  if (activation == 2) {
    const __m256 cubic = _mm256_mul_ps(_mm256_mul_ps(x, x), _mm256_mul_ps(x, _mm256_set1_ps(0.044715f)));
    z = _mm256_mul_ps(_mm256_add_ps(x, cubic), _mm256_set1_ps(1.5957691216057308f));
  }
  if (activation == 5) z = _mm256_mul_ps(x, _mm256_set1_ps(1.702f));
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(x, _mm256_add_ps(one, exp256(_mm256_sub_ps(_mm256_setzero_ps(), z))));
}

}  // namespace jaxserve

#endif
