// Products with values as they are stored of more rows than registers have sums for, and fewer than a chunk is unpacked for. Included
// by blocks_vnni.cc, inside its namespace.
//
// All rows go through a step of one panel before its next: its values are taken apart once, into eight registers, and rows' sums lie
// in the first cache. Rows come in groups of G, whose products do not wait for each other. What is left to do with a group's products
// is done between the next group's: most of it needs the ports of dot products, which additions of bytes do not, so that both kinds
// of ports are busy all the time; KEEP holds the compiler to that order. What the last group lacks of G rows is
// whatever lies behind them; nobody reads its sums.

// A group of rows at a step: their numbers, sums, and sums of a nest.
struct Group {
  const uint8_t* row;
  float *sum, *own;
};

// Four bytes everywhere: as integers twice as many a cycle as floats.
AT FORCE_INLINE __m512i four(const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, 4);
  return _mm512_set1_epi32(bits);
}
AT FORCE_INLINE __m512 same_of(const float* from) { return _mm512_castsi512_ps(four(from)); }

// Values of four bits, crossed: dot products in five rounds, and what comes after them in as many.
template <typename SCALES, bool ZERO>
struct FewCrossed {
  static constexpr int kRounds = kPairs + 1, kLines = kPairs;
  static constexpr bool kTwo = false;
  struct Factors {
    __m512 cross, scale, offset;
  };
  SCALES scales;
  Factors now, last;  // of this step, and of the group before
  __m512i value[2 * kPairs];
  __m128i times_zero;
  AT FORCE_INLINE FewCrossed(const Chunk& chunk, int panel) : scales(chunk, panel), now{}, last{} {
    if (ZERO) times_zero = _mm_cvtsi32_si128(__builtin_ctz(static_cast<uint32_t>(chunk.form->zero)));
  }
  AT FORCE_INLINE void unpack(const uint8_t* from, int64_t line, int64_t step) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-128);
    __m512i cross = _mm512_set1_epi32(kMagicBits);
    UNROLL
    for (int pair = 0; pair < kPairs; ++pair, from += line) {
      __m512i both = _mm512_loadu_si512(from);
      KEEP(both);
      const __m512i shifted = _mm512_srli_epi16(both, 4);
      __m512i &lower = value[2 * pair], &upper = value[2 * pair + 1];
      lower = _mm512_and_si512(both, low);
      if (pair == 0) {
        upper = _mm512_and_si512(shifted, low);
      } else {
        upper = _mm512_ternarylogic_epi32(shifted, low, high, 0xea);  // (a & b) | c
        cross = _mm512_dpbusd_epi32(cross, upper, lower);
      }
    }
    const __m512 offset = scales.has_offsets() ? scales.offset(0, step) : _mm512_setzero_ps();
    now = {_mm512_castsi512_ps(cross), scales.scale(0, step), offset};
  }
  AT FORCE_INLINE void dot(int round, __m512i& sum, __m512i&, const Step& step) const {
    if (round == 0) {
      sum = four(&step.start);
      if (ZERO) {
        const __m512i minus = _mm512_add_epi32(four(step.minus_sum), four(step.minus_sum + 1));
        sum = _mm512_add_epi32(sum, _mm512_sll_epi32(minus, times_zero));
      }
    }
    if (round < 2) {
      sum = _mm512_dpbusd_epi32(sum, value[round], four(step.value + 4 * round));
    } else {
      const int8_t* at = step.value + (round - 1) * kPair;
      const __m512i upper = value[2 * round - 1], lower = value[2 * round - 2];
      sum = _mm512_dpbusd_epi32(sum, _mm512_add_epi8(four(at), upper), _mm512_add_epi8(four(at + 4), lower));
    }
  }
  AT FORCE_INLINE void after(int round, __m512i& sum, const __m512i&, const Step& step, float* sums, float*) const {
    __m512 left = _mm512_castsi512_ps(sum);
    if (round == 0) left = _mm512_sub_ps(left, last.cross);  // exact
    if (round == 2) left = _mm512_mul_ps(left, same_of(&step.scale));
    if (round == 3) left = _mm512_fmadd_ps(left, last.scale, _mm512_load_ps(sums));
    sum = _mm512_castps_si512(left);
    if (round < 4) return;
    if (scales.has_offsets()) left = _mm512_fmadd_ps(last.offset, same_of(&step.sum), left);
    _mm512_store_ps(sums, left);
  }
};

