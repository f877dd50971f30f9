// AVX-512 with VNNI: unsigned values times signed activations, which are broadcast from memory. Values are multiplied as they are
// stored, two dot products from one load of four bits: taking bits apart fills ports that dot products leave free. One or two rows,
// which wait for memory, take four panels at once; more of them up to eight rows x one panel, or four to six x two, of integer and of
// float sums in registers.
// What ports are there for: dot products and all other multiplications have two, which are the limit; conversions and additions of
// floats two others; additions of integers and whatever takes bits apart all four.

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
AT FORCE_INLINE void gate(const float* gates, const float* ups, Activation activation, float* out) {
  _mm512_storeu_ps(out, _mm512_mul_ps(gate512(_mm512_loadu_ps(gates), static_cast<int>(activation)), _mm512_loadu_ps(ups)));
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

int most(int64_t rows) { return rows <= 2 ? 4 : 2; }

constexpr int64_t kMany = 24;  // rows from which a chunk's values and scales are unpacked once for all of them

bool stored(int64_t rows) { return rows < kMany; }

#include "blocks/blocks_read.h"

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
template <int NP>
struct Nested {
  const uint8_t* heads[NP];
  int64_t offsets, nested_scales, nested_offsets;
  __m512 factor[NP], off[NP];
  AT Nested(const Chunk& chunk, int panel) {
    const Parts parts(*chunk.form, chunk.steps * kStep);
    offsets = parts.offsets, nested_scales = parts.nested_scales, nested_offsets = parts.nested_offsets;
    for (int j = 0; j < NP; ++j) heads[j] = chunk.head[panel + j];
  }
  static constexpr bool has_offsets() { return true; }
  AT FORCE_INLINE void nest(int64_t index) {
    UNROLL
    for (int j = 0; j < NP; ++j) {
      factor[j] = halves(heads[j] + nested_scales + index * kPanel * 2);
      off[j] = _mm512_mul_ps(halves(heads[j] + nested_offsets + index * kPanel * 2), _mm512_set1_ps(-1.0f));
    }
  }
  AT FORCE_INLINE __m512 scale(int j, int64_t index) const {
    return _mm512_mul_ps(bytes(heads[j] + index * kPanel), factor[j]);
  }
  AT FORCE_INLINE __m512 offset(int j, int64_t step) const {
    return _mm512_mul_ps(bytes(heads[j] + offsets + step * kPanel), off[j]);
  }
};

// Integer scales of 16 inputs, two a step, which multiply two sums of 16 bits at once; what they are nested in comes at a nest's end.
template <int NP>
struct Paired {
  const uint8_t* heads[NP];
  int64_t nested_scales;
  __m512 factor[NP];
  AT Paired(const Chunk& chunk, int panel) {
    nested_scales = Parts(*chunk.form, chunk.steps * kStep).nested_scales;
    for (int j = 0; j < NP; ++j) heads[j] = chunk.head[panel + j];
  }
  static constexpr bool has_offsets() { return false; }
  AT FORCE_INLINE void nest(int64_t index) {
    UNROLL
    for (int j = 0; j < NP; ++j) factor[j] = halves(heads[j] + nested_scales + index * kPanel * 2);
  }
  // Of each channel the second half's, and above it the first's.
  AT FORCE_INLINE __m512i scale(int j, int64_t step) const {
    const __m128i* from = reinterpret_cast<const __m128i*>(heads[j] + 2 * step * kPanel);
    const __m128i first = _mm_loadu_si128(from), second = _mm_loadu_si128(from + 1);
    const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi8(second, first));
    return _mm512_cvtepi8_epi16(_mm256_inserti128_si256(low, _mm_unpackhi_epi8(second, first), 1));
  }
};

constexpr int kPairedZero = 5;  // as a power of two

bool paired(const Form& form) {
  return form.bits == 6 && form.block == 16 && form.zero == 1 << kPairedZero && form.scale == Scale::kNestedS8 &&
         form.offset == Scale::kNone && form.power == 0;
}

// Whether there is a `Paired` for it, or a `Nested` and few rows.
bool widens(const Form& form, int64_t rows) {
  return paired(form) || (stored(rows) && form.table == Table::kNone && form.power == 0 && form.bits == 4 &&
                          form.block == kStep && form.scale == Scale::kNestedU8 && form.offset == Scale::kNestedU8);
}

