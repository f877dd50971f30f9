// Attention of a tile of queries over pages, for one instruction set. Included once by a file for each set, with
//   AT         the function attribute that enables the set,
//   W          floats a vector,
//   ROWS, COLS rows, and vectors, of the accumulator block that fits its registers,
//   BF16_DOT   1 when it multiplies pairs of bfloat16,
//   VNNI       1 when it multiplies fours of bytes.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve::attention {
namespace {

#include "vectors.h"

#include "attention_products.h"
#include "attention_tokens.h"
#if W == 16
#include "attention_heads.h"
#endif

static_assert(ROWS <= ROWS_AT_ONCE && ROWS >= 4 && ROWS <= W && W <= LANES, "what a tile has room for");

// 2^x for x <= 0, and 0 far below. The polynomial's relative error is 7.5e-5, 2.6e-6 and 1.8e-7 for degrees 3, 4 and 5:
// far below what the weight is then rounded to, a bfloat16 and a 15-bit integer, or about a float32's. That of degree 5 is 1 at 0:
// what does not shrink stays as it is.
template <int DEGREE>
INLINE vf vexp2(vf x) {
#if W == 16
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
  const vf big = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const vf shifted = x + big, n = shifted - big;
#endif
  const vf f = x - n;
  vf y;
  if constexpr (DEGREE == 3) {
    y = fma(fma(splat(0.0551716691f), f, splat(0.242611122f)), f, splat(0.693260985f));
    y = fma(y, f, splat(0.999928074f));
  } else if constexpr (DEGREE == 4) {
    y = fma(fma(splat(0.00957010191f), f, splat(0.0559178603f)), f, splat(0.240247448f));
    y = fma(fma(y, f, splat(0.693121815f)), f, splat(0.999999261f));
  } else {
    static_assert(DEGREE == 5);
    y = fma(fma(splat(0.0013264727f), f, splat(0.009671513f)), f, splat(0.055507336f));
    y = fma(fma(y, f, splat(0.24022242f)), f, splat(0.693147f));
    y = fma(y, f, splat(1.0f));
  }
#if W == 16
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return keep_from((vf)((vi)y + ((vi)shifted << 23)), x, splat(-126.0f));
#endif
}

INLINE vf vtanh(vf x) {
  const vf t = vexp(-2.0f * (vf)((vi)x & 0x7fffffff));
  return (vf)((vi)((1.0f - t) / (1.0f + t)) | ((vi)x & (int32_t)0x80000000));
}

// What the rows of a stretch share.
struct Block {
  int base, tokens;           // its first key's position, and how many keys of it there are
  int from, to;               // the vectors of keys that any of the rows sees
  const float* const* v_scale;  // of its panels (int8)
};

// Scores as they are to be compared: in bits (int8), capped, masked. Returns the largest.
template <bool SCALED>
INLINE vf ready_scores(const Pool& pool, const Block& block, int position, float q_unit, float* score) {
  const int last = position - block.base < block.tokens ? position - block.base : block.tokens - 1;
  const int first = position - block.base - pool.window + 1;
  const bool masked = last < block.to * W - 1 || first > block.from * W;
  vf best = splat(NOTHING);
  if (!SCALED && !masked && pool.softcap == 0) {
    for (int i = block.from; i < block.to; ++i) best = vmax(best, load(score + i * W));
    return best;
  }
  for (int i = block.from; i < block.to; ++i) {
    vf s = load(score + i * W);
    if (SCALED) s *= q_unit;
    if (pool.softcap > 0) s = pool.softcap * vtanh(s * (1.0f / pool.softcap));
    if (masked) {
      const vi at = iota() + i * W;
      s = pick((at <= last) & (at >= first), s, splat(NOTHING));
    }
    store(score + i * W, s);
    best = vmax(best, s);
  }
  return best;
}

// Weights 2^(score - best) as the products take them, and their sums in `total`. Keys that a row does not see weigh 0 and change no
// sum, so it does not matter which others the rows beside it see.
INLINE void weigh(Float32, const Block& block, float best, float* score, float*, vf& total) {
  for (int i = block.from; i < block.to; ++i) {
    const vf p = vexp2<5>(load(score + i * W) - best);
    total += p;
    store(score + i * W, p);  // which is where weights are
  }
}
#if BF16_DOT
INLINE vf weigh_panel(float best, const float* score, uint32_t* weight) {
  const vf p = vexp2<3>(load(score) - best);
  const __m256bh pairs = _mm512_cvtneps_pbh((__m512)p);
  memcpy(weight, &pairs, sizeof pairs);
  return p;
}
INLINE void weigh(Bfloat16, const Block& block, float best, float* score, uint32_t* weight, vf& total) {
  vf more = {};  // of the panels with odd numbers
  int i = block.from;
  if (i % 2 != 0) more += weigh_panel(best, score + i * W, weight + i * W / 2), ++i;
  for (; i + 2 <= block.to; i += 2) {
    const vf low = vexp2<3>(load(score + i * W) - best), high = vexp2<3>(load(score + (i + 1) * W) - best);
    total += low;
    more += high;
    const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(weight + i * W / 2, &pairs, sizeof pairs);
  }
  if (i < block.to) total += weigh_panel(best, score + i * W, weight + i * W / 2);
  total += more;
}
#else
INLINE void weigh(Bfloat16, const Block& block, float best, float* score, float* weight, vf& total) {
  weigh(Float32(), block, best, score, weight, total);
}
#endif

// Where the panels of a stretch lie.
template <class T>
struct Panels {
  enum { COUNT = STRETCH / PANEL };
  const typename T::Page *k[COUNT], *v[COUNT];
  const float *k_scale[COUNT], *v_scale[COUNT];
  int from = 0, to = 0;  // those that hold keys of the piece; there are pointers to no others

