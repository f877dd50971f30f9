// AVX-512 with VNNI: unsigned values times signed activations, which are broadcast from memory. Values are multiplied as they are
// stored, two dot products from one load of four bits: taking bits apart fills ports that dot products leave free. One or two rows,
// which wait for memory, take four panels at once; more of them four to six rows x two panels of integer and of float sums in registers.
// What ports are there for: dot products and all other multiplications have two, which are the limit; conversions, additions of floats
// and whatever takes bits apart have others.

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

AT void look_up(const uint8_t* table, const uint8_t* values, int64_t count, uint8_t* out) {
  const __m512i entries = four_times(table);
  for (int64_t i = 0; i < count; i += 64) {
    _mm512_storeu_si512(out + i, _mm512_shuffle_epi8(entries, _mm512_loadu_si512(values + i)));
  }
}

constexpr int64_t kMostRows = 6;

int most(int64_t rows) { return rows <= 2 ? 4 : 2; }

constexpr int64_t kMany = 24;  // rows from which a chunk's values and scales are unpacked once for all of them

bool stored(int64_t rows) { return rows < kMany; }

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

// Scales and offsets of a chunk, widened before.
template <int NP>
struct Widened {
  const float* scales[NP];
  const float* offsets[NP];
  Widened(const Chunk& chunk, int panel) {
    for (int j = 0; j < NP; ++j) scales[j] = chunk.scale[panel + j], offsets[j] = chunk.offset[panel + j];
  }
  bool has_offsets() const { return offsets[0] != nullptr; }
  AT FORCE_INLINE void nest(int64_t) {}
  AT FORCE_INLINE __m512 scale(int j, int64_t index) const { return _mm512_load_ps(scales[j] + index * kPanel); }
  AT FORCE_INLINE __m512 offset(int j, int64_t step) const { return _mm512_load_ps(offsets[j] + step * kPanel); }
};

// Nested ones as they are stored: widened beside the products, by units that dot products leave free. A pass of its own over a
// chunk's heads takes a tenth of eight rows' time; with few rows it reads nothing meanwhile, and the hardware stops fetching ahead.
template <Scale SCALE, bool OFFSETS, int NP>
struct Nested {
  const uint8_t* heads[NP];
  int64_t offsets, nested_scales, nested_offsets;
  __m512 factor[NP], off[NP];
  AT Nested(const Chunk& chunk, int panel) {
    const Parts parts(*chunk.form, chunk.steps * kStep);
    offsets = parts.offsets, nested_scales = parts.nested_scales, nested_offsets = parts.nested_offsets;
    for (int j = 0; j < NP; ++j) heads[j] = chunk.head[panel + j];
  }
  static constexpr bool has_offsets() { return OFFSETS; }
  AT FORCE_INLINE void nest(int64_t index) {
    UNROLL
    for (int j = 0; j < NP; ++j) {
      factor[j] = halves(heads[j] + nested_scales + index * kPanel * 2);
      if (OFFSETS) off[j] = _mm512_mul_ps(halves(heads[j] + nested_offsets + index * kPanel * 2), _mm512_set1_ps(-1.0f));
    }
  }
  AT FORCE_INLINE __m512 scale(int j, int64_t index) const {
    const uint8_t* from = heads[j] + index * kPanel;
    return _mm512_mul_ps(SCALE == Scale::kNestedS8 ? signed_bytes(from) : bytes(from), factor[j]);
  }
  AT FORCE_INLINE __m512 offset(int j, int64_t step) const {
    return _mm512_mul_ps(bytes(heads[j] + offsets + step * kPanel), off[j]);
  }
};

// Whether there is a `Nested` for it, and few rows.
bool widens(const Form& form, int64_t rows) {
  return stored(rows) && form.table == Table::kNone && form.power == 0 &&
         ((form.bits == 4 && form.block == kStep && form.scale == Scale::kNestedU8 && form.offset == Scale::kNestedU8) ||
          (form.bits == 6 && form.block == 16 && form.scale == Scale::kNestedS8 && form.offset == Scale::kNone));
}