// MR rows x NP panels of one chunk, from a panel on. PARTS: scales of 16 inputs (2) or 32 (1) a step.
template <typename K, int MR, int NP>
AT void rows(const Tile& t, const Chunk& chunk, int panel, int64_t row, const uint8_t* ahead, float* sums) {
  constexpr int BITS = K::kBits, PARTS = K::kParts, PLANES = K::kPlanes;
  constexpr bool TABLE = K::kTable, PAIRED = K::kPaired;
  constexpr bool kUpper = BITS == 4 && !TABLE && MR == 1;  // upper halves have sums of their own, 16 times too large
  using Read = Reader<BITS, TABLE, kUpper>;
  constexpr int kLoads = kStep / 4 / Read::kQuads / PARTS;
  constexpr int32_t kSign = 1 << 15;
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
  const int64_t each = chunk.each, stride = t.a.stride;
  const Step* a = &t.a.step(t.first_row + row, chunk.first_step);
  const auto at = [&](int i) -> const Step& {
    return *reinterpret_cast<const Step*>(reinterpret_cast<const uint8_t*>(a) + i * stride);
  };
  __m512 total[MR][NP];  // of a nest where scales are paired
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) {
      total[i][j] = PAIRED ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (i * t.panels + j) * kPanel);
    }
  }
  for (int64_t step = 0; step < chunk.steps; ++step, ++a) {
    if (step % kSteps == 0) scales.nest(step / kSteps);
    if (NP < kPanels && ahead < end) {
      for (const uint8_t* const last = ahead + each; ahead < last; ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    }
    __m512i product[MR][NP];
    UNROLL
    for (int part = 0; part < PARTS; ++part) {
      __m512i upper[NP];
      UNROLL
      for (int i = 0; i < MR; ++i) {
        __m512i start = _mm512_setzero_si512();
        if (zero != 0) {
          start = _mm512_set1_epi32(at(i).minus_sum[part]);
          if (PARTS == 1) start = _mm512_add_epi32(start, _mm512_set1_epi32(at(i).minus_sum[1]));
          // Shifts by what a register says take ports from dot products.
          start = PAIRED ? _mm512_slli_epi32(start, kPairedZero) : _mm512_sll_epi32(start, times_zero);
        }
        if (PAIRED && part == 1) start = _mm512_add_epi32(start, _mm512_set1_epi32(kSign));
        UNROLL
        for (int j = 0; j < NP; ++j) {
          // The first half's sum moves into the upper 16 bits, and the second's, made positive, comes below it.
          product[i][j] = PAIRED && part == 1 ? _mm512_add_epi32(_mm512_slli_epi32(product[i][j], 16), start) : start;
        }
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
        if constexpr (BITS == 6 && NP == kPanels) {
          // In the order in which they lie: three lines of each panel in turn upset what fetches memory ahead.
          __m512i lines[Read::kLines * NP];
          UNROLL
          for (int i = 0; i < Read::kLines * NP; ++i) lines[i] = load_next(w + i * kLine);
          UNROLL
          for (int j = 0; j < NP; ++j) Read::split(lines[j], lines[NP + j], lines[2 * NP + j], value[j]);
        } else {
          UNROLL
          for (int j = 0; j < NP; ++j) Read::load(w + j * next_panel, line, table, value[j]);
        }
        w += Read::kLines * line;
        UNROLL
        for (int quad = 0; quad < Read::kQuads; ++quad) {
          UNROLL
          for (int i = 0; i < MR; ++i) {
            int32_t four;
            std::memcpy(&four, at(i).value + part * 16 + (load % kLoads * Read::kQuads + quad) * 4, 4);
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
      if (PAIRED && part == 0) continue;
      UNROLL
      for (int j = 0; j < NP; ++j) {
        if (kUpper) product[0][j] = _mm512_add_epi32(product[0][j], _mm512_srai_epi32(upper[j], 4));
        if constexpr (PAIRED) {
          const __m512i scale = scales.scale(j, step);
          UNROLL
          for (int i = 0; i < MR; ++i) {
            const __m512i both = _mm512_xor_si512(product[i][j], _mm512_set1_epi32(kSign));
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(_mm512_setzero_si512(), both, scale));
            total[i][j] = _mm512_fmadd_ps(whole, _mm512_set1_ps(at(i).scale), total[i][j]);
          }
        } else {
          const __m512 scale = scales.scale(j, step * PARTS + part);
          UNROLL
          for (int i = 0; i < MR; ++i) {
            const __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(product[i][j]), _mm512_set1_ps(at(i).scale));
            total[i][j] = _mm512_fmadd_ps(whole, scale, total[i][j]);
          }
        }
      }
    }
    if constexpr (PAIRED) {
      if (step % kSteps != kSteps - 1 && step != chunk.steps - 1) continue;
      UNROLL
      for (int i = 0; i < MR; ++i) {
        UNROLL
        for (int j = 0; j < NP; ++j) {
          float* to = sums + (i * t.panels + j) * kPanel;
          _mm512_storeu_ps(to, _mm512_fmadd_ps(total[i][j], scales.factor[j], _mm512_loadu_ps(to)));
          total[i][j] = _mm512_setzero_ps();
        }
      }
    } else {
      if (!offsets) continue;
      UNROLL
      for (int j = 0; j < NP; ++j) {
        const __m512 offset = scales.offset(j, step);
        UNROLL
        for (int i = 0; i < MR; ++i) total[i][j] = _mm512_fmadd_ps(offset, _mm512_set1_ps(at(i).sum), total[i][j]);
      }
    }
  }
  if (PAIRED) return;
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) _mm512_storeu_ps(sums + (i * t.panels + j) * kPanel, total[i][j]);
  }
}