  // The panels of a piece from position `base` on, the beginning of a stretch.
  AT inline __attribute__((always_inline)) void locate(const Pool& pool, const Piece& of, int base) {
    const int h = pool.h, hv = pool.hv, size = pool.page_size;
    const int64_t k_page = (int64_t)h * size / T::PAIR, v_page = (int64_t)size * hv / T::PAIR;
    from = of.begin > base ? (of.begin - base) / PANEL : 0;
    to = of.end - base < STRETCH ? (of.end - base + PANEL - 1) / PANEL : COUNT;
    int entry = (base + from * PANEL) / size, slot = (base + from * PANEL) % size;
    for (int i = from; i < to; ++i) {
      const int64_t page = (int64_t)of.table[entry] * pool.heads + of.head;
      k[i] = static_cast<const typename T::Page*>(pool.k) + page * k_page + slot;
      v[i] = static_cast<const typename T::Page*>(pool.v) + page * v_page + (int64_t)slot / T::PAIR * hv;
      if constexpr (T::SCALED) {
        k_scale[i] = pool.k_scale + page * size + slot;
        v_scale[i] = pool.v_scale + page * size + slot;
      }
      if ((slot += PANEL) == size) slot = 0, ++entry;
    }
  }

  // The panel that is computed at the n-th of its turns, all of K and then all of V.
  Ahead turn(const Pool& pool, int n) const {
    constexpr int64_t BYTES = sizeof(typename T::Page);
    const int count = to - from;
    if (n < count) return {reinterpret_cast<const char*>(k[from + n]), pool.page_size * BYTES};
    return {reinterpret_cast<const char*>(v[from + n - count]), PANEL * BYTES};
  }
};

// Turns between the one that asks for a panel and the one that reads it.
constexpr int TURNS_AHEAD = 8;

// What to ask for beside each panel of a stretch: what comes a few turns later, of `next` in the end.
template <class T>
AT static void look_ahead(const Pool& pool, const Panels<T>& now, const Panels<T>* next, Ahead* of_k, Ahead* of_v) {
  const int count = now.to - now.from, turns = 2 * count, far = turns < TURNS_AHEAD ? turns : TURNS_AHEAD;
  const int more = next == nullptr ? 0 : 2 * (next->to - next->from);
  for (int n = 0; n < turns; ++n) {
    const int then = n + far;
    const Ahead what = then < turns          ? now.turn(pool, then)
                       : then - turns < more ? next->turn(pool, then - turns)
                                             : now.turn(pool, turns - 1);
    (n < count ? of_k : of_v - count)[now.from + n] = what;
  }
}

// R rows have met scores as large as `here`: what their sums so far are multiplied with, and what a stretch's own are.
template <int R>
INLINE void raise_best(const Tile& tile, int row, const float (&here)[R], float (&shrink)[W], float (&grow)[W]) {
  float fall[W] = {}, rise[W] = {};
  for (int r = 0; r < R; ++r) {
    const float was = tile.best[row + r], best = here[r] > was ? here[r] : was;
    fall[r] = was - best;
    rise[r] = here[r] - best;
    tile.best[row + r] = best;
  }
  store(shrink, vexp2<5>(load(fall)));
  store(grow, vexp2<5>(load(rise)));
}

// Folds a stretch's keys, from position `base` on, into the softmax of the R rows from `row` on: with weights that are compared
// with the stretch's own best, and joined to what there was as `join` does it.
template <class T, int R>
AT static void fold(const Tile& tile, const Pool& pool, const Panels<T>& now, const Ahead* of_k, const Ahead* of_v,
                    int base, int tokens, int row) {
  typedef typename T::Query Query;
  constexpr int LDW = STRETCH / T::PAIR * T::STRIDE;
  const int h = pool.h, hv = pool.hv;
  const int sees = tile.position[row + R - 1] - base + 1, end = sees < tokens ? sees : tokens;
  const int begin = tile.position[row] - pool.window + 1 - base;
  const int from = begin > 0 ? begin / PANEL : 0, to = (end + PANEL - 1) / PANEL;
  if (from >= to) return;
  const int64_t ldq = h / T::PAIR * T::STRIDE;
  all_scores<T, R>(reinterpret_cast<const Query*>(tile.q) + row * ldq, ldq, now.k, pool.page_size, of_k, from, to,
                   h / T::PAIR, tile.score, STRETCH);
  const Block block{base, tokens, from * (PANEL / W), to * (PANEL / W), now.v_scale};
  Query* const weight = reinterpret_cast<Query*>(tile.weight);
  float here[R], shrink[W], grow[W];
  for (int r = 0; r < R; ++r)
    here[r] = max_lanes(ready_scores<false>(pool, block, tile.position[row + r], 1, tile.score + r * STRETCH));
  raise_best(tile, row, here, shrink, grow);
  for (int r = 0; r < R; ++r) {
    float* const total = tile.total + (int64_t)(row + r) * LANES;
    vf sum = {};
    weigh(T(), block, here[r], tile.score + r * STRETCH, weight + r * LDW, sum);
    store(total, fma(load(total), splat(shrink[r]), sum * grow[r]));
  }
  all_values<T, R>(weight + from * PANEL / T::PAIR * T::STRIDE, now.v + from, hv,
                   of_v == nullptr ? nullptr : of_v + from, end - from * PANEL, Fold{shrink, grow},
                   tile.sum + (int64_t)row * hv);
}

// Folds a piece's keys into the softmax of a tile, a stretch at a time. With `fetch`, the first rows ask for what is read next;
// in the last stretch for the first of `following`, where there is one.
template <class T>
AT static void attend(const Tile& tile, const Pool& pool, const Piece& piece, const Piece* following, bool fetch) {
  Panels<T> panels[2];
  Ahead ahead[2][Panels<T>::COUNT];
  const int begin = piece.begin / STRETCH * STRETCH, end = piece.end;
  if (begin < end) panels[0].locate(pool, piece, begin);
  for (int base = begin, at = 0; base < end; base += STRETCH, at ^= 1) {
    const Panels<T>& now = panels[at];
    Panels<T>* next = &panels[at ^ 1];
    if (base + STRETCH < end)
      next->locate(pool, piece, base + STRETCH);
    else if (fetch && following != nullptr)
      next->locate(pool, *following, following->begin / STRETCH * STRETCH);
    else
      next = nullptr;
    const Ahead *of_k = nullptr, *of_v = nullptr;
    if (fetch) {
      look_ahead(pool, now, next, ahead[0], ahead[1]);
      of_k = ahead[0], of_v = ahead[1];
    }
    const int tokens = end - base < STRETCH ? end - base : STRETCH;
    for (int row = 0; row < tile.rows; row += ROWS, of_k = of_v = nullptr) {
      switch (tile.rows - row < ROWS ? tile.rows - row : ROWS) {
#define CASE(R)                                                       \
  case R:                                                             \
    fold<T, R>(tile, pool, now, of_k, of_v, base, tokens, row); \
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

#include "attention_int8.h"

AT static void attend_kind(const Tile& tile, const Pool& pool, const Piece& piece, const Piece* following, Ask asks) {
  switch (pool.kind) {
    case Kind::kFloat32:
      return attend<Float32>(tile, pool, piece, following, asks != Ask::kNothing);
    case Kind::kBfloat16:
      return attend<Bfloat16>(tile, pool, piece, following, asks != Ask::kNothing);
    case Kind::kInt8:
      return attend(tile, pool, piece, following, asks);
  }
}

AT static void join(float* row, const float* part, int hv) {
  float &was = row[LANES], here = part[LANES];
  const float best = here > was ? here : was;
  const vf shrink = vexp2<5>(splat(was - best)), grow = vexp2<5>(splat(here - best));
  was = best;
  for (int i = 0; i < LANES; i += W) store(row + i, fma(load(row + i), shrink, load(part + i) * grow));
  for (int i = PART; i < PART + hv; i += W) store(row + i, fma(load(row + i), shrink, load(part + i) * grow));
}

// Calls f<N>(...) where a head of so many channels, rotated and mixed whole or not at all, is N vectors that stay in registers.
#if W == 16
#define WHOLE(head, mixed, turned, f, ...)                                              \
  if (((mixed) == 0 || (mixed) == (head)) && ((turned) == 0 || (turned) == (head))) {   \
    if ((head) == 4 * W) return f<4>(__VA_ARGS__);                                      \
    if ((head) == 8 * W) return f<8>(__VA_ARGS__);                                      \
    if ((head) == 16 * W) return f<16>(__VA_ARGS__);                                    \
  }
#else
#define WHOLE(...)
#endif

AT static int write(const Step& step, const Pool& pool, int64_t token, int tokens, int head) {
  if (pool.kind != Kind::kFloat32 && pool.h == pool.hv)
    WHOLE(pool.h, pool.k_mixed, 2 * step.half, write_some, step, pool, token, tokens, head);
  write_any(step, pool, token, head);
  return 1;
}

AT static void queries(const Step& step, const Pool& pool, int64_t token, int head, const Tile& tile, int row) {
  WHOLE(pool.h, pool.k_mixed, 2 * step.half, queries_whole, step, pool, token, head, tile, row);
  for (int g = 0; g < step.group; ++g) query_any(step, pool, token, head, g, tile, row + g);
}

AT static void finish(const Pool& pool, const float* sum, const float* lanes, float* out) {
#if W == 16
  const float total = sum_lanes(load(lanes));
#else
  float total = 0;
  for (int i = 0; i < W; ++i) total += lanes[i];
#endif
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  WHOLE(pool.hv, pool.v_mixed, 0, finish_whole, pool, sum, inverse, out);
  finish_any(pool, sum, inverse, out);
}
#undef WHOLE

Kernels kernels() { return {BF16_DOT != 0, write, queries, attend_kind, join, finish}; }

}  // namespace
}  // namespace jaxserve::attention