// Values of six bits whose scales come in pairs: two sums, which fit 16 bits each.
struct FewPaired {
  static constexpr int kRounds = kStep / 4, kLines = 6;
  static constexpr bool kTwo = true;
  struct Factors {
    __m512i first, second;  // scales, as 16 bits
    __m512 factor;
    bool ends;  // whether a nest's sums are done
  };
  Paired<1> scales;
  Factors now, last;
  int64_t steps;
  __m512i value[kStep / 4];
  AT FORCE_INLINE FewPaired(const Chunk& chunk, int panel) : scales(chunk, panel), now{}, last{}, steps(chunk.steps) {}
  AT FORCE_INLINE void unpack(const uint8_t* from, int64_t line, int64_t step) {
    UNROLL
    for (int part = 0; part < 2; ++part) {
      __m512i quads[4];
      Reader<6, false, false>::load(from + 3 * part * line, line, _mm512_setzero_si512(), quads);
      UNROLL
      for (int quad = 0; quad < 4; ++quad) value[4 * part + quad] = quads[quad];
    }
    const __m512i low = _mm512_set1_epi32(0xffff);
    const __m128i* const bytes = reinterpret_cast<const __m128i*>(scales.heads[0] + 2 * step * kPanel);
    now.first = _mm512_and_si512(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)), low);
    now.second = _mm512_and_si512(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)), low);
    now.factor = scales.factor[0];
    now.ends = step % kSteps == kSteps - 1 || step == steps - 1;
  }
  AT FORCE_INLINE void dot(int round, __m512i& first, __m512i& second, const Step& step) const {
    if (round == 0) first = four(step.zero_sum);
    if (round == 4) second = four(step.zero_sum + 1);
    if (round == 5) first = _mm512_madd_epi16(first, now.first);
    __m512i& sum = round < 4 ? first : second;
    sum = _mm512_dpbusd_epi32(sum, value[round], four(step.value + 4 * round));
  }
  AT FORCE_INLINE void after(int round, __m512i& sum, const __m512i& second, const Step& step, float* sums, float* own) const {
    if (round == 0) sum = _mm512_dpwssd_epi32(sum, second, last.second);
    if (round == 2) sum = _mm512_castps_si512(_mm512_cvtepi32_ps(sum));
    __m512 left = _mm512_castsi512_ps(sum);
    if (round == 5) left = _mm512_fmadd_ps(left, same_of(&step.scale), _mm512_load_ps(own));
    sum = _mm512_castps_si512(left);
    if (round < 7) return;
    if (last.ends) {
      _mm512_store_ps(sums, _mm512_fmadd_ps(left, last.factor, _mm512_load_ps(sums)));
      _mm512_store_ps(own, _mm512_setzero_ps());
    } else {
      _mm512_store_ps(own, left);
    }
  }
};

// All rows of one panel of a chunk.
template <typename WAY, int G>
AT void few_rows(const Tile& t, const Chunk& chunk, int panel, const uint8_t* ahead, float* sums) {
  const int64_t line = chunk.line, stride = t.a.stride, apart = t.panels * kPanel, groups = ceil_div(t.rows, G), each = chunk.each;
  const uint8_t* const end = chunk.end;
  const uint8_t* const first = reinterpret_cast<const uint8_t*>(&t.a.step(t.first_row, chunk.first_step));
  const auto step_of = [&](const Group& group, int i) -> const Step& { return *reinterpret_cast<const Step*>(group.row + i * stride); };
  // The first group has none before it: what is done for that is done to nothing.
  alignas(64) float own[(kMany + G) * kPanel], nothing[2 * kPanels * kPanel * G];
  Group last{first, nothing, own};
  __m512i left[G], more_left[G];
  UNROLL
  for (int i = 0; i < G; ++i) {
    left[i] = more_left[i] = _mm512_setzero_si512();
    _mm512_store_ps(nothing + i * apart, _mm512_setzero_ps());
  }
  if (WAY::kTwo) std::memset(own, 0, groups * G * kPanel * sizeof(float));
  WAY way(chunk, panel);
  const uint8_t *from = chunk.values[panel], *row = first;
  for (int64_t step = 0; step < chunk.steps; ++step, from += WAY::kLines * line, row += sizeof(Step)) {
    if (step % kSteps == 0) way.scales.nest(step / kSteps);
    if (ahead < end) {
      for (const uint8_t* const until = ahead + each; ahead < until; ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    }
    way.unpack(from, line, step);
    Group now{row, sums, own};
    for (int64_t group = 0; group < groups; ++group) {
      __m512i product[G], more[G];
      UNROLL
      for (int round = 0; round < WAY::kRounds; ++round) {
        UNROLL
        for (int i = 0; i < G; ++i) {
          way.dot(round, product[i], more[i], step_of(now, i));
          KEEP(product[i]);
          if (WAY::kTwo && round > 3) KEEP(more[i]);
          way.after(round, left[i], more_left[i], step_of(last, i), last.sum + i * apart, last.own + i * kPanel);
          KEEP(left[i]);
        }
      }
      UNROLL
      for (int i = 0; i < G; ++i) left[i] = product[i], more_left[i] = more[i];
      last = now;
      way.last = way.now;
      now.row += G * stride, now.sum += G * apart, now.own += G * kPanel;
    }
  }
  UNROLL
  for (int round = 0; round < WAY::kRounds; ++round) {
    UNROLL
    for (int i = 0; i < G; ++i) way.after(round, left[i], more_left[i], step_of(last, i), last.sum + i * apart, last.own + i * kPanel);
  }
}

constexpr int64_t kFew = 7;  // rows up to which sums stay in registers

// Whether all rows of a panel go through a step before its next.
bool few(const Form& form, int64_t rows) { return rows > kFew && stored(rows) && (crossed(form) || paired(form)); }

// Some panels of a chunk, in groups of the size that leaves the fewest rows over.
template <typename WAY>
void all_few(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  const int64_t by_three = ceil_div(t.rows, 3) * 3, by_four = ceil_div(t.rows, 4) * 4, by_five = ceil_div(t.rows, 5) * 5;
  const uint8_t* ahead = chunk.ahead;
  for (int panel = 0; panel < panels; ++panel, ahead += chunk.each * chunk.steps, sums += kPanel) {
    if (by_four <= std::min(by_three, by_five)) {
      few_rows<WAY, 4>(t, chunk, panel, ahead, sums);
    } else if (by_three <= by_five) {
      few_rows<WAY, 3>(t, chunk, panel, ahead, sums);
    } else {
      few_rows<WAY, 5>(t, chunk, panel, ahead, sums);
    }
  }
}

template <typename SCALES>
void few_crossed(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  if (chunk.form->zero == 0) return all_few<FewCrossed<SCALES, false>>(t, chunk, panels, sums);
  all_few<FewCrossed<SCALES, true>>(t, chunk, panels, sums);
}