#include "blocks/blocks_crossed.h"
#include "blocks/blocks_few.h"

// How many of the rows that are left are taken at once, in blocks of about one size: with few of them dot products wait for each other.
int64_t next_rows(int64_t left, int64_t most) { return ceil_div(left, ceil_div(left, most)); }

// Rows that are taken at once. Of values that are taken apart on the way as many as registers have room for, of one panel if they are
// crossed, else of two; five of others need no copies of registers, but with paired scales six are faster with some than five without.
int64_t most_rows(const Form& form, bool as_stored) {
  if (!as_stored) return paired(form) ? 6 : 5;
  return form.block < kStep ? 5 : crossed(form) ? 8 : 6;
}

int64_t passes(const Form& form, int64_t rows, bool as_stored) {
  if (as_stored && few(form, rows)) return 2;
  return (as_stored && crossed(form) ? 2 : 1) * ceil_div(rows, most_rows(form, as_stored));
}

// All rows of one panel or two, by fn(rows at once, first row, where memory is asked for from on).
template <typename F>
FORCE_INLINE const uint8_t* in_blocks(const Tile& t, const Chunk& chunk, const uint8_t* ahead, F fn) {
  const int64_t most = most_rows(*chunk.form, chunk.stored);
  for (int64_t row = 0, now; row < t.rows; row += now, ahead += chunk.each * chunk.steps) {
    now = next_rows(t.rows - row, most);
    fn(now, row, ahead);
  }
  return ahead;
}

template <typename K, int NP>
void all_rows(const Tile& t, const Chunk& chunk, float* sums) {
  in_blocks(t, chunk, chunk.ahead, [&](int64_t now, int64_t row, const uint8_t* ahead) {
    float* to = sums + row * t.panels * kPanel;
    if constexpr (!K::kCrossed) {
      switch (now) {
        case 6: return rows<K, 6, NP>(t, chunk, 0, row, ahead, to);
        case 5: return rows<K, 5, NP>(t, chunk, 0, row, ahead, to);
        case 4: return rows<K, 4, NP>(t, chunk, 0, row, ahead, to);
        case 3: return rows<K, 3, NP>(t, chunk, 0, row, ahead, to);
      }
    }
    now == 2 ? rows<K, 2, NP>(t, chunk, 0, row, ahead, to) : rows<K, 1, NP>(t, chunk, 0, row, ahead, to);
  });
}

// Crossed, as stored.
template <typename K>
void all_crossed(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  using From = Stored<1>;
  using By = typename K::template Scales<1>;
  const uint8_t* next = chunk.ahead;
  for (int panel = 0; panel < panels; ++panel, sums += kPanel) {
    next = in_blocks(t, chunk, next, [&](int64_t now, int64_t row, const uint8_t* ahead) {
      float* to = sums + row * t.panels * kPanel;
      switch (now) {
        case 8: return crossed_rows<From, By, 8, 1>(t, chunk, panel, row, ahead, to);
        case 7: return crossed_rows<From, By, 7, 1>(t, chunk, panel, row, ahead, to);
        case 6: return crossed_rows<From, By, 6, 1>(t, chunk, panel, row, ahead, to);
        case 5: return crossed_rows<From, By, 5, 1>(t, chunk, panel, row, ahead, to);
        case 4: return crossed_rows<From, By, 4, 1>(t, chunk, panel, row, ahead, to);
        default: return crossed_rows<From, By, 3, 1>(t, chunk, panel, row, ahead, to);
      }
    });
  }
}

// Crossed and unpacked: `groups` times MR rows, one behind the other.
template <int MR, int NP>
AT __attribute__((flatten)) void in_groups(const Tile& t, const Chunk& chunk, int64_t groups, int64_t row, const uint8_t* ahead, float* sums) {
  for (; groups > 0; --groups, row += MR, ahead += chunk.each * chunk.steps) {
    crossed_rows<Unpacked<NP>, Widened<NP>, MR, NP>(t, chunk, 0, row, ahead, sums + row * t.panels * kPanel);
  }
}

