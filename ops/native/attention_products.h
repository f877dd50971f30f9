// The two products of attention, for one instruction set: queries with a block's keys, and weights with its values.
// Included by attention_kernels.h. A page is laid out as ops/paged_attention/pages.py's `panels`: 16 neighbouring
// tokens of one channel of K are contiguous (a panel), and a token's V is. The innermost loops are bound by arithmetic:
// 24 products for 4 loads and 6 broadcasts, 94 % of what a core's pipes take with K and V in its second-level cache.

// Pairs of int8, as pairs of int16 in each lane.
INLINE vi load(const uint16_t* p) {
#if W == 16
  return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif W == 8
  return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < W; ++i) {
    const int32_t low = static_cast<int8_t>(p[i] & 0xff), high = static_cast<int8_t>(p[i] >> 8);
    x[i] = (low & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(high) << 16);
  }
  return x;
#endif
}
// One step of a product: acc[r][v] += a(r, i) * b[v], where a bfloat16 step holds a pair on each side.
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const float* a, int64_t lda, const vf (&b)[N]) {
  UNROLL for (int r = 0; r < R; ++r) {
    const vf both = splat(a[r * lda]);
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = fma(both, b[v], acc[r][v]);
  }
}
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const float* a, int64_t lda, const vu (&b)[N]) {
  UNROLL for (int v = 0; v < N; ++v) {
    const vf low = (vf)(b[v] << 16), high = (vf)(b[v] & 0xffff0000u);
    UNROLL for (int r = 0; r < R; ++r) acc[r][v] = fma(splat(a[r * lda]), low, acc[r][v]);
    UNROLL for (int r = 0; r < R; ++r) acc[r][v] = fma(splat(a[r * lda + 1]), high, acc[r][v]);
  }
}
#if BF16_DOT
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const uint32_t* a, int64_t lda, const vu (&b)[N]) {
  UNROLL for (int r = 0; r < R; ++r) {
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    UNROLL for (int v = 0; v < N; ++v)
      acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)both, (__m512bh)b[v]);
  }
}
#endif

// Pairs of int16, exactly, into int32.
template <int R, int N>
INLINE void step(vi (&acc)[R][N], const uint32_t* a, int64_t lda, const vi (&b)[N]) {
  UNROLL for (int r = 0; r < R; ++r) {
#if BF16_DOT  // such a CPU has VNNI too
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = (vi)_mm512_dpwssd_epi32((__m512i)acc[r][v], both, (__m512i)b[v]);
#elif W == 16
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] += (vi)_mm512_madd_epi16(both, (__m512i)b[v]);
#elif W == 8
    const __m256i both = _mm256_set1_epi32(static_cast<int>(a[r * lda]));
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] += (vi)_mm256_madd_epi16(both, (__m256i)b[v]);
#else
    const int32_t both = static_cast<int32_t>(a[r * lda]), high = both >> 16, low = static_cast<int16_t>(both & 0xffff);
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] += ((b[v] << 16) >> 16) * low + (b[v] >> 16) * high;
#endif
  }
}

// How pages of an element type are read: `Page` is what a pointer walks over, `Query` what q and the weights are kept
// as, PAIR how many channels (of K) or tokens (of V) one step takes, and STRIDE how far a step moves in q.
struct Float32 {
  typedef float Page;
  typedef float Query;
  typedef vf Vector;
  typedef vf Sum;
  enum { PAIR = 1, STRIDE = 1 };
};
// Queries and weights are int16 with a scale each, 256 times finer than the pages they meet: products are exact.
struct Int8 {
  typedef uint16_t Page;
  typedef uint32_t Query;
  typedef vi Vector;
  typedef vi Sum;
  enum { PAIR = 2, STRIDE = 1 };
};
struct Bfloat16 {
  typedef uint32_t Page;
  typedef vu Vector;
  typedef vf Sum;
#if BF16_DOT
  typedef uint32_t Query;
  enum { PAIR = 2, STRIDE = 1 };
#else
  typedef float Query;
  enum { PAIR = 2, STRIDE = 2 };
#endif
};

