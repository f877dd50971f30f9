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
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* a = b.a.data + row * b.a.stride;
  const int64_t groups = b.a.stride / kGroup;
  const float* scale = b.a.scale + row * groups;
  const int8_t* w = b.weight[panel];
  for (int64_t group = 0; group < groups; ++group) {
    __m256i sum[MR][2];
    UNROLL
    for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    const int64_t end = (group + 1) * kQuads < b.quads ? (group + 1) * kQuads : b.quads;
    for (int64_t quad = group * kQuads; quad < end; ++quad, w += 64) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
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
      const __m256 row_scale = _mm256_set1_ps(scale[i * groups + group]);
      UNROLL
      for (int h = 0; h < 2; ++h) {
        float* total = result + (i * kPanels + panel) * kPanel + 8 * h;
        const __m256 before = group == 0 ? _mm256_setzero_ps() : _mm256_load_ps(total);
        _mm256_store_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][h]), row_scale, before));
      }
    }
  }
}

TARGET_AVX2 void finish(const Block& b, int64_t row, float* result) {
  const int half = b.activation == Activation::kNone ? b.panels : b.panels / 2;
  for (int p = 0; p < b.panels; ++p) {
    float* values = result + p * kPanel;
    for (int c = 0; c < kPanel; ++c) values[c] *= b.scale[p][c];
    for (int c = 0; b.bias[p] != nullptr && c < b.valid[p]; ++c) values[c] += b.bias[p][c];
    const float* change = b.change == nullptr ? nullptr : b.change + (row * kPanels + p) * kPanel;
    for (int c = 0; change != nullptr && c < kPanel; ++c) values[c] += change[c];
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
    for (int h = 0; b.after != Activation::kNone && h < kPanel; h += 8)
      _mm256_storeu_ps(values + h, gate256(_mm256_loadu_ps(values + h), static_cast<int>(b.after)));
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

// The Hadamard transform of a group, without its factor.
TARGET_AVX2 void rotate(float* value) {
  __m256 v[8];
  for (int i = 0; i < 8; ++i) v[i] = _mm256_load_ps(value + 8 * i);
  for (int stride = 4; stride > 0; stride /= 2) {
    for (int i = 0; i < 8; ++i) {
      if (i & stride) continue;
      const __m256 a = v[i], b = v[i + stride];
      v[i] = _mm256_add_ps(a, b);
      v[i + stride] = _mm256_sub_ps(a, b);
    }
  }
  // In a register: each lane and the one it changes places with, their sum in the lower and difference in the upper.
  for (int i = 0; i < 8; ++i) {
    __m256 x = v[i], swapped = _mm256_permute2f128_ps(x, x, 1);
    x = _mm256_blend_ps(_mm256_add_ps(x, swapped), _mm256_sub_ps(swapped, x), 0xf0);
    swapped = _mm256_permute_ps(x, 0x4e);
    x = _mm256_blend_ps(_mm256_add_ps(x, swapped), _mm256_sub_ps(swapped, x), 0xcc);
    swapped = _mm256_permute_ps(x, 0xb1);
    x = _mm256_blend_ps(_mm256_add_ps(x, swapped), _mm256_sub_ps(swapped, x), 0xaa);
    _mm256_store_ps(value + 8 * i, x);
  }
}

TARGET_AVX2 void round_row(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  int8_t* data = reinterpret_cast<int8_t*>(r.data) + r.at(row) * kGroup;
  float* scale = r.scale + r.at(row);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 squares = _mm256_setzero_ps();
  for (int64_t group = 0; group < r.groups; ++group) {
    alignas(32) float value[kGroup];
    alignas(32) float top[8];
    const int64_t begin = group * kGroup, count = r.width - begin < kGroup ? r.width - begin : kGroup;
    for (int64_t i = 0; i < kGroup; ++i) value[i] = i < count ? x[begin + i] : 0.0f;
    __m256 peaks = _mm256_setzero_ps();
    for (int i = 0; i < kGroup; i += 8) {
      const __m256 part = _mm256_load_ps(value + i);
      squares = _mm256_fmadd_ps(part, part, squares);
    }
    if (r.gain != nullptr) {
      for (int64_t i = 0; i < count; ++i) value[i] *= r.gain[begin + i];
    }
    if (r.rotated) rotate(value);
    for (int i = 0; i < kGroup; i += 8) peaks = _mm256_max_ps(peaks, _mm256_andnot_ps(sign, _mm256_load_ps(value + i)));
    _mm256_store_ps(top, peaks);
    float peak = 0.0f;
    for (int i = 0; i < 8; ++i) peak = top[i] > peak ? top[i] : peak;
    const __m256 inverse = _mm256_set1_ps(peak > 1e-30f ? 127.0f / peak : 0.0f);
    for (int i = 0; i < kGroup; i += 8) {
      const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(value + i), inverse));
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(data + begin + i), _mm_packs_epi16(words, words));
    }
    scale[group] = peak / 127.0f * (r.rotated ? kRotation : 1.0f);
  }
  if (r.gain == nullptr) return;
  alignas(32) float square[8];
  _mm256_store_ps(square, squares);
  float total = 0.0f;
  for (int i = 0; i < 8; ++i) total += square[i];
  const float norm = 1.0f / __builtin_sqrtf(total / static_cast<float>(r.width) + r.eps);
  for (int64_t group = 0; group < r.groups; ++group) scale[group] *= norm;
}

}  // namespace

const Kernels kAvx2Kernels = {block, round_row};

}  // namespace jaxserve::int8

#endif
