// AVX-512 with VNNI: 6 rows x 64 channels of sums in registers, 24 dot-product instructions for 4 loads of weights and
// 6 broadcasts of activations.

#include "int8.h"
#include "vector_math.h"

#if JAXSERVE_X86

namespace jaxserve::int8 {
namespace {

constexpr int kRows = 6;

TARGET_VNNI FORCE_INLINE __m512 scaled(const Block& b, int panel, __mmask16 mask, __m512 row_scale, const int32_t* sums) {
  const __m512 scale = _mm512_mul_ps(row_scale, _mm512_loadu_ps(b.scale[panel]));
  const __m512 bias = b.bias[panel] == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, b.bias[panel]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + panel * kPanel)), scale, bias);
}

// Scales, bias, activation, residual. It reads the sums from memory: passed in registers, the compiler keeps a copy of
// them on the stack up to date in the loop over inputs, which halves its speed.
TARGET_VNNI void finish(const Block& b, int64_t row, int rows, int panels, const int32_t* sums) {
  const int half = b.activation == Activation::kNone ? panels : panels / 2;
  for (int i = 0; i < rows; ++i, sums += panels * kPanel) {
    const __m512 row_scale = _mm512_set1_ps(b.a.scale[row + i]);
    for (int j = 0; j < half; ++j) {
      const __mmask16 mask = static_cast<__mmask16>((1u << b.valid[j]) - 1);
      __m512 value = scaled(b, j, mask, row_scale, sums);
      if (half != panels) {
        value = gate512(value, static_cast<int>(b.activation));
        value = _mm512_mul_ps(value, scaled(b, j + half, mask, row_scale, sums));
      }
      const int64_t at = (row + i) * b.out_stride;
      if (b.residual[j] != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, b.residual[j] + at));
      _mm512_mask_storeu_ps(b.out[j] + at, mask, value);
    }
  }
}

template <int MR, int NP>
TARGET_VNNI void tile(const Block& b, int64_t row) {
  __m512i sum[MR][NP];
  UNROLL
  for (int j = 0; j < NP; ++j) {
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(b.sum128[j]));
    UNROLL
    for (int i = 0; i < MR; ++i) sum[i][j] = start;
  }
  const uint8_t* a = b.a.data + row * b.a.stride;
  const int8_t* w[NP];
  UNROLL
  for (int j = 0; j < NP; ++j) w[j] = b.weight[j];
  for (int64_t quad = 0; quad < b.quads; ++quad) {
    __m512i weight[NP];
    UNROLL
    for (int j = 0; j < NP; ++j) weight[j] = _mm512_load_si512(w[j] + quad * 64);
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512i activation = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a + i * b.a.stride + quad * 4));
      UNROLL
      for (int j = 0; j < NP; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], activation, weight[j]);
    }
  }
  alignas(64) int32_t sums[MR * NP * kPanel];
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) _mm512_store_si512(sums + (i * NP + j) * kPanel, sum[i][j]);
  }
  finish(b, row, MR, NP, sums);
}

template <int NP>
TARGET_VNNI void rows(const Block& b) {
  int64_t row = 0;
  for (; row + kRows <= b.rows; row += kRows) tile<kRows, NP>(b, row);
  switch (b.rows - row) {
    case 1: return tile<1, NP>(b, row);
    case 2: return tile<2, NP>(b, row);
    case 3: return tile<3, NP>(b, row);
    case 4: return tile<4, NP>(b, row);
    case 5: return tile<5, NP>(b, row);
    default: return;
  }
}

void block(const Block& b) {
  switch (b.panels) {
    case 1: return rows<1>(b);
    case 2: return rows<2>(b);
    case 3: return rows<3>(b);
    default: return rows<4>(b);
  }
}

TARGET_VNNI void round_row(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  __m512 squares = _mm512_setzero_ps(), peaks = _mm512_setzero_ps();
  for (int64_t i = 0; i < r.width; i += 16) {
    const __mmask16 mask = r.width - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (r.width - i)) - 1);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
    if (r.gain != nullptr) {
      squares = _mm512_fmadd_ps(value, value, squares);
      value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, r.gain + i));
    }
    peaks = _mm512_max_ps(peaks, _mm512_abs_ps(value));
  }
  const float peak = _mm512_reduce_max_ps(peaks);
  const __m512 inverse = _mm512_set1_ps(peak > 1e-30f ? 127.0f / peak : 0.0f);
  uint8_t* data = r.data + row * r.data_stride;
  for (int64_t i = 0; i < r.width; i += 16) {
    const __mmask16 mask = r.width - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (r.width - i)) - 1);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
    if (r.gain != nullptr) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, r.gain + i));
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i), bytes);  // the stride leaves room for the last 16
  }
  // The norm is one factor a row: rounding does not see it, the scale takes it.
  float norm = 1.0f;
  if (r.gain != nullptr) {
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(r.width);
    norm = 1.0f / __builtin_sqrtf(mean + r.eps);
  }
  r.scale[row] = peak > 1e-30f ? peak * norm / 127.0f : norm;
}

}  // namespace

const Kernels kVnniKernels = {block, round_row};

}  // namespace jaxserve::int8

#endif
