// Attention over pages of 8 bits, for one instruction set. Included by attention_kernels.h. Four neighbouring channels of K lie
// together, and four neighbouring tokens of V: what one instruction multiplies (VNNI). Memory gives these pages faster than plain
// products and a softmax can take them, so all rows of a tile go through each pass side by side, and what is read next is asked for
// evenly over all of the time that this takes.

// Lines of memory that are asked for between other work.
struct Lines {
  static constexpr int kMost = 2304, kLine = 64, kOne = 256;
  int count = 0;
  const char* at[kMost];

  AT inline __attribute__((always_inline)) void add(const void* from, int64_t bytes) {
    const char* const first = static_cast<const char*>(from);
    const int lines = static_cast<int>((bytes + kLine - 1) / kLine);
    if (count + lines > kMost) return;
    for (int i = 0; i < lines; ++i) at[count + i] = first + i * kLine;
    count += lines;
  }
};

// Which of them is next; `owed` in parts of a line.
struct Asking {
  const char* const* next;
  int owed;
};

INLINE void ask(Asking& asking, int rate) {
  asking.owed += rate;
  for (; asking.owed >= Lines::kOne; asking.owed -= Lines::kOne) PREFETCH(*asking.next++);
}

// Sums of products, exact. VNNI multiplies unsigned bytes by signed ones: an int16 is a byte of 256s and one of ones there, and each
// has its sums.
struct Sums {
  vi ones;
#if VNNI
  vi many;
#endif
};

INLINE vf to_float(const Sums& x) {
#if VNNI
  return __builtin_convertvector((vi)((vu)x.ones + ((vu)x.many << 8)), vf);
#else
  return __builtin_convertvector(x.ones, vf);
#endif
}

#if !VNNI
// Fours of int8 times fours of int16, of which there are the first and third in one lane and the others in the next.
template <int R, int N>
INLINE void pairs_step(Sums (&acc)[R][N], const uint32_t* a, int64_t lda, const vu (&b)[N]) {
  UNROLL for (int v = 0; v < N; ++v) {
#if W == 16
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b[v], 8), 8), odd = _mm512_srai_epi16((__m512i)b[v], 8);
    UNROLL for (int r = 0; r < R; ++r) {
      acc[r][v].ones += (vi)_mm512_madd_epi16(_mm512_set1_epi32(static_cast<int>(a[r * lda])), even);
      acc[r][v].ones += (vi)_mm512_madd_epi16(_mm512_set1_epi32(static_cast<int>(a[r * lda + 1])), odd);
    }
#elif W == 8
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b[v], 8), 8), odd = _mm256_srai_epi16((__m256i)b[v], 8);
    UNROLL for (int r = 0; r < R; ++r) {
      acc[r][v].ones += (vi)_mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(a[r * lda])), even);
      acc[r][v].ones += (vi)_mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(a[r * lda + 1])), odd);
    }
#else
    const vi first = (vi)(b[v] << 24) >> 24, second = (vi)(b[v] << 16) >> 24, third = (vi)(b[v] << 8) >> 24, last = (vi)b[v] >> 24;
    UNROLL for (int r = 0; r < R; ++r) {
      const int32_t even = static_cast<int32_t>(a[r * lda]), odd = static_cast<int32_t>(a[r * lda + 1]);
      acc[r][v].ones += first * static_cast<int16_t>(even & 0xffff) + third * (even >> 16);
      acc[r][v].ones += second * static_cast<int16_t>(odd & 0xffff) + last * (odd >> 16);
    }
#endif
  }
}
#endif

// One step of queries with keys, which are the side without a sign: 128 is added to them here, and taken away where the sums begin.
template <int R, int N>
INLINE void keys_step(Sums (&acc)[R][N], const uint32_t* q, int64_t ldq, const vu (&b)[N]) {
#if VNNI
  vu x[N];
  UNROLL for (int v = 0; v < N; ++v) x[v] = b[v] ^ 0x80808080u;
  UNROLL for (int r = 0; r < R; ++r) {
    const __m512i many = _mm512_set1_epi32(static_cast<int>(q[r * ldq]));
    const __m512i ones = _mm512_set1_epi32(static_cast<int>(q[r * ldq + 1]));
    UNROLL for (int v = 0; v < N; ++v) {
      acc[r][v].many = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][v].many, (__m512i)x[v], many);
      acc[r][v].ones = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][v].ones, (__m512i)x[v], ones);
    }
  }