// MR rows x NP panels of one chunk, from a panel on. PARTS: scales of 16 inputs (2) or 32 (1) a step. A step's own scale is a power of
// two, which is added to an exponent by units that multiplications leave free; a nest's is multiplied with at its end.
template <typename K, int MR, int NP>
AT void rows(const Tile& t, const Chunk& chunk, int panel, int64_t row, const uint8_t* ahead, float* sums) {
  constexpr int BITS = K::kBits, PARTS = K::kParts, PLANES = K::kPlanes;
  constexpr bool TABLE = K::kTable;
  constexpr bool kUpper = BITS == 4 && !TABLE && MR == 1;  // upper halves have sums of their own, 16 times too large
  using Read = Reader<BITS, TABLE, kUpper>;
  constexpr int kLoads = kStep / 4 / Read::kQuads / PARTS;
  const int64_t line = chunk.line;
  const int zero = chunk.form->zero >> 8 * (PLANES - 1);
  const __m128i times_zero = _mm_cvtsi32_si128(zero == 0 ? 0 : __builtin_ctz(static_cast<uint32_t>(zero)));
  typename K::template Scales<NP> scales(chunk, panel);
  const bool offsets = scales.has_offsets();
  __m512i table = _mm512_setzero_si512();
  if (TABLE) {
    alignas(16) uint8_t entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = static_cast<uint8_t>(entry(*chunk.form, i));
    table = four_times(entries);
  }
  const uint8_t* w = chunk.values[panel];
  const int64_t next_panel = NP == 1 ? 0 : chunk.values[panel + 1] - w;
  // Nothing of this is handed from call to call in memory: that would wait for all loads before it.
  const uint8_t* const end = chunk.end;
  const int64_t each = chunk.each;
  const Nest* a = t.a.row(t.first_row + row) + chunk.first_step / kSteps;
  const int64_t stride = t.a.stride;
  const auto at = [=](const Nest* nest, int i) {
    return reinterpret_cast<const Nest*>(reinterpret_cast<const uint8_t*>(nest) + i * stride);
  };
  for (int64_t first = 0; first < chunk.steps; first += kSteps, ++a) {
    const int64_t steps = std::min<int64_t>(kSteps, chunk.steps - first);
    scales.nest(first / kSteps);
    __m512 total[MR][NP];
    UNROLL
    for (int i = 0; i < MR; ++i) {
      UNROLL
      for (int j = 0; j < NP; ++j) total[i][j] = _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < steps; ++step) {
      if (NP < kPanels && ahead < end) {
        for (const uint8_t* const last = ahead + each; ahead < last; ahead += kLine) __builtin_prefetch(ahead, 0, 2);
      }
      UNROLL
      for (int part = 0; part < PARTS; ++part) {
        __m512i product[MR][NP], upper[NP];
        UNROLL
        for (int i = 0; i < MR; ++i) {
          __m512i start = _mm512_setzero_si512();
          if (zero != 0) {
            const int32_t* minus = at(a, i)->step[step].minus_sum;
            start = _mm512_set1_epi32(minus[part]);
            if (PARTS == 1) start = _mm512_add_epi32(start, _mm512_set1_epi32(minus[1]));
            start = _mm512_sll_epi32(start, times_zero);
          }
          UNROLL
          for (int j = 0; j < NP; ++j) product[i][j] = start;
        }
        UNROLL
        for (int j = 0; j < NP; ++j) upper[j] = _mm512_setzero_si512();
        UNROLL
        for (int load = 0; load < PLANES * kLoads; ++load) {
          if (load == kLoads) {
            UNROLL
            for (int i = 0; i < MR; ++i) {
              UNROLL
              for (int j = 0; j < NP; ++j) product[i][j] = _mm512_slli_epi32(product[i][j], 8);
            }
            w += chunk.plane - kLoads * Read::kLines * line;
          }
          __m512i value[NP][Read::kQuads];
          UNROLL
          for (int j = 0; j < NP; ++j) Read::load(w + j * next_panel, line, table, value[j]);
          w += Read::kLines * line;
          UNROLL
          for (int quad = 0; quad < Read::kQuads; ++quad) {
            UNROLL
            for (int i = 0; i < MR; ++i) {
              int32_t four;
              std::memcpy(&four, at(a, i)->step[step].value + part * 16 + (load % kLoads * Read::kQuads + quad) * 4, 4);
              const __m512i activation = _mm512_set1_epi32(four);
              UNROLL
              for (int j = 0; j < NP; ++j) {
                __m512i& sum = kUpper && quad == 1 ? upper[j] : product[i][j];
                sum = _mm512_dpbusd_epi32(sum, value[j][quad], activation);
              }
            }
          }
        }
        if (PLANES == 2) w -= chunk.plane;
        __m512 scale[NP];
        UNROLL
        for (int j = 0; j < NP; ++j) {
          if (kUpper) product[0][j] = _mm512_add_epi32(product[0][j], _mm512_srai_epi32(upper[j], 4));
          scale[j] = scales.scale(j, (first + step) * PARTS + part);
        }
        UNROLL
        for (int i = 0; i < MR; ++i) {
          const __m512i power = _mm512_set1_epi32(at(a, i)->step[step].power);
          UNROLL
          for (int j = 0; j < NP; ++j) {
            const __m512i whole = _mm512_castps_si512(_mm512_cvtepi32_ps(product[i][j]));
            total[i][j] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_add_epi32(whole, power)), scale[j], total[i][j]);
          }
        }
      }
      if (!offsets) continue;
      UNROLL
      for (int j = 0; j < NP; ++j) {
        const __m512 offset = scales.offset(j, first + step);
        UNROLL
        for (int i = 0; i < MR; ++i) {
          total[i][j] = _mm512_fmadd_ps(offset, _mm512_set1_ps(at(a, i)->step[step].sum), total[i][j]);
        }
      }
    }
    UNROLL
    for (int i = 0; i < MR; ++i) {
      const __m512 unit = _mm512_set1_ps(at(a, i)->unit);
      UNROLL
      for (int j = 0; j < NP; ++j) {
        float* to = sums + (i * t.panels + j) * kPanel;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(total[i][j], unit, _mm512_loadu_ps(to)));
      }
    }
  }
}

