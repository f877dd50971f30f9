// The two products of attention, for one instruction set: queries with a block's keys, and weights with its values.
// Included by attention_kernels.h. A page is laid out as ops/paged_attention/pages.py's `panels`: 16 neighbouring
// tokens of one channel of K are contiguous (a panel), and a token's V is. The innermost loops are bound by arithmetic:
// 24 products for 4 loads and 6 broadcasts, 94 % of what a core's pipes take with K and V in its second-level cache.

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

// How pages of an element type are read: `Page` is what a pointer walks over, `Query` what q and the weights are kept
// as, PAIR how many channels (of K) or tokens (of V) one step takes, and STRIDE how far a step moves in q.
struct Float32 {
  typedef float Page;
  typedef float Query;
  typedef vf Vector;
  enum { PAIR = 1, SCALED = 0, STRIDE = 1 };
};
// Queries and weights are int16 with a scale each, 256 times finer than what they meet, and products
// are exact. Four of them are WORDS, as store_weights and store_queries lay them out.
struct Int8 {
  typedef uint32_t Page;
  enum { PAIR = 4, SCALED = 1 };
};
constexpr int WORDS = 2;
struct Bfloat16 {
  typedef uint32_t Page;
  typedef vu Vector;
#if BF16_DOT
  typedef uint32_t Query;
  enum { PAIR = 2, SCALED = 0, STRIDE = 1 };
#else
  typedef float Query;
  enum { PAIR = 2, SCALED = 0, STRIDE = 2 };
#endif
};

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
  vf acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = vf{};
  for (int i = 0; i < steps; ++i) {
    typename T::Vector b[N];
    UNROLL for (int v = 0; v < N; ++v) b[v] = load(p[v] + i * ldk);
    if (ahead != nullptr)
      for (int v = 0; v < N; v += PER_PANEL < N ? PER_PANEL : N) PREFETCH(later[v].at + i * later[v].stride);
    step<R, N>(acc, q + i * T::STRIDE, ldq, b);
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) store(out + r * ldo + (first + v) * W, acc[r][v]);
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

// What a stretch's sums are added to a row's with: sum = sum * shrink + (what weights and values came to) * grow.
struct Fold {
  const float *shrink, *grow;
};

// sum[r][column] folded with weight[r] . v[column] over `tokens` tokens, for N vectors of columns from `column` on.
template <class T, int R, int N>
PRODUCT void values(const typename T::Query* weight, const typename T::Page* const* v_panels, int64_t ldv,
                    const Ahead* ahead, int tokens, int column, const Fold& by, float* sum) {
  constexpr int LDW = STRETCH / T::PAIR * T::STRIDE;
  sum += column;
  vf acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < N; ++v) acc[r][v] = vf{};
  for (int panel = 0; panel * PANEL < tokens; ++panel) {
    const int here = tokens - panel * PANEL < PANEL ? tokens - panel * PANEL : PANEL;
    const typename T::Page* p = v_panels[panel] + column;
    const typename T::Query* w = weight + panel * PANEL / T::PAIR * T::STRIDE;
    const int64_t line = ahead == nullptr ? 0 : ahead[panel].stride, lines = ldv / PANEL * line;
    const char* later = ahead == nullptr ? nullptr : ahead[panel].at + column / PANEL * line;
    const int steps = here / T::PAIR;
    for (int i = 0; i < steps; ++i, p += ldv, later += lines) {
      typename T::Vector b[N];
      UNROLL for (int v = 0; v < N; ++v) b[v] = load(p + v * W);
      if (ahead != nullptr)
        for (int v = 0; v < N; v += PANEL / W < N ? PANEL / W : N) PREFETCH(later + v * W / PANEL * line);
      step<R, N>(acc, w + i * T::STRIDE, LDW, b);
    }
    if constexpr (T::PAIR == 2) {
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
      store(to, fma(load(to), splat(by.shrink[r]), acc[r][v] * by.grow[r]));
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