#else
  pairs_step(acc, q, ldq, b);
#endif
}

// One step of weights with values.
template <int R, int N>
INLINE void values_step(Sums (&acc)[R][N], const uint32_t* weight, int64_t ldw, const vu (&b)[N]) {
#if VNNI
  UNROLL for (int r = 0; r < R; ++r) {
    const __m512i many = _mm512_set1_epi32(static_cast<int>(weight[r * ldw]));
    const __m512i ones = _mm512_set1_epi32(static_cast<int>(weight[r * ldw + 1]));
    UNROLL for (int v = 0; v < N; ++v) {
      acc[r][v].many = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][v].many, many, (__m512i)b[v]);
      acc[r][v].ones = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][v].ones, ones, (__m512i)b[v]);
    }
  }
#else
  pairs_step(acc, weight, ldw, b);
#endif
}

// How many vectors R rows meet at once: their sums fill the registers.
template <int R>
constexpr int at_once() {
  return VNNI && R > 3 ? COLS / 2 : COLS;
}

// score[r][key] = q[r] . k[key], times the key's scale, for the keys of N vectors from number `first` of the stretch on.
template <int R, int N>
PRODUCT void scores(const uint32_t* q, int64_t ldq, const int32_t* less, const Panels<Int8>& now, int64_t ldk, Asking& asking,
                    int rate, int first, int steps, float* out) {
  constexpr int PER_PANEL = PANEL / W;
  const uint32_t* p[N];
  for (int v = 0; v < N; ++v) p[v] = now.k[(first + v) / PER_PANEL] + (first + v) % PER_PANEL * W;
  Sums acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = Sums{}, acc[r][v].ones += less[r];
  Asking here = asking;
  for (int i = 0; i < steps; ++i) {
    vu b[N];
    UNROLL for (int v = 0; v < N; ++v) b[v] = load(p[v] + i * ldk);
    ask(here, rate);
    keys_step(acc, q + i * WORDS, ldq, b);
  }
  asking = here;
  UNROLL for (int v = 0; v < N; ++v) {
    const vf scale = load(now.k_scale[(first + v) / PER_PANEL] + (first + v) % PER_PANEL * W);
    UNROLL for (int r = 0; r < R; ++r) store(out + r * STRETCH + (first + v) * W, to_float(acc[r][v]) * scale);
  }
}

// sum[r][column] folded with weight[r] . v[column] * unit[r] over `tokens` tokens, for N vectors of columns from `column` on.
template <int R, int N>
PRODUCT void values(const uint32_t* weight, const uint32_t* const* v_panels, int64_t ldv, Asking& asking, int rate, int tokens,
                    int column, const float* unit, const Fold& by, float* sum) {
  constexpr int LDW = STRETCH / 4 * WORDS;
  sum += column;
  Sums acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = Sums{};
  Asking here = asking;
  for (int panel = 0; panel * PANEL < tokens; ++panel) {
    const uint32_t *p = v_panels[panel] + column, *w = weight + panel * PANEL / 4 * WORDS;
    // The places of tokens that are missing may hold anything, which their weight of 0 makes nothing of.
    const int steps = (tokens - panel * PANEL < PANEL ? tokens - panel * PANEL + 3 : PANEL) / 4;
    for (int i = 0; i < steps; ++i, p += ldv) {
      vu b[N];
      UNROLL for (int v = 0; v < N; ++v) b[v] = load(p + v * W);
      ask(here, rate);
      values_step(acc, w + i * WORDS, LDW, b);
    }
  }
  asking = here;
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) {
      float* const to = sum + r * ldv + v * W;
      // In this order, as where a stretch's sums are joined to others' later.
      store(to, fma(load(to), splat(by.shrink[r]), to_float(acc[r][v]) * unit[r] * by.grow[r]));
    }
}