// How many of the rows that are left are taken at once, in blocks of about one size: with few of them dot products wait for each other.
int64_t next_rows(int64_t left, int64_t most) { return ceil_div(left, ceil_div(left, most)); }

// All rows of one panel or two.
template <typename K, int NP>
void all_rows(const Tile& t, const Chunk& chunk, float* sums) {
  // Six rows read values less often, which matters where they are taken apart each time; five need no copies of registers.
  const int64_t most_rows = chunk.stored && K::kParts == 1 ? kMostRows : 5;
  const uint8_t* ahead = chunk.ahead;
  for (int64_t row = 0; row < t.rows; ahead += chunk.each * chunk.steps) {
    const int64_t now = next_rows(t.rows - row, most_rows);
    float* to = sums + row * t.panels * kPanel;
    switch (now) {
      case 6: rows<K, 6, NP>(t, chunk, 0, row, ahead, to); break;
      case 5: rows<K, 5, NP>(t, chunk, 0, row, ahead, to); break;
      case 4: rows<K, 4, NP>(t, chunk, 0, row, ahead, to); break;
      case 3: rows<K, 3, NP>(t, chunk, 0, row, ahead, to); break;
      case 2: rows<K, 2, NP>(t, chunk, 0, row, ahead, to); break;
      default: rows<K, 1, NP>(t, chunk, 0, row, ahead, to); break;
    }
    row += now;
  }
}

template <typename K>
void multiply_as(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (panels == 4) {
    t.rows == 1 ? rows<K, 1, 4>(t, chunk, 0, 0, nullptr, sums) : rows<K, 2, 4>(t, chunk, 0, 0, nullptr, sums);
  } else {
    panels == 2 ? all_rows<K, 2>(t, chunk, sums) : all_rows<K, 1>(t, chunk, sums);
  }
}

// What a form's products are compiled for.
template <int BITS, bool TABLE, int PARTS, int PLANES = 1>
struct Kind {
  static constexpr int kBits = BITS, kParts = PARTS, kPlanes = PLANES;
  static constexpr bool kTable = TABLE;
  template <int NP>
  using Scales = Widened<NP>;
};
struct Q4K : Kind<4, false, 1> {
  template <int NP>
  using Scales = Nested<Scale::kNestedU8, true, NP>;
};
struct Q6K : Kind<6, false, 2> {
  template <int NP>
  using Scales = Nested<Scale::kNestedS8, false, NP>;
};

template <int BITS, bool TABLE>
void multiply_parts(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (chunk.form->block < kStep) return multiply_as<Kind<BITS, TABLE, 2>>(t, chunk, panels, sums);
  multiply_as<Kind<BITS, TABLE, 1>>(t, chunk, panels, sums);
}

void multiply(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (planes(*chunk.form) == 2) return multiply_as<Kind<8, false, 1, 2>>(t, chunk, panels, sums);
  if (!chunk.stored) return multiply_parts<8, false>(t, chunk, panels, sums);
  if (chunk.widened) {
    return chunk.form->bits == 4 ? multiply_as<Q4K>(t, chunk, panels, sums) : multiply_as<Q6K>(t, chunk, panels, sums);
  }
  if (chunk.form->bits == 8) return multiply_parts<8, false>(t, chunk, panels, sums);
  if (chunk.form->bits == 6) return multiply_parts<6, false>(t, chunk, panels, sums);
  if (chunk.form->table != Table::kNone) return multiply_parts<4, true>(t, chunk, panels, sums);
  multiply_parts<4, false>(t, chunk, panels, sums);
}

#include "blocks/blocks_kernels.h"

