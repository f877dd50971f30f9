// Products of values of four bits, crossed: half of the dot products, and two additions of bytes for each that is saved. Included by
// blocks_vnni.cc, inside its namespace.
//
// For activations a, c and values v, w of four bits (S. Winograd, 1968)
//   (a + 128 + w) (c + v) = a v + c w + (a + 128) c + (128 + w) v,
// where the first factor is a byte without sign and the second one with, as activations are -127 to 112. What is too much depends on
// the row alone, which `Step::start` takes off, or on the channel alone: `cross`. Dot products have two ports of four, additions of
// bytes all of them; of the four pairs of quads that a step has the first is multiplied as it is, so that both are as busy. All of
// it is exact. Sums begin with the bits of kMagic, so that as floats they are kMagic more.

constexpr int32_t kMagicBits = 0x4b400000;
constexpr int kPairs = kStep / kPair;

bool crossed(const Form& form) { return form.bits == 4 && form.table == Table::kNone && form.block >= kStep; }

// Values of a panel, `line` bytes from one of its lines to the next, unpacked to [inputs / 4][16][4] as `Unpacked` reads them, and for
// each step what their products have too much.
AT void unpack_crossed(const uint8_t* from, int64_t line, int64_t inputs, uint8_t* values, int32_t* out) {
  const __m512i high = _mm512_set1_epi8(-128), low = _mm512_set1_epi8(15);
  for (int64_t step = 0; step < inputs / kStep; ++step, out += kPanel) {
    __m512i sum = _mm512_set1_epi32(kMagicBits);
    UNROLL
    for (int pair = 0; pair < kPairs; ++pair, from += line, values += 2 * kLine) {
      const __m512i both = _mm512_loadu_si512(from), shifted = _mm512_srli_epi16(both, 4), lower = _mm512_and_si512(both, low);
      const __m512i upper = pair == 0 ? _mm512_and_si512(shifted, low) : _mm512_ternarylogic_epi32(shifted, low, high, 0xea);
      if (pair != 0) sum = _mm512_dpbusd_epi32(sum, upper, lower);
      _mm512_store_si512(values, lower);
      _mm512_store_si512(values + kLine, upper);
    }
    _mm512_store_si512(out, sum);
  }
}

// Values of one panel or two as they are stored, taken apart on the way.
template <int NP>
struct Stored {
  static constexpr int kLines = 1;
  __m512i sum[NP];
  AT FORCE_INLINE void begin(const Chunk&, int, int64_t) {
    UNROLL
    for (int j = 0; j < NP; ++j) sum[j] = _mm512_set1_epi32(kMagicBits);
  }
  AT FORCE_INLINE void load(int j, const uint8_t* from, int64_t, int pair, __m512i& lower, __m512i& upper) {
    const __m512i both = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15), shifted = _mm512_srli_epi16(both, 4);
    lower = _mm512_and_si512(both, low);
    if (pair == 0) {
      upper = _mm512_and_si512(shifted, low);
    } else {
      upper = _mm512_ternarylogic_epi32(shifted, low, _mm512_set1_epi8(-128), 0xea);  // (a & b) | c
      sum[j] = _mm512_dpbusd_epi32(sum[j], upper, lower);
    }
  }
};

// The same after `unpack_crossed`.
template <int NP>
struct Unpacked {
  static constexpr int kLines = 2;
  __m512i sum[NP];
  AT FORCE_INLINE void begin(const Chunk& chunk, int panel, int64_t step) {
    UNROLL
    for (int j = 0; j < NP; ++j) sum[j] = _mm512_load_si512(chunk.cross[panel + j] + step * kPanel);
  }
  AT FORCE_INLINE void load(int, const uint8_t* from, int64_t line, int, __m512i& lower, __m512i& upper) {
    lower = _mm512_loadu_si512(from);
    upper = _mm512_loadu_si512(from + line);
  }
};