template <int NP>
void all_unpacked(const Tile& t, const Chunk& chunk, float* sums) {
  constexpr int kMost = 5;
  // As many groups of five as leave none of less than four, if any.
  const int64_t blocks = ceil_div(t.rows, kMost), fours = blocks * kMost - t.rows, pass = chunk.each * chunk.steps;
  if (fours <= blocks) {
    in_groups<5, NP>(t, chunk, blocks - fours, 0, chunk.ahead, sums);
    return in_groups<4, NP>(t, chunk, fours, (blocks - fours) * kMost, chunk.ahead + (blocks - fours) * pass, sums);
  }
  in_blocks(t, chunk, chunk.ahead, [&](int64_t now, int64_t row, const uint8_t* ahead) {
    switch (now) {
      case 5: return in_groups<5, NP>(t, chunk, 1, row, ahead, sums);
      case 4: return in_groups<4, NP>(t, chunk, 1, row, ahead, sums);
      case 3: return in_groups<3, NP>(t, chunk, 1, row, ahead, sums);
      case 2: return in_groups<2, NP>(t, chunk, 1, row, ahead, sums);
      default: return in_groups<1, NP>(t, chunk, 1, row, ahead, sums);
    }
  });
}

template <typename K>
void multiply_as(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (panels == 4) return t.rows == 1 ? rows<K, 1, 4>(t, chunk, 0, 0, nullptr, sums) : rows<K, 2, 4>(t, chunk, 0, 0, nullptr, sums);
  if constexpr (K::kCrossed) {
    if (few(*chunk.form, t.rows)) return few_crossed<typename K::template Scales<1>>(t, chunk, panels, sums);
    if (t.rows > 2) return all_crossed<K>(t, chunk, panels, sums);
  }
  if constexpr (K::kPaired && K::kBits == 6) {
    if (few(*chunk.form, t.rows)) return all_few<FewPaired>(t, chunk, panels, sums);
  }
  panels == 2 ? all_rows<K, 2>(t, chunk, sums) : all_rows<K, 1>(t, chunk, sums);
}

// What a form's products are compiled for.
template <int BITS, bool TABLE, int PARTS, int PLANES = 1>
struct Kind {
  static constexpr int kBits = BITS, kParts = PARTS, kPlanes = PLANES;
  static constexpr bool kTable = TABLE, kPaired = false, kCrossed = BITS == 4 && !TABLE && PARTS == 1;
  template <int NP>
  using Scales = Widened<NP>;
};
struct Q4K : Kind<4, false, 1> {
  template <int NP>
  using Scales = Nested<NP>;
};
template <int BITS>
struct Q6K : Kind<BITS, false, 2> {
  static constexpr bool kPaired = true;
  template <int NP>
  using Scales = Paired<NP>;
};

template <int BITS, bool TABLE>
void multiply_parts(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (chunk.form->block < kStep) return multiply_as<Kind<BITS, TABLE, 2>>(t, chunk, panels, sums);
  multiply_as<Kind<BITS, TABLE, 1>>(t, chunk, panels, sums);
}

void multiply(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (planes(*chunk.form) == 2) return multiply_as<Kind<8, false, 1, 2>>(t, chunk, panels, sums);
  if (!chunk.stored && crossed(*chunk.form)) return panels == 2 ? all_unpacked<2>(t, chunk, sums) : all_unpacked<1>(t, chunk, sums);
  if (!chunk.stored) return chunk.widened ? multiply_as<Q6K<8>>(t, chunk, panels, sums) : multiply_parts<8, false>(t, chunk, panels, sums);
  if (chunk.widened) {
    return chunk.form->bits == 4 ? multiply_as<Q4K>(t, chunk, panels, sums) : multiply_as<Q6K<6>>(t, chunk, panels, sums);
  }
  if (chunk.form->bits == 8) return multiply_parts<8, false>(t, chunk, panels, sums);
  if (chunk.form->bits == 6) return multiply_parts<6, false>(t, chunk, panels, sums);
  if (chunk.form->table != Table::kNone) return multiply_parts<4, true>(t, chunk, panels, sums);
  multiply_parts<4, false>(t, chunk, panels, sums);
}

#include "blocks/blocks_kernels.h"
#include "blocks/blocks_rounding.h"
#undef AT
#undef KEEP

}  // namespace

const Kernels kVnniKernels = {tile, round_fast, channel};

}  // namespace jaxserve::blocks

#endif