// `choose_scales` and `round_row` by hand: left to the compiler they take six times as long, a tenth of eight rows' products. The same
// numbers.
AT Scales choose_fast(const float (&peak)[kSteps]) {
  const __m256 peaks = _mm256_loadu_ps(peak);
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(peaks), _mm256_extractf128_ps(peaks, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  const float largest = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  if (!(largest > kLeast) || !(largest < __builtin_inff())) return choose_scales(peak);
  const __m256 sizes = _mm256_mul_ps(peaks, _mm256_set1_ps(1.0f / largest)), least = _mm256_set1_ps(kCandidate);
  const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_max_ps(sizes, least));
  float size[kSteps];
  _mm256_storeu_ps(size, sizes);
  __m256 cost = _mm256_setzero_ps();
  UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_set1_ps(size[step]), inverse));
    const __m256i power = _mm256_and_si256(_mm256_add_epi32(bits, _mm256_set1_epi32(kUp)), _mm256_set1_epi32(0x7f800000));
    const __m256 scale = _mm256_mul_ps(_mm256_castsi256_ps(power), sizes);
    cost = _mm256_add_ps(cost, _mm256_mul_ps(scale, scale));
  }
  cost = _mm256_blendv_ps(_mm256_set1_ps(__builtin_inff()), cost, _mm256_cmp_ps(sizes, least, _CMP_GT_OQ));
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(cost), _mm256_extractf128_ps(cost, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  low = _mm_min_ss(low, _mm_movehdup_ps(low));
  const int same = _mm256_movemask_ps(_mm256_cmp_ps(cost, _mm256_broadcastss_ps(low), _CMP_EQ_OQ));
  return scales_of(size, size[__builtin_ctz(static_cast<uint32_t>(same))], largest);
}

AT void round_fast(const Rounding& r, int64_t row) {
  constexpr int kVectors = kNest / kPanel;
  const float* x = r.x + row * r.width;
  Nest* to = r.to.row(row);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t nest = 0; nest < r.to.nests; ++nest) {
    __m512 value[kVectors];
    const bool whole = (nest + 1) * kNest <= r.width;
    UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = nest * kNest + i * kPanel, left = r.width - at;
      const __mmask16 mask = whole || left >= kPanel ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      value[i] = _mm512_maskz_loadu_ps(mask, x + at);
      if (r.gain == nullptr) continue;
      squares = _mm512_add_ps(squares, _mm512_mul_ps(value[i], value[i]));
      value[i] = _mm512_mul_ps(value[i], _mm512_maskz_loadu_ps(mask, r.gain + at));
    }
    if (r.rotated) {
      alignas(64) float group[kNest];
      UNROLL
      for (int i = 0; i < kVectors; ++i) _mm512_store_ps(group + i * kPanel, value[i]);
      for (int i = 0; i < kNest; i += int8::kGroup) int8::rotate_group(group + i);
      UNROLL
      for (int i = 0; i < kVectors; ++i) value[i] = _mm512_load_ps(group + i * kPanel);
    }
    float peak[kSteps];
    UNROLL
    for (int i = 0; i < kSteps; ++i) {
      peak[i] = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(value[2 * i]), _mm512_abs_ps(value[2 * i + 1])));
    }
    const Scales scales = choose_fast(peak);
    UNROLL
    for (int i = 0; i < kSteps; ++i) {
      Step& step = to[nest].step[i];
      const __m512 inverse = _mm512_set1_ps(scales.inverse * from_bits((127 << 23) - scales.power[i]));
      const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(value[2 * i], inverse));
      const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(value[2 * i + 1], inverse));
      const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(first)), _mm512_cvtepi32_epi8(second), 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(step.value), all);
      __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), all);
      sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
      sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
      const int32_t lower = _mm256_cvtsi256_si32(sums), upper = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
      step.minus_sum[0] = -lower;
      step.minus_sum[1] = -upper;
      step.power = scales.power[i];
      step.sum = static_cast<float>(lower + upper) * from_bits((127 << 23) + scales.power[i]);
    }
    to[nest].unit = scales.unit * (r.rotated ? int8::kRotation : 1.0f);
  }
  if (r.gain == nullptr) return;
  alignas(64) float lanes[kPanel];
  _mm512_store_ps(lanes, squares);
  float all = 0.0f;
  for (int j = 0; j < kPanel; ++j) all += lanes[j];
  const float norm = 1.0f / std::sqrt(all / static_cast<float>(r.width) + r.eps);
  for (int64_t nest = 0; nest < r.to.nests; ++nest) to[nest].unit *= norm;
}
#undef AT

}  // namespace

const Kernels kVnniKernels = {tile, round_fast, channel};

}  // namespace jaxserve::blocks

#endif
