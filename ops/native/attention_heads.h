// A token's q, k and v as attention_tokens.h has them, for heads of 64, 128 and 256 channels and 16 floats a vector: a head stays in
// registers from where it lies to where it goes. Included by attention_kernels.h. Numbers are the same, to the last bit.

// x of lane i plus, or minus where `sign` is -1, that of the lane it changes places with in `swapped`.
INLINE vf trade(vf x, __m512 swapped, vf sign) { return fma(x, sign, (vf)swapped); }
INLINE vf signs(__mmask16 upper) { return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(1.0f), upper, _mm512_set1_ps(-1.0f)); }

// `mix` of a whole head.
template <int N>
INLINE void mix_whole(vf (&y)[N]) {
  const vf one = signs(0xaaaa), two = signs(0xcccc), four = signs(0xf0f0), eight = signs(0xff00);
  UNROLL for (int i = 0; i < N; ++i) y[i] = trade(y[i], _mm512_permute_ps((__m512)y[i], 0xb1), one);
  UNROLL for (int i = 0; i < N; ++i) y[i] = trade(y[i], _mm512_permute_ps((__m512)y[i], 0x4e), two);
  UNROLL for (int i = 0; i < N; ++i) y[i] = trade(y[i], _mm512_shuffle_f32x4((__m512)y[i], (__m512)y[i], 0xb1), four);
  UNROLL for (int i = 0; i < N; ++i) y[i] = trade(y[i], _mm512_shuffle_f32x4((__m512)y[i], (__m512)y[i], 0x4e), eight);
  UNROLL for (int stride = 1; stride < N; stride *= 2) {
    UNROLL for (int i = 0; i < N; ++i) {
      if ((i & stride) != 0) continue;
      const vf a = y[i], b = y[i + stride];
      y[i] = a + b;
      y[i + stride] = a - b;
    }
  }
  const vf unit = splat(1.0f / sqrtf(static_cast<float>(N * W)));
  UNROLL for (int i = 0; i < N; ++i) y[i] *= unit;
}

// `rotate` of a whole head.
template <int N>
INLINE void rotate_whole(const Step& step, int64_t token, const float* x, vf (&y)[N]) {
  if (step.cos == nullptr) {
    UNROLL for (int i = 0; i < N; ++i) y[i] = load(x + i * W);
    return;
  }
  const float *cos = step.cos + token * step.half, *sin = step.sin + token * step.half;
  UNROLL for (int i = 0; i < N / 2; ++i) {
    const vf a = load(x + i * W), b = load(x + (i + N / 2) * W), c = load(cos + i * W), s = load(sin + i * W);
    y[i] = a * c - b * s;
    y[i + N / 2] = b * c + a * s;
  }
}

template <int N>
INLINE float largest_whole(const vf (&y)[N]) {
  vf largest = {};
  UNROLL for (int i = 0; i < N; ++i) largest = vmax(largest, (vf)((vi)y[i] & 0x7fffffff));
  return max_lanes(largest);
}

// `quantize`, in the low bytes of each element.
template <int N>
INLINE float quantize_whole(const vf (&y)[N], vi (&bytes)[N]) {
  const float scale = largest_whole(y) * (1.0f / 127.0f);
  const vf divisor = splat(scale == 0.0f ? 1.0f : scale);
  UNROLL for (int i = 0; i < N; ++i) bytes[i] = (vi)_mm512_cvtps_epi32((__m512)(y[i] / divisor));
  return scale;
}

