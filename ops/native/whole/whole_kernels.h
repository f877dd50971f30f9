// Attention of whole.h for one instruction set. Included once by a file for each set, with AT and W as vectors.h takes them; with
// 16 floats a vector there are VNNI's products.

#include <cmath>
#include <cstring>

#include "whole.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve::whole {
namespace {

#include "vectors.h"

// 2^x for x <= 8 within 7.5e-5 of itself: weights are rounded to 8 bits.
INLINE vf weight_of(vf x) {
#if W == 16
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
  const vf big = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const vf shifted = x + big, n = shifted - big;
#endif
  const vf f = x - n;
  vf y = fma(fma(splat(0.0551716691f), f, splat(0.242611122f)), f, splat(0.693260985f));
  y = fma(y, f, splat(0.999928074f));
#if W == 16
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return keep_from((vf)((vi)y + ((vi)shifted << 23)), x, splat(-126.0f));
#endif
}

// The nearest integers, ties to even, of numbers below 2^22.
INLINE vi nearest(vf x) {
#if W == 16
  return (vi)_mm512_cvtps_epi32((__m512)x);
#else
  const vf big = splat(12582912.0f);
  return (vi)(x + big) - (vi)big;
#endif
}

INLINE void store_bytes(uint8_t* to, vi x) {
#if W == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < W; ++i) to[i] = static_cast<uint8_t>(x[i]);
#endif
}

INLINE float sum_of(const float* lanes) {
  vf sum = {};
  for (int i = 0; i < kPanel; i += W) sum += load(lanes + i);
  return sum_lanes(sum);
}

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// A token's channels, turned by its angles where there are any, and zeros up to whole vectors.
AT static void turned(const Heads& of, int64_t token, const float* x, float* y) {
  for (int i = of.h / W * W; i < of.columns; i += W) store(y + i, vf{});
  if (of.cos == nullptr) {
    memcpy(y, x, sizeof(float) * of.h);
    return;
  }
  const int half = of.half;
  const float *cos = of.cos + token * half, *sin = of.sin + token * half;
  for (int i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
  memcpy(y + 2 * half, x + 2 * half, sizeof(float) * (of.h - 2 * half));
}

// Bytes of x, to whose whole numbers `zero` is added, and their scale; `sum` is of the numbers themselves.
INLINE float rounded(const float* x, int columns, int zero, uint8_t* to, int* sum) {
  vf largest = {};
  for (int i = 0; i < columns; i += W) largest = vmax(largest, magnitude(load(x + i)));
  const float peak = max_lanes(largest), inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  vi all = {};
  for (int i = 0; i < columns; i += W) {
    const vi some = nearest(load(x + i) * splat(inverse));
    all += some;
    store_bytes(to + i, some + zero);
  }
  *sum = static_cast<int>(sum_lanes(__builtin_convertvector(all, vf)));
  return peak * (1.0f / 127.0f);
}

// Tokens lie further apart than the hardware runs ahead.
INLINE void fetch(const float* x, int n) {
  for (int i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}
constexpr int kAhead = 8;

AT static void lay_keys(const Heads& of, int head, int64_t begin, const Stretch& to) {
  alignas(64) float x[kWidest];
  alignas(64) uint8_t bytes[kWidest];
  const int padded = static_cast<int>(ceil_div(to.keys, kTurn)) * kTurn;
  const float* from = of.qkv + begin * of.token + head * of.head + of.h;
  for (int key = 0; key < padded; ++key, from += of.token) {
    int8_t* const k = to.k + (key / kTurn * of.quads * kTurn + key % kTurn) * 4;
    if (key >= to.keys) {  // a score that no query's best is below
      for (int i = 0; i < of.quads; ++i) memset(k + i * 4 * kTurn, 0, 4);
      to.k_scale[key] = 1e20f;
      to.start[key] = -(1 << 30);
      continue;
    }
    if (key + kAhead < to.keys) fetch(from + kAhead * of.token, 2 * of.h);
    turned(of, begin + key, from, x);
    int sum;
    to.k_scale[key] = rounded(x, of.columns, 0, bytes, &sum);
    to.start[key] = -128 * sum;
    for (int i = 0; i < of.quads; ++i) memcpy(k + i * 4 * kTurn, bytes + 4 * i, 4);
  }
}

// A token's values, from memory that has zeros up to whole vectors where their number is none.
INLINE const float* padded(const float* v, int h, int columns, float* memory) {
  if (h == columns) return v;
  memcpy(memory, v, sizeof(float) * h);
  return memory;
}

AT static void lay_values(const Heads& of, int head, int64_t begin, const Stretch& to) {
  alignas(64) float peak[kWidest] = {};
  alignas(64) float x[4][kWidest] = {}, none[kWidest] = {};
  const float* const v = of.qkv + begin * of.token + head * of.head + 2 * of.h;
  const int h = of.h, columns = of.columns;
  for (int key = 0; key < to.keys; ++key) {
    const float* const from = padded(v + key * of.token, h, columns, x[0]);
    for (int c = 0; c < columns; c += W) store(peak + c, vmax(load(peak + c), magnitude(load(from + c))));
  }
  for (int c = 0; c < columns; c += W) {
    const vf largest = load(peak + c);
    store(to.v_scale + c, largest * splat(1.0f / 127.0f));
    store(peak + c, keep_from(splat(127.0f) / vmax(largest, splat(1e-30f)), largest, splat(1e-30f)));
  }
  const int quads = static_cast<int>(ceil_div(to.keys, kTurn)) * kPanel;
  for (int quad = 0; quad < quads; ++quad) {
    const float* from[4];
    for (int n = 0; n < 4; ++n) {
      const int key = quad / kPanel * kTurn + n * kPanel + quad % kPanel;
      from[n] = key < to.keys ? padded(v + key * of.token, h, columns, x[n]) : none;
    }
    for (int c = 0; c < columns; c += W) {
      const vf unit = load(peak + c);
      vi bytes = {};
      UNROLL for (int n = 3; n >= 0; --n) bytes = bytes << 8 | (nearest(load(from[n] + c) * unit) & 255);
      memcpy(to.v + (static_cast<int64_t>(quad) * columns + c) * 4, &bytes, sizeof bytes);
    }
  }
}

AT static void lay(const Heads& of, int head, int64_t begin, const Stretch& to) {
  lay_keys(of, head, begin, to);
  lay_values(of, head, begin, to);
}

// Queries of a tile and their softmax so far.
struct Tile {
  const uint8_t* q;           // [rows, 4 quads]
  const float* unit;          // [rows], what 1 in q stands for, in bits
  float *best, *total, *sum;  // [rows], [rows, kPanel] to be summed up, [rows, columns]
  int32_t* score;             // [kRows, kStretch], or the bits of float32
  uint8_t* weight;            // [kRows, kStretch]
};

// Products of R queries with a stretch's keys, as whole numbers. What is done with them is done elsewhere: here the compiler would
// keep a copy of the sums on the stack up to date in the innermost loop, which halves its speed.
template <int R>
AT static __attribute__((noinline)) void products(const uint8_t* q, const Stretch& with, int quads, int turns, int32_t* score) {
#if W == 16
  const int8_t* k = with.k;
  for (int first = 0; first < turns * kTurn; first += kTurn) {
    __m512i acc[R][4];
    UNROLL for (int n = 0; n < 4; ++n) {
      const __m512i start = _mm512_loadu_si512(with.start + first + n * kPanel);
      UNROLL for (int r = 0; r < R; ++r) acc[r][n] = start;
    }
    for (int i = 0; i < quads; ++i, k += 4 * kTurn) {
      __m512i b[4];
      UNROLL for (int n = 0; n < 4; ++n) b[n] = _mm512_loadu_si512(k + n * 4 * kPanel);
      UNROLL for (int r = 0; r < R; ++r) {
        const __m512i a = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(q + (r * quads + i) * 4));
        UNROLL for (int n = 0; n < 4; ++n) acc[r][n] = _mm512_dpbusd_epi32(acc[r][n], a, b[n]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int n = 0; n < 4; ++n) _mm512_storeu_si512(score + r * kStretch + first + n * kPanel, acc[r][n]);
  }
#else
  for (int r = 0; r < R; ++r) {
    for (int key = 0; key < turns * kTurn; ++key) {
      const int8_t* const k = with.k + (key / kTurn * quads * kTurn + key % kTurn) * 4;
      int32_t sum = with.start[key];
      for (int i = 0; i < 4 * quads; ++i) sum += q[r * 4 * quads + i] * k[i / 4 * 4 * kTurn + i % 4];
      score[r * kStretch + key] = sum;
    }
  }
#endif
}

// A query's products become scores, less the query's unit; returns the largest.
INLINE float scores(int32_t* score, const Stretch& with, int turns) {
  vf best = splat(-3e38f);
  for (int i = 0; i < turns * kTurn; i += W) {
    vi sum;
    memcpy(&sum, score + i, sizeof sum);
    const vf s = __builtin_convertvector(sum, vf) * load(with.k_scale + i);
    memcpy(score + i, &s, sizeof s);
    best = vmax(best, s);
  }
  return max_lanes(best);
}

// The weights of kPanel keys as whole numbers, 255 for the best of the stretch.
INLINE vi weigh_some(const int32_t* score, float unit, float shift) {
  return nearest(weight_of(fma((vf)load(reinterpret_cast<const uint32_t*>(score)), splat(unit), splat(shift))));
}

// A query's weights in a stretch, as `values` takes them, and their sums by the places of a vector.
INLINE vf weigh(const int32_t* score, float unit, float best, int turns, uint8_t* weight) {
  const float shift = 7.99435344f - best * unit;  // log2(255)
  vi total = {};
  for (int t = 0; t < turns; ++t, score += kTurn, weight += kTurn) {
#if W == 16
    vi bytes = {};
    UNROLL for (int n = 3; n >= 0; --n) bytes = bytes << 8 | weigh_some(score + n * kPanel, unit, shift);
    total = (vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)bytes, _mm512_set1_epi8(1));
    memcpy(weight, &bytes, sizeof bytes);
#else
    for (int i = 0; i < kTurn; i += W) {
      const vi some = weigh_some(score + i, unit, shift);
      total += some;
      for (int j = 0; j < W; ++j) weight[(i + j) % kPanel * 4 + i / kPanel] = static_cast<uint8_t>(some[j]);
    }
#endif
  }
  return __builtin_convertvector(total, vf);
}

// sum[r] = sum[r] * shrink[r] + weights[r] . v * grow[r], for N vectors of columns from `column` on.
template <int R, int N>
AT static __attribute__((noinline)) void values(const uint8_t* weight, const Stretch& with, int columns, int column, int turns,
                                                const float* shrink, const float* grow, float* sum) {
  vi acc[R][N];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int n = 0; n < N; ++n) acc[r][n] = vi{};
  const int8_t* v = with.v + column * 4;
  for (int i = 0; i < turns * kPanel; ++i, v += 4 * columns) {
#if W == 16
    __m512i b[N];
    UNROLL for (int n = 0; n < N; ++n) b[n] = _mm512_loadu_si512(v + n * 4 * W);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(weight + r * kStretch + 4 * i));
      UNROLL for (int n = 0; n < N; ++n) acc[r][n] = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][n], a, b[n]);
    }