INLINE vf to_float(vf x) { return x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

#define PREFETCH(p) __builtin_prefetch((p), 0, 2)  // to the second-level cache: the first is busy with this block
#define PRODUCT AT static __attribute__((noinline))

// What is asked for while a panel is computed: another one, by lines of PANEL elements; a product walks over as many.
struct Ahead {
  const char* at;
  int64_t stride;  // bytes from a line to the next
};

// score[r][key] = q[r] . k[key] for the keys of N vectors, of which `first` is the first one's number in the stretch. `ahead`: what
// to fetch beside each panel, or null.
template <class T, int R, int N>
PRODUCT void scores(const typename T::Query* q, int64_t ldq, const typename T::Page* const* k, int64_t ldk,
                    const Ahead* ahead, int first, int steps, float* out, int64_t ldo) {
  constexpr int PER_PANEL = PANEL / W;
  const typename T::Page* p[N];
  Ahead later[N];
  for (int v = 0; v < N; ++v) {
    const int panel = (first + v) / PER_PANEL;
    p[v] = k[panel] + (first + v) % PER_PANEL * W;
    if (ahead != nullptr) later[v] = ahead[panel];
  }
  typename T::Sum acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = typename T::Sum{};
  for (int i = 0; i < steps; ++i) {
    typename T::Vector b[N];
    UNROLL for (int v = 0; v < N; ++v) b[v] = load(p[v] + i * ldk);
    if (ahead != nullptr)
      for (int v = 0; v < N; v += PER_PANEL < N ? PER_PANEL : N) PREFETCH(later[v].at + i * later[v].stride);
    step<R, N>(acc, q + i * T::STRIDE, ldq, b);
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) store(out + r * ldo + (first + v) * W, to_float(acc[r][v]));
}

// The same for the panels [from, to).
template <class T, int R>
AT static void all_scores(const typename T::Query* q, int64_t ldq, const typename T::Page* const* k, int64_t ldk,
                          const Ahead* ahead, int from, int to, int steps, float* out, int64_t ldo) {
  constexpr int PER_PANEL = PANEL / W;
  int first = from * PER_PANEL;
  const int end = to * PER_PANEL;
  for (; first + COLS <= end; first += COLS) scores<T, R, COLS>(q, ldq, k, ldk, ahead, first, steps, out, ldo);
  if constexpr (PER_PANEL < COLS)
    for (; first < end; ++first) scores<T, R, 1>(q, ldq, k, ldk, ahead, first, steps, out, ldo);
}

// What a stretch's sums are added to a row's with: sum = sum * shrink + (what weights and values came to) * unit * grow. Units
// are int8's.
struct Fold {
  const float *shrink, *grow, *unit;
};

// sum[r][column] folded with weight[r] . v[column] over `tokens` tokens, for N vectors of columns from `column` on.
template <class T, int R, int N>
PRODUCT void values(const typename T::Query* weight, const typename T::Page* const* v_panels, int64_t ldv,
                    const Ahead* ahead, int tokens, int column, const Fold& by, float* sum) {
  constexpr int LDW = STRETCH / T::PAIR * T::STRIDE;
  constexpr bool EXACT = std::is_same<T, Int8>::value;
  sum += column;
  typename T::Sum acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = typename T::Sum{};
  for (int panel = 0; panel * PANEL < tokens; ++panel) {
    const int here = tokens - panel * PANEL < PANEL ? tokens - panel * PANEL : PANEL;
    const typename T::Page* p = v_panels[panel] + column;
    const typename T::Query* w = weight + panel * PANEL / T::PAIR * T::STRIDE;
    const int64_t line = ahead == nullptr ? 0 : ahead[panel].stride, lines = ldv / PANEL * line;
    const char* later = ahead == nullptr ? nullptr : ahead[panel].at + column / PANEL * line;
    // int8 has no NaN: the slot of a pair's missing second token may hold anything, its weight is 0.
    const int steps = EXACT ? (here + 1) / T::PAIR : here / T::PAIR;
    for (int i = 0; i < steps; ++i, p += ldv, later += lines) {
      typename T::Vector b[N];
      UNROLL for (int v = 0; v < N; ++v) b[v] = load(p + v * W);
      if (ahead != nullptr)
        for (int v = 0; v < N; v += PANEL / W < N ? PANEL / W : N) PREFETCH(later + v * W / PANEL * line);
      step<R, N>(acc, w + i * T::STRIDE, LDW, b);
    }
    if constexpr (T::PAIR == 2 && !EXACT) {
      if (here & 1) {
        typename T::Vector b[N];
        UNROLL for (int v = 0; v < N; ++v) b[v] = load(p + v * W) & 0xffffu;
        step<R, N>(acc, w + here / 2 * T::STRIDE, LDW, b);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) {
      float* const to = sum + r * ldv + v * W;
      vf part = to_float(acc[r][v]);
      if constexpr (EXACT) part *= by.unit[r];
      store(to, fma(load(to), splat(by.shrink[r]), part * by.grow[r]));
    }
}

// The same for all hv columns, a multiple of PANEL.
template <class T, int R>
AT static void all_values(const typename T::Query* weight, const typename T::Page* const* v, int hv, const Ahead* ahead,
                          int tokens, const Fold& by, float* sum) {
  constexpr int LEAST = PANEL / W < COLS ? PANEL / W : COLS;
  int column = 0;
  for (; column + COLS * W <= hv; column += COLS * W)
    values<T, R, COLS>(weight, v, hv, ahead, tokens, column, by, sum);
  if constexpr (LEAST < COLS)
    for (; column < hv; column += LEAST * W)
      values<T, R, LEAST>(weight, v, hv, ahead, tokens, column, by, sum);
}