// What a softmax compares, of R rows: the scores' bits, capped and masked where rows need it. `unit`: what 1 of a score is worth then.
template <int R>
INLINE void ready(const Tile& tile, const Pool& pool, const Block& block, int row, Asking& asking, int rate, vf (&unit)[R],
                  float (&here)[R]) {
  const int first = tile.position[row + R - 1] - pool.window + 1 - block.base, last = tile.position[row] - block.base;
  const bool masked = last < block.to * W - 1 || block.tokens < block.to * W || first > block.from * W;
  vf best[R];
  UNROLL for (int r = 0; r < R; ++r) best[r] = splat(NOTHING), unit[r] = splat(tile.q_unit[row + r]);
  if (masked || pool.softcap > 0) {
    UNROLL for (int r = 0; r < R; ++r) {
      best[r] = ready_scores<true>(pool, block, tile.position[row + r], tile.q_unit[row + r], tile.score + r * STRETCH);
      unit[r] = splat(1.0f);
      ask(asking, rate * (block.to - block.from) / R);
    }
    UNROLL for (int r = 0; r < R; ++r) here[r] = max_lanes(best[r]);
    return;
  }
  for (int i = block.from; i < block.to; ++i) {
    UNROLL for (int r = 0; r < R; ++r) best[r] = vmax(best[r], load(tile.score + r * STRETCH + i * W));
    ask(asking, rate);
  }
  UNROLL for (int r = 0; r < R; ++r) here[r] = max_lanes(best[r]) * tile.q_unit[row + r];
}

// Weights 2^(score - best), times the values' scales, in int16; returns their units and, in `total`, their sums without the scales.
template <int R>
INLINE void weigh(const Tile& tile, const Block& block, const vf (&q_unit)[R], const float (&here)[R], Asking& asking, int rate,
                  uint32_t* weight, vf (&total)[R], float (&unit)[R]) {
  constexpr int PER_PANEL = PANEL / W, LDW = STRETCH / 4 * WORDS;
  vf largest[R], best[R];
  UNROLL for (int r = 0; r < R; ++r) total[r] = largest[r] = vf{}, best[r] = splat(here[r]);
  for (int i = block.from; i < block.to; ++i) {
    vf scale = load(block.v_scale[i / PER_PANEL] + i % PER_PANEL * W);
    scale = (vf)((vi)scale & (iota() + i * W < block.tokens));  // behind the last token it may be NaN
    ask(asking, rate);
    UNROLL for (int r = 0; r < R; ++r) {
      float* const at = tile.score + r * STRETCH + i * W;
      const vf p = vexp2<4>(load(at) * q_unit[r] - best[r]);
      total[r] += p;
      const vf scaled = p * scale;
      largest[r] = vmax(largest[r], scaled);
      store(at, scaled);
    }
  }
  vf inverse[R];
  UNROLL for (int r = 0; r < R; ++r) {
    unit[r] = max_lanes(largest[r]) * (1.0f / 32767.0f);
    inverse[r] = splat(unit[r] > 0 ? 1.0f / unit[r] : 0.0f);
  }
  for (int i = block.from; i < block.to; ++i) {
    ask(asking, rate);
    UNROLL for (int r = 0; r < R; ++r)
      store_weights(weight + r * LDW + i * W / 4 * WORDS, nearest(load(tile.score + r * STRETCH + i * W) * inverse[r]));
  }
}

// Percent of a stretch's time that either product takes.
constexpr int OF_A_PRODUCT = 35;