#else
    for (int r = 0; r < R; ++r) {
      const uint8_t* const a = weight + r * kStretch + 4 * i;
      for (int n = 0; n < N; ++n)
        for (int c = 0; c < W; ++c)
          for (int j = 0; j < 4; ++j) acc[r][n][c] += a[j] * v[(n * W + c) * 4 + j];
    }
#endif
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int n = 0; n < N; ++n) {
      float* const to = sum + r * columns + column + n * W;
      const vf part = __builtin_convertvector(acc[r][n], vf) * load(with.v_scale + column + n * W);
      store(to, fma(load(to), splat(shrink[r]), part * splat(grow[r])));
    }
}

// Folds a stretch into the softmax of the R rows from `row` on.
template <int R>
AT static void fold(const Heads& of, const Tile& tile, const Stretch& with, int row) {
  const int turns = static_cast<int>(ceil_div(with.keys, kTurn)), columns = of.columns;
  float here[R], fall[kPanel] = {}, rise[kPanel] = {}, shrink[kPanel], grow[kPanel];
  products<R>(tile.q + row * 4 * of.quads, with, of.quads, turns, tile.score);
  for (int r = 0; r < R; ++r) {
    here[r] = scores(tile.score + r * kStretch, with, turns);
    const float now = here[r] * tile.unit[row + r], was = tile.best[row + r], best = now > was ? now : was;
    fall[r] = was - best;
    rise[r] = now - best;
    tile.best[row + r] = best;
  }
  for (int i = 0; i < R; i += W) {  // both the sum and the total are multiplied by them: what they are off cancels out
    store(shrink + i, weight_of(load(fall + i)));
    store(grow + i, weight_of(load(rise + i)));
  }
  for (int r = 0; r < R; ++r) {
    float* const total = tile.total + (row + r) * kPanel;
    const vf more = weigh(tile.score + r * kStretch, tile.unit[row + r], here[r], turns, tile.weight + r * kStretch);
    store(total, fma(load(total), splat(shrink[r]), more * splat(grow[r])));
  }
  float* const sum = tile.sum + row * columns;
  int column = 0;
  for (; column + 4 * W <= columns; column += 4 * W)
    values<R, 4>(tile.weight, with, columns, column, turns, shrink, grow, sum);
  for (; column < columns; column += W) values<R, 1>(tile.weight, with, columns, column, turns, shrink, grow, sum);
}

