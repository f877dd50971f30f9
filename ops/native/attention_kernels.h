// Attention of a tile of queries over pages, for one instruction set. Included once per set, by attention.cc, with
//   ISA        the namespace,
//   AT         the function attribute that enables the set,
//   W          floats a vector,
//   ROWS, COLS rows, and vectors, of the accumulator block that fits its registers,
//   BF16_DOT   1 when it multiplies pairs of bfloat16.
// A page is laid out as ops/paged_attention/pages.py's `panels`: 16 neighbouring tokens of one channel of K are
// contiguous (a panel), and a token's V is.

namespace ISA {

#include "vectors.h"

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
INLINE vf vtanh(vf x) {
  const vf t = vexp(-2.0f * (vf)((vi)x & 0x7fffffff));
  return (vf)((vi)((1.0f - t) / (1.0f + t)) | ((vi)x & (int32_t)0x80000000));
}

// One step of a product: acc[r][v] += a(r, i) * b[v], where a bfloat16 step holds a pair on each side.
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const float* a, int64_t lda, const vf (&b)[N]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) acc[r][v] = fma(splat(a[r * lda]), b[v], acc[r][v]);
}
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const float* a, int64_t lda, const vu (&b)[N]) {
  for (int v = 0; v < N; ++v) {
    const vf low = (vf)(b[v] << 16), high = (vf)(b[v] & 0xffff0000u);
    for (int r = 0; r < R; ++r) acc[r][v] = fma(splat(a[r * lda]), low, acc[r][v]);
    for (int r = 0; r < R; ++r) acc[r][v] = fma(splat(a[r * lda + 1]), high, acc[r][v]);
  }
}
#if BF16_DOT
template <int R, int N>
INLINE void step(vf (&acc)[R][N], const uint32_t* a, int64_t lda, const vu (&b)[N]) {
  for (int r = 0; r < R; ++r) {
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    for (int v = 0; v < N; ++v) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)both, (__m512bh)b[v]);
  }
}
#endif