// MR rows x NP panels of one chunk, from a panel on: the same numbers as `rows` has.
template <typename VALUES, typename SCALES, int MR, int NP>
AT void crossed_rows(const Tile& t, const Chunk& chunk, int panel, int64_t row, const uint8_t* ahead, float* sums) {
  const int64_t line = chunk.line, stride = t.a.stride, each = chunk.each;
  const uint8_t* const end = chunk.end;
  const int zero = chunk.form->zero;
  const __m128i times_zero = _mm_cvtsi32_si128(zero == 0 ? 0 : __builtin_ctz(static_cast<uint32_t>(zero)));
  const uint8_t* w = chunk.values[panel];
  const int64_t next_panel = NP == 1 ? 0 : chunk.values[panel + 1] - w;
  SCALES scales(chunk, panel);
  VALUES values;
  const bool offsets = scales.has_offsets();
  const Step* a = &t.a.step(t.first_row + row, chunk.first_step);
  const auto at = [&](int i) -> const Step& {
    return *reinterpret_cast<const Step*>(reinterpret_cast<const uint8_t*>(a) + i * stride);
  };
  __m512 total[MR][NP];
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) total[i][j] = _mm512_loadu_ps(sums + (i * t.panels + j) * kPanel);
  }
  for (int64_t step = 0; step < chunk.steps; ++step, ++a) {
    if (step % kSteps == 0) scales.nest(step / kSteps);
    if (ahead < end) {
      for (const uint8_t* const last = ahead + each; ahead < last; ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    }
    __m512i product[MR][NP];
    UNROLL
    for (int i = 0; i < MR; ++i) {
      __m512i start = _mm512_set1_epi32(at(i).start);
      if (zero != 0) {
        const __m512i minus = _mm512_set1_epi32(at(i).minus_sum[0] + at(i).minus_sum[1]);
        start = _mm512_add_epi32(start, _mm512_sll_epi32(minus, times_zero));
      }
      UNROLL
      for (int j = 0; j < NP; ++j) product[i][j] = start;
    }
    values.begin(chunk, panel, step);
    UNROLL
    for (int pair = 0; pair < kPairs; ++pair, w += VALUES::kLines * line) {
      __m512i lower[NP], upper[NP];
      UNROLL
      for (int j = 0; j < NP; ++j) values.load(j, w + j * next_panel, line, pair, lower[j], upper[j]);
      UNROLL
      for (int i = 0; i < MR; ++i) {
        // Two loads: of one of eight bytes the compiler would make registers of the other kind, and of these vectors.
        int32_t four, next;
        std::memcpy(&four, at(i).value + pair * kPair, 4);
        std::memcpy(&next, at(i).value + pair * kPair + 4, 4);
        const __m512i first = _mm512_set1_epi32(four), second = _mm512_set1_epi32(next);
        UNROLL
        for (int j = 0; j < NP; ++j) {
          __m512i& sum = product[i][j];
          if (pair == 0) {
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, lower[j], first), upper[j], second);
          } else {
            sum = _mm512_dpbusd_epi32(sum, _mm512_add_epi8(first, upper[j]), _mm512_add_epi8(second, lower[j]));
          }
        }
      }
    }
    UNROLL
    for (int j = 0; j < NP; ++j) {
      const __m512 scale = scales.scale(j, step), cross = _mm512_castsi512_ps(values.sum[j]);
      UNROLL
      for (int i = 0; i < MR; ++i) {
        const __m512 whole = _mm512_sub_ps(_mm512_castsi512_ps(product[i][j]), cross);  // exact
        total[i][j] = _mm512_fmadd_ps(_mm512_mul_ps(whole, _mm512_set1_ps(at(i).scale)), scale, total[i][j]);
      }
    }
    if (!offsets) continue;
    UNROLL
    for (int j = 0; j < NP; ++j) {
      const __m512 offset = scales.offset(j, step);
      UNROLL
      for (int i = 0; i < MR; ++i) total[i][j] = _mm512_fmadd_ps(offset, _mm512_set1_ps(at(i).sum), total[i][j]);
    }
  }
  UNROLL
  for (int i = 0; i < MR; ++i) {
    UNROLL
    for (int j = 0; j < NP; ++j) _mm512_storeu_ps(sums + (i * t.panels + j) * kPanel, total[i][j]);
  }
}