// The nearest bfloat16, in the low half of each element.
INLINE vi halves(vf x) {
#if BF16_DOT
  return (vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  return bf16_bits(x);
#endif
}

// The queries of one token's head, which is a whole number of vectors, mixed whole or not at all and rotated whole or not at all.
template <int N>
AT static void queries_whole(const Step& step, const Pool& pool, int64_t token, int head, const Tile& tile, int row) {
  constexpr int h = N * W;
  const float* x = step.q + token * step.q_token + head * step.q_head;
  for (int end = row + step.group; row < end; ++row, x += h) {
    vf y[N];
    rotate_whole(step, token, x, y);
    tile.q_unit[row] = 1;
    tile.less[row] = 0;
    if (pool.kind == Kind::kInt8) {
      if (pool.k_mixed > 0) mix_whole(y);
      constexpr float limit = 32639.0f;
      static_assert(128.0 * h * limit <= INT32_MAX, "h products with an int8 stay within int32");
      const float largest = largest_whole(y), inverse = largest > 0 ? limit / largest : 0.0f;
      uint32_t* const to = static_cast<uint32_t*>(tile.q) + (int64_t)row * h / 4 * WORDS;
      vi sum = {};
      UNROLL for (int i = 0; i < N; ++i) {
        const vi q = (vi)_mm512_cvtps_epi32((__m512)(y[i] * inverse));
        store_queries(to + i * W / 4 * WORDS, q);
        sum += q;
      }
      if (VNNI) tile.less[row] = -128 * _mm512_reduce_add_epi32((__m512i)sum);
      tile.q_unit[row] = largest / limit * step.scale;
    } else if (BF16_DOT && pool.kind == Kind::kBfloat16) {
      uint16_t* const to = static_cast<uint16_t*>(tile.q) + (int64_t)row * h;
      UNROLL for (int i = 0; i < N; ++i) store_halves(to + i * W, halves(y[i] * step.scale));
    } else {
      float* const to = static_cast<float*>(tile.q) + (int64_t)row * h;
      UNROLL for (int i = 0; i < N; ++i) store(to + i * W, y[i] * step.scale);
    }
  }
}

// Transposes four tokens' words, four channels or two of each, so that a lane of z[c] has the four of one place.
INLINE void side_by_side(const __m512i (&x)[4], __m512i (&z)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  z[0] = _mm512_unpacklo_epi64(a, c), z[1] = _mm512_unpackhi_epi64(a, c);
  z[2] = _mm512_unpacklo_epi64(b, d), z[3] = _mm512_unpackhi_epi64(b, d);
}

// Writes words of TOKENS tokens, 1 or 4, into K. Word c of lane j of x is that of place c * ROW + j * LANE.
template <int TOKENS, int ROW, int LANE>
INLINE void write_words(const __m512i (&x)[TOKENS], uint32_t* page, int64_t size) {
  if constexpr (TOKENS == 4) {
    __m512i z[4];
    side_by_side(x, z);
    UNROLL for (int c = 0; c < 4; ++c) {
      uint32_t* const at = page + c * ROW * size;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(z[c]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + LANE * size), _mm512_extracti32x4_epi32(z[c], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * LANE * size), _mm512_extracti32x4_epi32(z[c], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 3 * LANE * size), _mm512_extracti32x4_epi32(z[c], 3));
    }
  } else {
    uint32_t words[W];
    _mm512_storeu_si512(words, x[0]);
    UNROLL for (int i = 0; i < W; ++i) page[(i % 4 * ROW + i / 4 * LANE) * size] = words[i];
  }
}