// Pairs of int16, exactly, into int32.
template <int R, int N>
INLINE void step(vi (&acc)[R][N], const uint32_t* a, int64_t lda, const vi (&b)[N]) {
  for (int r = 0; r < R; ++r) {
#if BF16_DOT  // such a CPU has VNNI too
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    for (int v = 0; v < N; ++v) acc[r][v] = (vi)_mm512_dpwssd_epi32((__m512i)acc[r][v], both, (__m512i)b[v]);
#elif W == 16
    const __m512i both = _mm512_set1_epi32(static_cast<int>(a[r * lda]));
    for (int v = 0; v < N; ++v) acc[r][v] += (vi)_mm512_madd_epi16(both, (__m512i)b[v]);
#elif W == 8
    const __m256i both = _mm256_set1_epi32(static_cast<int>(a[r * lda]));
    for (int v = 0; v < N; ++v) acc[r][v] += (vi)_mm256_madd_epi16(both, (__m256i)b[v]);
#else
    const int32_t both = static_cast<int32_t>(a[r * lda]), high = both >> 16, low = static_cast<int16_t>(both & 0xffff);
    for (int v = 0; v < N; ++v) acc[r][v] += ((b[v] << 16) >> 16) * low + (b[v] >> 16) * high;
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

// score[r][token] = q[r] . k[token] for the BLOCK tokens of four panels.
template <class T, int R>
AT static __attribute__((noinline)) void scores(const typename T::Query* q, int64_t ldq, const typename T::Page* const* k, int64_t ldk,
                      const typename T::Page* const* next, int steps, float* out) {
  constexpr int PER_PANEL = PANEL / W, N = COLS < BLOCK / W ? COLS : BLOCK / W;
  for (int first = 0; first < BLOCK / W; first += N) {
    const typename T::Page *p[N], *later[N];
    for (int v = 0; v < N; ++v) {
      const int panel = (first + v) / PER_PANEL, lane = (first + v) % PER_PANEL * W;
      p[v] = k[panel] + lane;
      later[v] = next == nullptr ? nullptr : next[panel] + lane;
    }
    // Prefetch a cache line once, where several steps' vectors share it.
    const int64_t row_bytes = ldk * (int64_t)sizeof(typename T::Page);
    const int every = row_bytes < 64 ? (int)(64 / row_bytes) : 1;
    typename T::Sum acc[R][N] = {};
    for (int i = 0; i < steps; ++i) {
      typename T::Vector b[N];
      for (int v = 0; v < N; ++v) b[v] = load(p[v] + i * ldk);
      if (next != nullptr && (i & (every - 1)) == 0)
        for (int v = 0; v < N; ++v) PREFETCH(later[v] + i * ldk);
      step<R, N>(acc, q + i * T::STRIDE, ldq, b);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) store(out + r * BLOCK + (first + v) * W, to_float(acc[r][v]));
  }
}

// sum[r][column] = sum[r][column] * shrink[r] + weight[r] . v[column] * unit[r] over `tokens` tokens; units are int8's.
template <class T, int R, int N>
AT static __attribute__((noinline)) void values(const typename T::Query* weight, const typename T::Page* const* v_panels,
                                                int64_t ldv, const typename T::Page* const* next, int tokens,
                                                const float* shrink, const float* unit, float* sum, int64_t lds) {
  constexpr int LDW = BLOCK / T::PAIR * T::STRIDE;
  constexpr bool EXACT = std::is_same<T, Int8>::value;
  typename T::Sum acc[R][N] = {};
  if constexpr (!EXACT)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) acc[r][v] = load(sum + r * lds + v * W) * shrink[r];
  for (int panel = 0; panel * PANEL < tokens; ++panel) {
    const int here = tokens - panel * PANEL < PANEL ? tokens - panel * PANEL : PANEL;
    const typename T::Page *p = v_panels[panel], *later = next == nullptr ? p : next[panel];
    const typename T::Query* w = weight + panel * PANEL / T::PAIR * T::STRIDE;
    // int8 has no NaN: the slot of a pair's missing second token may hold anything, its weight is 0.
    const int steps = EXACT ? (here + 1) / T::PAIR : here / T::PAIR;
    for (int i = 0; i < steps; ++i, p += ldv, later += ldv) {
      typename T::Vector b[N];
      for (int v = 0; v < N; ++v) b[v] = load(p + v * W);
      if (next != nullptr)
        for (int v = 0; v < N; ++v)
          if (v * W * sizeof(typename T::Page) % 64 == 0) PREFETCH(later + v * W);
      step<R, N>(acc, w + i * T::STRIDE, LDW, b);
    }
    if constexpr (T::PAIR == 2 && !EXACT) {
      if (here & 1) {
        typename T::Vector b[N];
        for (int v = 0; v < N; ++v) b[v] = load(p + v * W) & 0xffffu;
        step<R, N>(acc, w + here / 2 * T::STRIDE, LDW, b);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) {
      float* const to = sum + r * lds + v * W;
      if constexpr (EXACT)
        store(to, fma(load(to), splat(shrink[r]), to_float(acc[r][v]) * unit[r]));
      else
        store(to, acc[r][v]);
    }
}

// The blocks that `next` names are fetched by the first rows, and not again; null for none.
template <class T>
AT static void all_scores(int rows, const typename T::Query* q, int64_t ldq, const typename T::Page* const* k,
                          int64_t ldk, const typename T::Page* const* next, int steps, float* out) {
  for (int r = 0; r < rows; next = nullptr) {
    const int take = rows - r < ROWS ? rows - r : ROWS;
    switch (take) {
#define CASE(R)                                                            \
  case R:                                                                  \
    scores<T, R>(q + r * ldq, ldq, k, ldk, next, steps, out + r * BLOCK); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4)
#if ROWS > 4
      CASE(5) CASE(6)
#endif
#undef CASE
    }
    r += take;
  }
}

template <class T, int N>
AT static void values_columns(int rows, const typename T::Query* weight, const typename T::Page* const* v, int64_t ldv,
                              const typename T::Page* const* next, int tokens, const float* shrink, const float* unit,
                              float* sum, int64_t lds) {
  constexpr int LDW = BLOCK / T::PAIR * T::STRIDE;
  for (int r = 0; r < rows; next = nullptr) {
    const int take = rows - r < ROWS ? rows - r : ROWS;
    switch (take) {
#define CASE(R)                                                                                                \
  case R:                                                                                                      \
    values<T, R, N>(weight + r * LDW, v, ldv, next, tokens, shrink + r, unit + r, sum + r * lds, lds); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4)
#if ROWS > 4
      CASE(5) CASE(6)
#endif
#undef CASE
    }
    r += take;
  }
}

template <class T>
AT static void all_values(int rows, const typename T::Query* weight, const typename T::Page* const* v, int hv,
                          const typename T::Page* const* next, int tokens, const float* shrink, const float* unit,
                          float* sum) {
  constexpr int PANELS = BLOCK / PANEL;
  for (int column = 0; column < hv;) {
    const typename T::Page *p[PANELS], *later[PANELS];
    for (int i = 0; i < PANELS; ++i) {
      p[i] = v[i] + column;
      later[i] = next == nullptr ? nullptr : next[i] + column;
    }
    const typename T::Page* const* fetch = next == nullptr ? nullptr : later;
    if (hv - column >= COLS * W) {
      values_columns<T, COLS>(rows, weight, p, hv, fetch, tokens, shrink, unit, sum + column, hv);
      column += COLS * W;
    } else {  // hv is a multiple of PANEL
      values_columns<T, PANEL / W < COLS ? PANEL / W : COLS>(rows, weight, p, hv, fetch, tokens, shrink, unit,
                                                            sum + column, hv);
      column += PANEL / W < COLS ? PANEL : COLS * W;
    }
  }
}

// Two float32 rounded to bfloat16 (to nearest, ties to even), the first in the low half. A NaN stays one.
INLINE uint32_t round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

// The softmax's weights of a row as the products take them; returns their unit.
INLINE float keep_weights(Float32, const float*, float*) { return 1; }  // they replace the scores, in place
#if BF16_DOT
INLINE float keep_weights(Bfloat16, const float* from, uint32_t* to) {
  for (int i = 0; i < BLOCK; i += 2 * W) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)load(from + i + W), (__m512)load(from + i));
    memcpy(to + i / 2, &pairs, sizeof pairs);
  }
  return 1;
}
#else
INLINE float keep_weights(Bfloat16, const float*, float*) { return 1; }
#endif
INLINE float keep_weights(Int8, const float* from, uint32_t* to) {
  vf best = {};
  for (int i = 0; i < BLOCK; i += W) best = vmax(best, load(from + i));
  const float unit = max_lanes(best) * (1.0f / 32767.0f), inverse = unit > 0 ? 1.0f / unit : 0.0f;
  int16_t* const out = reinterpret_cast<int16_t*>(to);
#if W == 16
  for (int i = 0; i < BLOCK; i += W)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(load(from + i) * inverse))));
