// AVX2: |a| is unsigned and the weights take a's sign, so pairs of products stay within 16 bits
// (2 * 127 * 127 < 32768) and the sums are exact.

#include <algorithm>

#include "int8.h"
#include "vector_math.h"

#if JAXSERVE_X86

namespace jaxserve::int8 {
namespace {

constexpr int kRows = 3;  // x 1 panel: 6 sums, 2 weights, and room for the chain's temporaries in 16 registers

template <int MR>
TARGET_AVX2 void tile(const Block& b, int64_t row, int panel, float* result) {
  __m256i sum[MR][2];
  UNROLL
  for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* a = b.a.data + row * b.a.stride;
  const int8_t* w = b.weight[panel];
  for (int64_t quad = 0; quad < b.quads; ++quad, w += 64) {
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(a + i * b.a.stride + quad * 4));
      const __m256i size = _mm256_abs_epi8(x);
      const __m256i p0 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(low, x));
      const __m256i p1 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(high, x));
      sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(p0, ones));
      sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(p1, ones));
    }
  }
  UNROLL
  for (int i = 0; i < MR; ++i) {
    const __m256 row_scale = _mm256_set1_ps(b.a.scale[row + i]);
    UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_mul_ps(row_scale, _mm256_loadu_ps(b.scale[panel] + 8 * h));
      _mm256_storeu_ps(result + (i * kPanels + panel) * kPanel + 8 * h,
                       _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][h]), scale));
    }
  }
}

TARGET_AVX2 void finish(const Block& b, int64_t row, float* result) {
  const int half = b.activation == Activation::kNone ? b.panels : b.panels / 2;
  for (int p = 0; p < b.panels; ++p) {
    if (b.bias[p] == nullptr) continue;
    for (int c = 0; c < b.valid[p]; ++c) result[p * kPanel + c] += b.bias[p][c];
  }
  for (int p = 0; p < half; ++p) {
    float* values = result + p * kPanel;
    if (half != b.panels) {
      const float* up = result + (p + half) * kPanel;
      for (int h = 0; h < kPanel; h += 8) {
        const __m256 gate = gate256(_mm256_loadu_ps(values + h), static_cast<int>(b.activation));
        _mm256_storeu_ps(values + h, _mm256_mul_ps(gate, _mm256_loadu_ps(up + h)));
      }
    }
    float* out = b.out[p] + row * b.out_stride;
    const float* residual = b.residual[p] == nullptr ? nullptr : b.residual[p] + row * b.out_stride;
    for (int c = 0; c < b.valid[p]; ++c) out[c] = residual == nullptr ? values[c] : values[c] + residual[c];
  }
}

TARGET_AVX2 void block(const Block& b) {
  alignas(32) float result[kRows * kPanels * kPanel];
  for (int64_t row = 0; row < b.rows; row += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, b.rows - row));
    for (int p = 0; p < b.panels; ++p) {
      if (count == 3) tile<3>(b, row, p, result);
      if (count == 2) tile<2>(b, row, p, result);
      if (count == 1) tile<1>(b, row, p, result);
    }
    for (int i = 0; i < count; ++i) finish(b, row + i, result + i * kPanels * kPanel);
  }
}

// One row, 8 values at a time; the tail of a width that 8 does not divide goes one by one.
TARGET_AVX2 void round_row(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  const int64_t even = r.width / 8 * 8;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 squares = _mm256_setzero_ps(), peaks = _mm256_setzero_ps();
  for (int64_t i = 0; i < even; i += 8) {
    __m256 value = _mm256_loadu_ps(x + i);
    squares = _mm256_fmadd_ps(value, value, squares);
    if (r.gain != nullptr) value = _mm256_mul_ps(value, _mm256_loadu_ps(r.gain + i));
    peaks = _mm256_max_ps(peaks, _mm256_andnot_ps(sign, value));
  }
  alignas(32) float square[8], top[8];
  _mm256_store_ps(square, squares);
  _mm256_store_ps(top, peaks);
  float total = 0.0f, peak = 0.0f;
  for (int i = 0; i < 8; ++i) {
    total += square[i];
    peak = top[i] > peak ? top[i] : peak;
  }
  for (int64_t i = even; i < r.width; ++i) {
    const float value = r.gain == nullptr ? x[i] : x[i] * r.gain[i];
    total += x[i] * x[i];
    peak = __builtin_fabsf(value) > peak ? __builtin_fabsf(value) : peak;
  }
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  int8_t* data = reinterpret_cast<int8_t*>(r.data) + row * r.data_stride;
  for (int64_t i = 0; i < even; i += 8) {
    __m256 value = _mm256_loadu_ps(x + i);
    if (r.gain != nullptr) value = _mm256_mul_ps(value, _mm256_loadu_ps(r.gain + i));
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(inverse)));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(data + i), _mm_packs_epi16(words, words));
  }
  for (int64_t i = even; i < r.width; ++i) {
    const float value = r.gain == nullptr ? x[i] : x[i] * r.gain[i];
    data[i] = static_cast<int8_t>(__builtin_rintf(value * inverse));
  }
  for (int64_t i = r.width; i < (r.width + 3) / 4 * 4; ++i) data[i] = 0;
  const float norm = r.gain == nullptr ? 1.0f : 1.0f / __builtin_sqrtf(total / static_cast<float>(r.width) + r.eps);
  r.scale[row] = peak > 1e-30f ? peak * norm / 127.0f : norm;
}

}  // namespace

const Kernels kAvx2Kernels = {block, round_row};

}  // namespace jaxserve::int8

#endif
