// AVX2: pairs of unsigned values times signed activations stay within 16 bits where values are below 129; larger ones are widened
// to 16 bits first. The sums are exact either way.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocks/blocks.h"
#include "host_casts.h"
#include "int8.h"
#include "vector_math.h"

#if JAXSERVE_X86

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_ps
#endif

namespace jaxserve::blocks {
namespace {

#define AT TARGET_AVX2

AT FORCE_INLINE void gate(const float* gates, const float* ups, Activation activation, float* out) {
  for (int h = 0; h < kPanel; h += 8) {
    const __m256 factor = gate256(_mm256_loadu_ps(gates + h), static_cast<int>(activation));
    _mm256_storeu_ps(out + h, _mm256_mul_ps(factor, _mm256_loadu_ps(ups + h)));
  }
}

struct Sixteen {
  __m256 low, high;
};

#define READ AT static FORCE_INLINE Sixteen
READ floats(const uint8_t* from) {
  const float* p = reinterpret_cast<const float*>(from);
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
READ halves(const uint8_t* from) {
  const __m128i* p = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
}
READ brains(const uint8_t* from) {
  const __m128i* p = reinterpret_cast<const __m128i*>(from);
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p + 1)), 16);
  return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
READ bytes(const uint8_t* from) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)))};
}
READ signed_bytes(const uint8_t* from) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
READ powers(const uint8_t* from) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu8_epi32(all), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)), 23);
  return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
READ same(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
READ times(Sixteen a, Sixteen b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
#undef READ
AT static FORCE_INLINE void put(float* out, Sixteen value) {
  _mm256_storeu_ps(out, value.low);
  _mm256_storeu_ps(out + 8, value.high);
}

AT void look_up(const uint8_t* table, const uint8_t* values, int64_t count, uint8_t* out) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_shuffle_epi8(entries, value));
  }
}

int64_t passes(const Form&, int64_t, bool) { return 1; }

int most(int64_t) { return 2; }

bool stored(int64_t) { return false; }

bool widens(const Form&, int64_t) { return false; }

bool crossed(const Form&) { return false; }

void unpack_crossed(const uint8_t*, int64_t, int64_t, uint8_t*, int32_t*) {}

// The sums of four inputs' products in each of eight channels.
template <bool WIDE>
AT FORCE_INLINE __m256i four(__m256i value, int32_t activations) {
  if (!WIDE) {
    const __m256i pairs = _mm256_maddubs_epi16(value, _mm256_set1_epi32(activations));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  const __m256i a = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(activations)));
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(value)), a);
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(value, 1)), a);
  // Neighbours are two halves of a channel; hadd works within lanes of 128 bits.
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
}

// PLANES: a value's bytes, the upper one first.
template <bool WIDE, int PARTS, int PLANES, int MR>
AT void rows(const Tile& t, const Chunk& chunk, int panel, int64_t row, float* sums) {
  const int zero = chunk.form->zero;
  const uint8_t* w = chunk.values[panel];
  for (int64_t step = 0; step < chunk.steps; ++step) {
    __m256 scaled[MR][2];
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      __m256i product[MR][2];
      UNROLL
      for (int i = 0; i < MR; ++i) {
        const int32_t* sum = t.a.step(t.first_row + row + i, chunk.first_step + step).minus_sum;
        const __m256i start = _mm256_set1_epi32((zero >> 8 * (PLANES - 1)) * (PARTS == 1 ? sum[0] + sum[1] : sum[part]));
        product[i][0] = product[i][1] = start;
      }
      for (int plane = 0; plane < PLANES; ++plane) {
        for (int i = 0; plane > 0 && i < MR; ++i) {
          product[i][0] = _mm256_slli_epi32(product[i][0], 8);
          product[i][1] = _mm256_slli_epi32(product[i][1], 8);
        }
        const uint8_t* at = w + plane * chunk.plane;
        for (int quad = 0; quad < 8 / PARTS; ++quad, at += 64) {
          const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
          const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
          UNROLL
          for (int i = 0; i < MR; ++i) {
            int32_t activations;
            const Step& a = t.a.step(t.first_row + row + i, chunk.first_step + step);
            std::memcpy(&activations, a.value + part * 16 + quad * 4, 4);
            product[i][0] = _mm256_add_epi32(product[i][0], four<WIDE>(low, activations));
            product[i][1] = _mm256_add_epi32(product[i][1], four<WIDE>(high, activations));
          }
        }
      }
      w += 8 / PARTS * 64;
      UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_loadu_ps(chunk.scale[panel] + (step * PARTS + part) * kPanel + 8 * h);
        UNROLL
        for (int i = 0; i < MR; ++i) {
          const __m256 whole = _mm256_cvtepi32_ps(product[i][h]);
          scaled[i][h] = part == 0 ? _mm256_mul_ps(whole, scale) : _mm256_fmadd_ps(whole, scale, scaled[i][h]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const int64_t index = t.first_row + row + i, at = chunk.first_step + step;
      const __m256 scale = _mm256_set1_ps(t.a.step(index, at).scale), sum = _mm256_set1_ps(t.a.step(index, at).sum);
      UNROLL
      for (int h = 0; h < 2; ++h) {
        float* total = sums + i * t.panels * kPanel + 8 * h;
        __m256 value = _mm256_fmadd_ps(scaled[i][h], scale, _mm256_loadu_ps(total));
        if (chunk.offset[panel] != nullptr) {
          const __m256 offset = _mm256_loadu_ps(chunk.offset[panel] + step * kPanel + 8 * h);
          value = _mm256_fmadd_ps(offset, sum, value);
        }
        _mm256_storeu_ps(total, value);
      }
    }
  }
}

template <bool WIDE, int PARTS, int PLANES = 1>
void all_rows(const Tile& t, const Chunk& chunk, int panel, float* sums) {
  int64_t row = 0;
  for (; row + 3 <= t.rows; row += 3) rows<WIDE, PARTS, PLANES, 3>(t, chunk, panel, row, sums + row * t.panels * kPanel);
  for (; row < t.rows; ++row) rows<WIDE, PARTS, PLANES, 1>(t, chunk, panel, row, sums + row * t.panels * kPanel);
}

void multiply(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  const bool wide = chunk.form->largest > 128;
  for (int p = 0; p < panels; ++p, sums += kPanel) {
    if (planes(*chunk.form) == 2) {
      all_rows<true, 1, 2>(t, chunk, p, sums);
    } else if (chunk.form->block < kStep) {
      wide ? all_rows<true, 2>(t, chunk, p, sums) : all_rows<false, 2>(t, chunk, p, sums);
    } else {
      wide ? all_rows<true, 1>(t, chunk, p, sums) : all_rows<false, 1>(t, chunk, p, sums);
    }
  }
}

#include "blocks/blocks_kernels.h"
#undef AT

}  // namespace

const Kernels kAvx2Kernels = {tile, round_row, channel};

}  // namespace jaxserve::blocks

#endif