#else
  for (int i = 0; i < BLOCK; ++i) {
    const float x = from[i] * inverse + 0.5f;
    out[i] = static_cast<int16_t>(x < 32767.0f ? x : 32767.0f);
  }
#endif
  return unit;
}

// A query times the softmax's scale as the products take it; returns its unit.
INLINE float keep_query(const float* from, int h, float scale, float* to) {
  for (int i = 0; i < h; ++i) to[i] = from[i] * scale;
  return 1;
}
INLINE float keep_query_bf16(const float* from, int h, float scale, uint32_t* to) {
  for (int i = 0; i < h; i += 2) to[i / 2] = round_bf16(from[i] * scale) | round_bf16(from[i + 1] * scale) << 16;
  return 1;
}
INLINE float keep_query_int16(const float* from, int h, float scale, uint32_t* to) {
  float largest = 0;
  for (int i = 0; i < h; ++i) largest = fmaxf(largest, fabsf(from[i]));
  // h products with an int8 stay within int32.
  const float limit = fminf(32767.0f, static_cast<float>(INT32_MAX) / (128.0f * static_cast<float>(h)));
  const float inverse = largest > 0 ? limit / largest : 0.0f;
  int16_t* const out = reinterpret_cast<int16_t*>(to);
  for (int i = 0; i < h; ++i) out[i] = static_cast<int16_t>(lrintf(from[i] * inverse));
  return largest / limit * scale;
}