// `fold` of attention_kernels.h. `lines` are asked for meanwhile; null: none.
template <int R>
AT static void fold(const Tile& tile, const Pool& pool, const Panels<Int8>& now, const Lines* lines, int base, int tokens, int row) {
  constexpr int N = at_once<R>(), LEAST = PANEL / W < N ? PANEL / W : N, PER_PANEL = PANEL / W;
  const int h = pool.h, hv = pool.hv;
  const int sees = tile.position[row + R - 1] - base + 1, end = sees < tokens ? sees : tokens;
  const int begin = tile.position[row] - pool.window + 1 - base;
  const int from = begin > 0 ? begin / PANEL : 0, to = (end + PANEL - 1) / PANEL;
  if (from >= to) return;
  Asking asking{lines == nullptr ? nullptr : lines->at, 0};
  const int vectors = (to - from) * PER_PANEL, owed = lines == nullptr ? 0 : lines->count * Lines::kOne / 100;
  const int of_scores = owed * OF_A_PRODUCT / ((vectors + N - 1) / N * (h / 4));
  const int of_values = owed * OF_A_PRODUCT / ((to - from) * (PANEL / 4) * ((hv + N * W - 1) / (N * W)));
  const int of_softmax = owed * (100 - 2 * OF_A_PRODUCT) / (3 * vectors);

  const int64_t ldq = h / 4 * WORDS;
  const uint32_t* const q = reinterpret_cast<const uint32_t*>(tile.q) + row * ldq;
  int first = from * PER_PANEL;
  for (; first + N <= to * PER_PANEL; first += N)
    scores<R, N>(q, ldq, tile.less + row, now, pool.page_size, asking, of_scores, first, h / 4, tile.score);
  if constexpr (PER_PANEL < N)
    for (; first < to * PER_PANEL; ++first)
      scores<R, 1>(q, ldq, tile.less + row, now, pool.page_size, asking, of_scores / N, first, h / 4, tile.score);

  const Block block{base, tokens, from * PER_PANEL, to * PER_PANEL, now.v_scale};
  uint32_t* const weight = reinterpret_cast<uint32_t*>(tile.weight);
  float here[R], shrink[W], grow[W], unit[R];
  vf q_unit[R], sum[R];
  ready<R>(tile, pool, block, row, asking, of_softmax, q_unit, here);
  raise_best(tile, row, here, shrink, grow);
  weigh<R>(tile, block, q_unit, here, asking, of_softmax, weight, sum, unit);
  for (int r = 0; r < R; ++r) {
    float* const total = tile.total + (int64_t)(row + r) * LANES;
    store(total, fma(load(total), splat(shrink[r]), sum[r] * grow[r]));
  }
  const Fold by{shrink, grow};
  const uint32_t* const w = weight + from * PANEL / 4 * WORDS;
  float* const out = tile.sum + (int64_t)row * hv;
  int column = 0;
  for (; column + N * W <= hv; column += N * W)
    values<R, N>(w, now.v + from, hv, asking, of_values, end - from * PANEL, column, unit, by, out);
  if constexpr (LEAST < N)
    for (; column < hv; column += LEAST * W)
      values<R, LEAST>(w, now.v + from, hv, asking, of_values * LEAST / N, end - from * PANEL, column, unit, by, out);
  if (lines != nullptr)
    for (const char* const* last = lines->at + lines->count; asking.next < last; ++asking.next) PREFETCH(*asking.next);
}

// The lines of a stretch's panels, a page after the other, in the order in which they lie there.
AT static void list(const Pool& pool, const Panels<Int8>& panels, Lines& lines) {
  lines.count = 0;
  for (int i = panels.from, end; i < panels.to; i = end) {
    for (end = i + 1; end < panels.to && panels.k[end] == panels.k[end - 1] + PANEL; ++end) {}  // the panels of a page
    const int tokens = (end - i) * PANEL;
    if (tokens == pool.page_size)
      lines.add(panels.k[i], (int64_t)tokens * pool.h);
    else
      for (int c = 0; c < pool.h / 4; ++c) lines.add(panels.k[i] + (int64_t)c * pool.page_size, 4 * tokens);
    lines.add(panels.v[i], (int64_t)tokens * pool.hv);
    lines.add(panels.k_scale[i], tokens * sizeof(float));
    lines.add(panels.v_scale[i], tokens * sizeof(float));
  }
}

// `attend` of attention_kernels.h.
AT static void attend(const Tile& tile, const Pool& pool, const Piece& piece, const Piece* following, Ask asks) {
  Panels<Int8> panels[2];
  Lines lines;
  const int begin = piece.begin / STRETCH * STRETCH, end = piece.end;
  if (begin >= end) return;
  panels[0].locate(pool, piece, begin);
  if (asks == Ask::kAll) {
    list(pool, panels[0], lines);
    for (int i = 0; i < lines.count; ++i) PREFETCH(lines.at[i]);
  }
  for (int base = begin, at = 0; base < end; base += STRETCH, at ^= 1) {
    Panels<Int8>* next = &panels[at ^ 1];
    if (base + STRETCH < end)
      next->locate(pool, piece, base + STRETCH);
    else if (asks != Ask::kNothing && following != nullptr)
      next->locate(pool, *following, following->begin / STRETCH * STRETCH);
    else
      next = nullptr;
    const Lines* ahead = nullptr;
    if (asks != Ask::kNothing && next != nullptr) {
      list(pool, *next, lines);
      ahead = &lines;
    }
    const int tokens = end - base < STRETCH ? end - base : STRETCH;
    for (int row = 0; row < tile.rows; row += ROWS, ahead = nullptr) {
      switch (tile.rows - row < ROWS ? tile.rows - row : ROWS) {
#define CASE(R)                                                 \
  case R:                                                       \
    fold<R>(tile, pool, panels[at], ahead, base, tokens, row); \
    break;
        CASE(1) CASE(2) CASE(3) CASE(4)
#if ROWS > 4
        CASE(5) CASE(6)
#endif
#undef CASE
      }
    }
  }
}