// TOKENS neighbours of a page, 1 or 4 of which the first is a multiple of 4.
template <int N, int TOKENS>
AT static void write_whole(const Step& step, const Pool& pool, int64_t token, int head, int64_t at, int slot) {
  constexpr int h = N * W;
  const int size = pool.page_size;
  const float* k = step.k + token * step.k_token + head * step.k_head;
  const float* v = step.v + token * step.v_token + head * step.v_head;
  vf y[N];
  __m512i words[N / 2][TOKENS];
  vi low[N], high[N];  // of V, pairs of tokens; in int8 all in `low`
  UNROLL for (int t = 0; t < TOKENS; ++t, k += step.k_token, v += step.v_token) {
    rotate_whole(step, token + t, k, y);
    if (pool.kind == Kind::kInt8) {
      vi bytes[N];
      if (pool.k_mixed > 0) mix_whole(y);
      pool.k_scale[at * size + slot + t] = quantize_whole(y, bytes);
      UNROLL for (int i = 0; i < N; i += 4)
        words[i / 4][t] = _mm512_packs_epi16(_mm512_packs_epi32((__m512i)bytes[i], (__m512i)bytes[i + 1]),
                                             _mm512_packs_epi32((__m512i)bytes[i + 2], (__m512i)bytes[i + 3]));
      UNROLL for (int i = 0; i < N; ++i) y[i] = load(v + i * W);
      if (pool.v_mixed > 0) mix_whole(y);
      pool.v_scale[at * size + slot + t] = quantize_whole(y, bytes);
      UNROLL for (int i = 0; i < N; ++i)
        low[i] = t == 0 ? bytes[i] & 0xff : low[i] | (bytes[i] & 0xff) << 8 * t;
    } else {
      UNROLL for (int i = 0; i < N; i += 2) {
        const vi first = halves(y[i]), second = halves(y[i + 1]);
        // Low halves, as they follow each other.
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)first)),
                                                _mm512_cvtepi32_epi16((__m512i)second), 1);
        words[i / 2][t] = both;
      }
      UNROLL for (int i = 0; i < N; ++i) {
        const vi half = halves(load(v + i * W));
        vi& pair = t < 2 ? low[i] : high[i];
        pair = t % 2 == 0 ? half : pair | half << 16;
      }
    }
  }
  if (pool.kind == Kind::kInt8) {
    uint32_t* const k_page = reinterpret_cast<uint32_t*>(static_cast<int8_t*>(pool.k) + at * h * size) + slot;
    UNROLL for (int i = 0; i < N / 4; ++i) write_words<TOKENS, 4, 1>(words[i], k_page + i * W * (int64_t)size, size);
    uint32_t* const v_page = reinterpret_cast<uint32_t*>(static_cast<int8_t*>(pool.v) + at * h * size) + slot / 4 * h;
    UNROLL for (int i = 0; i < N; ++i) {
      if constexpr (TOKENS == 4)
        _mm512_storeu_si512(v_page + i * W, (__m512i)low[i]);
      else
        _mm512_mask_storeu_epi8(v_page + i * W, 0x1111111111111111ull << slot % 4, (__m512i)(low[i] << 8 * (slot % 4)));
    }
  } else {
    uint32_t* const k_page = static_cast<uint32_t*>(pool.k) + at * (h / 2) * size + slot;
    UNROLL for (int i = 0; i < N / 2; ++i) write_words<TOKENS, 1, 4>(words[i], k_page + i * W * (int64_t)size, size);
    uint32_t* const v_page = static_cast<uint32_t*>(pool.v) + (at * size + slot) / 2 * h;
    UNROLL for (int i = 0; i < N; ++i) {
      if constexpr (TOKENS == 4) {
        _mm512_storeu_si512(v_page + i * W, (__m512i)low[i]);
        _mm512_storeu_si512(v_page + h + i * W, (__m512i)high[i]);
      } else {
        _mm512_mask_storeu_epi16(v_page + i * W, 0x55555555u << slot % 2, (__m512i)(low[i] << 16 * (slot % 2)));
      }
    }
  }
}

// As many of `tokens` tokens as lie side by side in a page from a multiple of 4 on, or one; how many there were.
template <int N>
AT static int write_some(const Step& step, const Pool& pool, int64_t token, int tokens, int head) {
  const int64_t index = step.index[token], page = index / pool.page_size;
  const int slot = static_cast<int>(index % pool.page_size);
  if (index < 0 || page >= pool.pages) return 1;
  const int64_t at = page * pool.heads + head;
  if (slot % PANEL == 0) fetch_panel(pool, at, slot);
  bool four = tokens >= 4 && slot % 4 == 0;
  for (int t = 1; four && t < 4; ++t) four = step.index[token + t] == index + t;
  if (!four) return write_whole<N, 1>(step, pool, token, head, at, slot), 1;
  return write_whole<N, 4>(step, pool, token, head, at, slot), 4;
}

template <int N>
AT static void finish_whole(const Pool& pool, const float* sum, float inverse, float* out) {
  vf y[N];
  UNROLL for (int i = 0; i < N; ++i) y[i] = load(sum + i * W) * inverse;
  if (pool.v_mixed > 0) mix_whole(y);
  UNROLL for (int i = 0; i < N; ++i) store(out + i * W, y[i]);
}
