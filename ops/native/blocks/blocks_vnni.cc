// AVX-512 with VNNI: unsigned values times signed activations, which are broadcast from memory. Up to four rows multiply values
// as they are stored, two dot products from one load of four bits; more rows multiply unpacked ones, six rows x two panels of
// integer and of float sums in registers.

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

#define AT TARGET_VNNI
constexpr int64_t kDirect = 4;  // rows that multiply stored values: more of them pay for unpacking

AT void activate(float* x, Activation activation) {
  _mm512_storeu_ps(x, gate512(_mm512_loadu_ps(x), static_cast<int>(activation)));
}

using Sixteen = __m512;

#define READ AT static FORCE_INLINE __m512
READ floats(const uint8_t* from) { return _mm512_loadu_ps(from); }
READ halves(const uint8_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
READ brains(const uint8_t* from) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16));
}
READ bytes(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
READ signed_bytes(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
READ powers(const uint8_t* from) {
  const __m512i all = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(all, 23));
}
READ same(float value) { return _mm512_set1_ps(value); }
READ times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
#undef READ
AT static FORCE_INLINE void put(float* out, __m512 value) { _mm512_storeu_ps(out, value); }

AT __m512i four_times(const uint8_t* table) {
  return _mm512_maskz_broadcast_i32x4(0xffff, _mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

AT void look_up(const uint8_t* table, uint8_t* values, int64_t count) {
  const __m512i entries = four_times(table);
  for (int64_t i = 0; i < count; i += 64) {
    _mm512_storeu_si512(values + i, _mm512_shuffle_epi8(entries, _mm512_loadu_si512(values + i)));
  }
}

constexpr int64_t kFour = 2;  // rows that take four panels at once

bool direct(const Form& form, int64_t rows) { return form.bits == 8 || rows <= kDirect; }

// How values are read: BITS as stored, with a table or without.
template <int BITS, bool TABLE>
struct Reader;

template <>
struct Reader<8, false> {
  static constexpr int kQuads = 1, kBytes = 64;  // inputs in fours that one `load` gives, and what it reads
  AT FORCE_INLINE static void load(const uint8_t* from, __m512i, __m512i (&out)[kQuads]) {
    out[0] = _mm512_loadu_si512(from);
  }
};

template <bool TABLE>
struct Reader<4, TABLE> {
  static constexpr int kQuads = 2, kBytes = 64;
  AT FORCE_INLINE static void load(const uint8_t* from, __m512i table, __m512i (&out)[kQuads]) {
    const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(both, low);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    if (TABLE) {
      out[0] = _mm512_shuffle_epi8(table, out[0]);
      out[1] = _mm512_shuffle_epi8(table, out[1]);
    }
  }
};

template <>
struct Reader<6, false> {
  static constexpr int kQuads = 4, kBytes = 192;
  AT FORCE_INLINE static void load(const uint8_t* from, __m512i, __m512i (&out)[kQuads]) {
    const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 64);
    const __m512i top = _mm512_loadu_si512(from + 128), low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(48);
    const auto join = [&](__m512i a, __m512i b) AT {
      return _mm512_or_si512(_mm512_and_si512(a, low), _mm512_and_si512(b, high));
    };
    out[0] = join(first, _mm512_slli_epi16(top, 4));
    out[1] = join(_mm512_srli_epi16(first, 4), _mm512_slli_epi16(top, 2));
    out[2] = join(second, top);
    out[3] = join(_mm512_srli_epi16(second, 4), _mm512_srli_epi16(top, 2));
  }
};

// MR rows x NP panels of one chunk. PARTS: scales of 16 inputs (2) or 32 (1) a step.
template <int BITS, bool TABLE, int PARTS, int MR, int NP>
AT void rows(const Tile& t, const Chunk& chunk, int64_t row, float* sums) {
  using Read = Reader<BITS, TABLE>;
  constexpr int kLoads = kStep / 4 / Read::kQuads / PARTS;
  const int64_t at = t.first_row + row, stride = t.a.stride;
  const int8_t* a = t.a.values(at) + chunk.first_step * kStep;
  const float* row_scale = t.a.scale(at) + chunk.first_step;
  const float* row_sum = t.a.scaled_sum(at) + chunk.first_step;
  const int32_t* part_sum = t.a.sum(at) + 2 * chunk.first_step;
  const auto of_row = [stride](auto* p, int i) {
    return reinterpret_cast<decltype(p)>(reinterpret_cast<const uint8_t*>(p) + i * stride);
  };
  const int zero = chunk.form->zero;
  const bool offsets = chunk.offset[0] != nullptr;
  __m512i table = _mm512_setzero_si512();
  if (TABLE) {
    alignas(16) uint8_t entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = entry(*chunk.form, i);
    table = four_times(entries);
  }
  const uint8_t* w[NP];
  const uint8_t* ahead[NP];
  __m512 total[MR][NP];
  UNROLL
  for (int j = 0; j < NP; ++j) {
    w[j] = BITS == 8 && chunk.values[j] != nullptr ? chunk.values[j] : chunk.packed[j];
    ahead[j] = chunk.ahead[j];
    UNROLL
    for (int i = 0; i < MR; ++i) total[i][j] = _mm512_loadu_ps(sums + (i * t.panels + j) * kPanel);
  }
  for (int64_t step = 0; step < chunk.steps; ++step) {
    __m512 scaled[MR][NP];
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      __m512i product[MR][NP];
      UNROLL
      for (int i = 0; i < MR; ++i) {
        int32_t added = of_row(part_sum, i)[2 * step + part];
        if (PARTS == 1) added += of_row(part_sum, i)[2 * step + 1];
        const __m512i start = _mm512_set1_epi32(-zero * added);
        UNROLL
        for (int j = 0; j < NP; ++j) product[i][j] = start;
      }
      UNROLL
      for (int load = 0; load < kLoads; ++load) {
        __m512i value[NP][Read::kQuads];
        UNROLL
        for (int j = 0; j < NP; ++j) {
          if (MR <= kFour) {
            // Into the second cache, a chunk ahead: few rows wait for memory, and the hardware alone is not far enough ahead.
            UNROLL
            for (int line = 0; line < Read::kBytes; line += 64) __builtin_prefetch(ahead[j] + line, 0, 2);
            ahead[j] += Read::kBytes;
          }
          Read::load(w[j], table, value[j]);
          w[j] += Read::kBytes;
        }
        UNROLL
        for (int quad = 0; quad < Read::kQuads; ++quad) {
          UNROLL
          for (int i = 0; i < MR; ++i) {
            int32_t four;
            std::memcpy(&four, of_row(a, i) + step * kStep + part * 16 + (load * Read::kQuads + quad) * 4, 4);
            const __m512i activation = _mm512_set1_epi32(four);
            UNROLL
            for (int j = 0; j < NP; ++j) product[i][j] = _mm512_dpbusd_epi32(product[i][j], value[j][quad], activation);
          }
        }
      }
      UNROLL
      for (int j = 0; j < NP; ++j) {
        const __m512 scale = _mm512_load_ps(chunk.scale[j] + (step * PARTS + part) * kPanel);
        UNROLL
        for (int i = 0; i < MR; ++i) {
          const __m512 whole = _mm512_cvtepi32_ps(product[i][j]);
          scaled[i][j] = part == 0 ? _mm512_mul_ps(whole, scale) : _mm512_fmadd_ps(whole, scale, scaled[i][j]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512 scale = _mm512_set1_ps(of_row(row_scale, i)[step]);
      UNROLL
      for (int j = 0; j < NP; ++j) total[i][j] = _mm512_fmadd_ps(scaled[i][j], scale, total[i][j]);
    }
    if (!offsets) continue;
    UNROLL
    for (int j = 0; j < NP; ++j) {
      const __m512 offset = _mm512_load_ps(chunk.offset[j] + step * kPanel);
      UNROLL
      for (int i = 0; i < MR; ++i) {
        total[i][j] = _mm512_fmadd_ps(offset, _mm512_set1_ps(of_row(row_sum, i)[step]), total[i][j]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) _mm512_storeu_ps(sums + (i * t.panels + j) * kPanel, total[i][j]);
  }
}

template <int BITS, bool TABLE, int PARTS, int NP>
void all_rows(const Tile& t, const Chunk& chunk, float* sums) {
  int64_t row = 0;
  const auto at = [&](int64_t r) { return sums + r * t.panels * kPanel; };
  if constexpr (BITS == 8) {
    for (; row + 6 <= t.rows; row += 6) rows<BITS, TABLE, PARTS, 6, NP>(t, chunk, row, at(row));
    if (t.rows - row == 5) return rows<BITS, TABLE, PARTS, 5, NP>(t, chunk, row, at(row));
  }
  switch (t.rows - row) {
    case 4: return rows<BITS, TABLE, PARTS, 4, NP>(t, chunk, row, at(row));
    case 3: return rows<BITS, TABLE, PARTS, 3, NP>(t, chunk, row, at(row));
    case 2: return rows<BITS, TABLE, PARTS, 2, NP>(t, chunk, row, at(row));
    case 1: return rows<BITS, TABLE, PARTS, 1, NP>(t, chunk, row, at(row));
    default: return;
  }
}

template <int BITS, bool TABLE, int PARTS>
void multiply_parts(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (panels == 4) {
    t.rows == 1 ? rows<BITS, TABLE, PARTS, 1, 4>(t, chunk, 0, sums) : rows<BITS, TABLE, PARTS, 2, 4>(t, chunk, 0, sums);
  } else {
    panels == 2 ? all_rows<BITS, TABLE, PARTS, 2>(t, chunk, sums) : all_rows<BITS, TABLE, PARTS, 1>(t, chunk, sums);
  }
}

template <int BITS, bool TABLE>
void multiply_as(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (chunk.form->block < kStep) return multiply_parts<BITS, TABLE, 2>(t, chunk, panels, sums);
  multiply_parts<BITS, TABLE, 1>(t, chunk, panels, sums);
}

void multiply(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (chunk.values[0] != nullptr || chunk.form->bits == 8) return multiply_as<8, false>(t, chunk, panels, sums);
  if (chunk.form->bits == 6) return multiply_as<6, false>(t, chunk, panels, sums);
  if (chunk.form->table != Table::kNone) return multiply_as<4, true>(t, chunk, panels, sums);
  multiply_as<4, false>(t, chunk, panels, sums);
}

#include "blocks/blocks_kernels.h"
#undef AT

}  // namespace

const Kernels kVnniKernels = {tile, round_row, channel};

}  // namespace jaxserve::blocks

#endif