// Folds a piece's keys into the online softmax of `tile.rows` queries. With `fetch`, each block's successor is fetched
// while it is computed; the last one's is the first of `next`, where there is one.
template <class T>
AT static void attend(const Tile& tile, const Pool& pool, const Piece& piece, const Piece* next, bool fetch) {
  constexpr int PANELS = BLOCK / PANEL;
  typedef typename T::Page Page;
  typedef typename T::Query Query;
  constexpr bool SCALED = std::is_same<T, Int8>::value;
  const int h = pool.h, hv = pool.hv, size = pool.page_size, end = piece.end;
  const int64_t k_page = (int64_t)h * size / T::PAIR, v_page = (int64_t)size * hv / T::PAIR;
  const Page *all_k = static_cast<const Page*>(pool.k), *all_v = static_cast<const Page*>(pool.v);
  const int64_t ldq = h / T::PAIR * T::STRIDE;
  const Query* q = reinterpret_cast<const Query*>(tile.q);
  Query* weight = reinterpret_cast<Query*>(tile.weight);
  const Page *k[2][PANELS], *v[2][PANELS];
  const float *k_scales[2][PANELS] = {}, *v_scales[2][PANELS] = {};

  // Where the panels of a block lie. Panels past the end repeat the first: never a page that is not the request's.
  auto locate = [&](const Piece& of, int base, int which) __attribute__((always_inline)) {
    for (int i = 0; i < PANELS; ++i) {
      const int token = base + i * PANEL < of.end ? base + i * PANEL : base;
      const int64_t page = (int64_t)of.table[token / size] * pool.heads + of.head;
      const int slot = token % size;
      k[which][i] = all_k + page * k_page + slot;
      v[which][i] = all_v + page * v_page + (int64_t)slot / T::PAIR * hv;
      if (SCALED) {
        k_scales[which][i] = pool.k_scale + page * size + slot;
        v_scales[which][i] = pool.v_scale + page * size + slot;
      }
    }
  };

  const int begin = piece.begin / PANEL * PANEL;
  if (begin < end) locate(piece, begin, 0);
  for (int base = begin, now = 0; base < end; base += BLOCK, now ^= 1) {
    const int tokens = end - base < BLOCK ? end - base : BLOCK;
    const int following = now ^ 1;
    bool ahead = fetch;
    if (base + BLOCK < end)
      locate(piece, base + BLOCK, following);
    else if (fetch && next != nullptr)
      locate(*next, next->begin / PANEL * PANEL, following);
    else
      ahead = false;
    if (SCALED && ahead)
      for (int i = 0; i < PANELS; ++i) PREFETCH(k_scales[following][i]), PREFETCH(v_scales[following][i]);
    all_scores<T>(tile.rows, q, ldq, k[now], size, ahead ? k[following] : nullptr, h / T::PAIR, tile.score);
    const float *const *k_scale = k_scales[now], *const *v_scale = v_scales[now];
    for (int r = 0; r < tile.rows; ++r) {
      float* score = tile.score + r * BLOCK;
      const int position = tile.position[r] - base, first = position - pool.window + 1;
      const int last = position < tokens ? position : tokens - 1;
      const bool masked = last < BLOCK - 1 || first > 0;
      constexpr int PER_PANEL = PANEL / W;
      vf s[BLOCK / W];
      vf best = splat(NOTHING);
      for (int i = 0; i < BLOCK / W; ++i) {
        s[i] = load(score + i * W);
        if (SCALED) s[i] *= tile.q_unit[r] * load(k_scale[i / PER_PANEL] + i % PER_PANEL * W);
        if (pool.softcap > 0) s[i] = pool.softcap * vtanh(s[i] * (1.0f / pool.softcap));
        if (masked) {
          const vi at = iota() + i * W;
          s[i] = pick((at <= last) & (at >= first), s[i], splat(NOTHING));
        }
        best = vmax(best, s[i]);
      }
      const float was = tile.best[r];
      float now_best = max_lanes(best);
      now_best = now_best > was ? now_best : was;
      vf total = {};
      for (int i = 0; i < BLOCK / W; ++i) {
        vf p = vexp(s[i] - now_best);
        total += p;
        if (SCALED)  // behind the last token a scale may be NaN
          p = (vf)((vi)(p * load(v_scale[i / PER_PANEL] + i % PER_PANEL * W)) & (iota() + i * W < tokens));
        store(score + i * W, p);
      }
      const float shrink = vexp(splat(was - now_best))[0];
      tile.best[r] = now_best;
      tile.total[r] = tile.total[r] * shrink + sum_lanes(total);
      tile.shrink[r] = shrink;
      tile.unit[r] = keep_weights(T(), score, weight + r * (BLOCK / T::PAIR * T::STRIDE));
    }
    all_values<T>(tile.rows, weight, v[now], hv, ahead ? v[following] : nullptr, tokens, tile.shrink, tile.unit,
                  tile.sum);
  }
}

AT static void run(const Tile& tile, const Pool& pool, const Piece& piece, const Piece* next, bool fetch) {
  switch (pool.kind) {
    case Kind::kFloat32:
      return attend<Float32>(tile, pool, piece, next, fetch);
    case Kind::kBfloat16:
      return attend<Bfloat16>(tile, pool, piece, next, fetch);
    case Kind::kInt8:
      return attend<Int8>(tile, pool, piece, next, fetch);
  }
}

AT static float pack_query(const float* from, Kind kind, int h, float scale, void* tile_q, int64_t row) {
  if (kind == Kind::kInt8) return keep_query_int16(from, h, scale, static_cast<uint32_t*>(tile_q) + row * (h / 2));
  if (kind == Kind::kBfloat16 && BF16_DOT)
    return keep_query_bf16(from, h, scale, static_cast<uint32_t*>(tile_q) + row * (h / 2));
  return keep_query(from, h, scale, static_cast<float*>(tile_q) + row * h);
}

}  // namespace ISA

#undef INLINE
#undef PREFETCH
