// AVX-512 with VNNI: unsigned values times signed activations, which are broadcast from memory. Values are multiplied as they are
// stored, two dot products from one load of four bits: taking bits apart fills ports that dot products leave free. One or two rows,
// which wait for memory, take four panels at once; more of them six rows x two panels of integer and of float sums in registers.

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

int most(int64_t rows) { return rows <= 2 ? 4 : 2; }

constexpr bool kStored = true;

// How values are read: BITS as stored, with a table or without, `line` bytes from one line to the next. Upper halves of four bits
// may stay where they are, as 16 times the values, where somebody divides by that later.
template <int BITS, bool TABLE, bool UPPER>
struct Reader;

template <bool UPPER>
struct Reader<8, false, UPPER> {
  static constexpr int kQuads = 1, kLines = 1;  // inputs in fours that one `load` gives, and the lines it reads
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t, __m512i, __m512i (&out)[kQuads]) {
    out[0] = _mm512_loadu_si512(from);
  }
};

template <bool TABLE, bool UPPER>
struct Reader<4, TABLE, UPPER> {
  static constexpr int kQuads = 2, kLines = 1;
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t, __m512i table, __m512i (&out)[kQuads]) {
    const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(both, low);
    out[1] = UPPER ? _mm512_andnot_si512(low, both) : _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    if (TABLE) {
      out[0] = _mm512_shuffle_epi8(table, out[0]);
      out[1] = _mm512_shuffle_epi8(table, out[1]);
    }
  }
};

template <bool UPPER>
struct Reader<6, false, UPPER> {
  static constexpr int kQuads = 4, kLines = 3;
  AT FORCE_INLINE static void load(const uint8_t* from, int64_t line, __m512i, __m512i (&out)[kQuads]) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + line), c = _mm512_loadu_si512(from + 2 * line);
    const __m512i six = _mm512_set1_epi8(63);
    out[0] = _mm512_and_si512(a, six);
    out[1] = _mm512_and_si512(b, six);
    out[2] = _mm512_and_si512(c, six);
    // The upper bits of all three: 0xca takes of two operands the bits that the first one names.
    const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), _mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4), 0xca);
    const __m512i all = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), two, _mm512_srli_epi16(c, 2), 0xca);
    out[3] = _mm512_and_si512(all, six);
  }
};

// MR rows x NP panels of one chunk. PARTS: scales of 16 inputs (2) or 32 (1) a step. The first rows of many ask for the next chunk's
// lines, into the second cache: their stream stands still for longer than the hardware looks ahead. Four panels are a stream that
// the hardware fetches as fast as memory gives it, and prefetches would be in its way.
template <int BITS, bool TABLE, int PARTS, int MR, int NP>
AT void rows(const Tile& t, const Chunk& chunk, int64_t row, float* sums) {
  constexpr bool kUpper = BITS == 4 && !TABLE && MR == 1;  // upper halves have sums of their own, 16 times too large
  using Read = Reader<BITS, TABLE, kUpper>;
  constexpr int kLoads = kStep / 4 / Read::kQuads / PARTS;
  const int64_t at = t.first_row + row, stride = t.a.stride, line = chunk.line;
  const int8_t* a = t.a.values(at) + chunk.first_step * kStep;
  const float* row_scale = t.a.scale(at) + chunk.first_step;
  const float* row_sum = t.a.scaled_sum(at) + chunk.first_step;
  const int32_t* part_sum = t.a.sum(at) + 2 * chunk.first_step;
  const auto of_row = [stride](auto* p, int i) {
    return reinterpret_cast<decltype(p)>(reinterpret_cast<const uint8_t*>(p) + i * stride);
  };
  const int zero = chunk.form->zero;
  const bool offsets = chunk.offset[0] != nullptr;
  const int64_t ahead = row == 0 ? chunk.ahead : 0;
  __m512i table = _mm512_setzero_si512();
  if (TABLE) {
    alignas(16) uint8_t entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = entry(*chunk.form, i);
    table = four_times(entries);
  }
  const uint8_t* w[NP];
  __m512 total[MR][NP];
  UNROLL
  for (int j = 0; j < NP; ++j) {
    w[j] = chunk.values[j];
    UNROLL
    for (int i = 0; i < MR; ++i) total[i][j] = _mm512_loadu_ps(sums + (i * t.panels + j) * kPanel);
  }
  for (int64_t step = 0; step < chunk.steps; ++step) {
    __m512 scaled[MR][NP];
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      __m512i product[MR][NP], upper[NP];
      UNROLL
      for (int i = 0; i < MR; ++i) {
        int32_t added = of_row(part_sum, i)[2 * step + part];
        if (PARTS == 1) added += of_row(part_sum, i)[2 * step + 1];
        const __m512i start = _mm512_set1_epi32(-zero * added);
        UNROLL
        for (int j = 0; j < NP; ++j) product[i][j] = start;
      }
      UNROLL
      for (int j = 0; j < NP; ++j) upper[j] = _mm512_setzero_si512();
      UNROLL
      for (int load = 0; load < kLoads; ++load) {
        __m512i value[NP][Read::kQuads];
        UNROLL
        for (int j = 0; j < NP; ++j) {
          UNROLL
          for (int l = 0; NP < kPanels && l < Read::kLines; ++l) __builtin_prefetch(w[j] + l * line + ahead, 0, 2);
          Read::load(w[j], line, table, value[j]);
          w[j] += Read::kLines * line;
        }
        UNROLL
        for (int quad = 0; quad < Read::kQuads; ++quad) {
          UNROLL
          for (int i = 0; i < MR; ++i) {
            int32_t four;
            std::memcpy(&four, of_row(a, i) + step * kStep + part * 16 + (load * Read::kQuads + quad) * 4, 4);
            const __m512i activation = _mm512_set1_epi32(four);
            UNROLL
            for (int j = 0; j < NP; ++j) {
              __m512i& sum = kUpper && quad == 1 ? upper[j] : product[i][j];
              sum = _mm512_dpbusd_epi32(sum, value[j][quad], activation);
            }
          }
        }
      }
      UNROLL
      for (int j = 0; j < NP; ++j) {
        if (kUpper) product[0][j] = _mm512_add_epi32(product[0][j], _mm512_srai_epi32(upper[j], 4));
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

// All rows, up to six at a time; the first of them ask for the next chunk.
template <int BITS, bool TABLE, int PARTS, int NP>
void all_rows(const Tile& t, const Chunk& chunk, float* sums) {
  for (int64_t row = 0; row < t.rows;) {
    const int64_t left = t.rows - row;
    // 7 are 4 and 3, 8 are 4 and 4: with few rows in registers dot products wait for each other.
    const int64_t now = left == 7 || left == 8 ? 4 : std::min<int64_t>(left, 6);
    float* to = sums + row * t.panels * kPanel;
    switch (now) {
      case 6: rows<BITS, TABLE, PARTS, 6, NP>(t, chunk, row, to); break;
      case 5: rows<BITS, TABLE, PARTS, 5, NP>(t, chunk, row, to); break;
      case 4: rows<BITS, TABLE, PARTS, 4, NP>(t, chunk, row, to); break;
      case 3: rows<BITS, TABLE, PARTS, 3, NP>(t, chunk, row, to); break;
      case 2: rows<BITS, TABLE, PARTS, 2, NP>(t, chunk, row, to); break;
      default: rows<BITS, TABLE, PARTS, 1, NP>(t, chunk, row, to); break;
    }
    row += now;
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
  if (chunk.form->bits == 8) return multiply_as<8, false>(t, chunk, panels, sums);
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