AT static void attend(const Heads& of, int head, int64_t first, int rows, char* stretches, int64_t keys, float* out,
                      int64_t out_stride) {
  alignas(64) float x[kWidest];
  alignas(64) uint8_t bytes[kWidest];
  const int width = 4 * of.quads, columns = of.columns;
  constexpr int kFloats = kRows * kStretch + kRows * kStretch / 4 + kTile * (kPanel + 2);
  float* const memory = static_cast<float*>(scratch(1, sizeof(float) * (kFloats + kTile * (columns + width / 4 + 16))));
  Tile tile;
  tile.score = reinterpret_cast<int32_t*>(memory);
  tile.weight = reinterpret_cast<uint8_t*>(memory + kRows * kStretch);
  tile.total = memory + kRows * kStretch + kRows * kStretch / 4;
  tile.sum = tile.total + kTile * kPanel;
  tile.best = tile.sum + kTile * columns;
  float* const unit = tile.best + kTile;
  uint8_t* const q = reinterpret_cast<uint8_t*>(unit + kTile);
  tile.unit = unit;
  tile.q = q;
  memset(tile.total, 0, sizeof(float) * rows * kPanel);
  memset(tile.sum, 0, sizeof(float) * rows * columns);
  for (int row = 0; row < rows; ++row) {
    turned(of, first + row, of.qkv + (first + row) * of.token + head * of.head, x);
    int sum;
    const float scale = rounded(x, columns, 128, bytes, &sum) * of.scale;
    unit[row] = scale > 1e-20f ? scale : 1e-20f;  // so that what is no key weighs nothing for a query of zeros, too
    memcpy(q + row * width, bytes, width);
    tile.best[row] = -1e30f;
  }
  const int64_t size = Stretch::bytes(of);
  for (int64_t begin = 0; begin < keys; begin += kStretch) {
    const Stretch with = Stretch::at(stretches + begin / kStretch * size, of, keys - begin);
    int row = 0;
    for (; row + kRows <= rows; row += kRows) fold<kRows>(of, tile, with, row);
    for (; row + 2 <= rows; row += 2) fold<2>(of, tile, with, row);
    if (row < rows) fold<1>(of, tile, with, row);
  }
  for (int row = 0; row < rows; ++row) {
    const float total = sum_of(tile.total + row * kPanel), inverse = total > 0 ? 1.0f / total : 0.0f;
    const float* const sum = tile.sum + row * columns;
    float* const to = out + row * out_stride;
    int i = 0;
    for (; i + W <= of.h; i += W) store(to + i, load(sum + i) * splat(inverse));
    for (; i < of.h; ++i) to[i] = sum[i] * inverse;
  }
}

#undef INLINE

}  // namespace
}  // namespace jaxserve::whole
