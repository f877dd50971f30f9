// What happens to a token's q, k and v before and after attention, for one instruction set: rotation, rounding to what
// the products take, the write into a page. Included by attention_kernels.h.

// The nearest integers, ties to even, of numbers below 2^22.
INLINE vi nearest(vf x) {
  const vf big = splat(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer, left in the low bits
  return (vi)(x + big) - (vi)big;
}

// The low halves, and bytes, of each element.
INLINE void store_halves(uint16_t* to, vi x) {
#if W == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)x));
#else
  for (int i = 0; i < W; ++i) to[i] = static_cast<uint16_t>(x[i]);
#endif
}
INLINE void store_bytes(int8_t* to, vi x) {
#if W == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < W; ++i) to[i] = static_cast<int8_t>(x[i]);
#endif
}

// int16 in each element, as products with int8 take them (attention_int8.h), in fours: bytes of 256s and then bytes of ones, or
// the first and third and then the others.
#if W == 16
INLINE void store_fours(uint32_t* to, __m512i x, long long order, long long flipped) {
  const __m256i more = _mm256_set1_epi64x(0x0808080808080808), mask = _mm256_set1_epi64x(order);
  const __m256i by = _mm256_blend_epi32(mask, _mm256_add_epi8(mask, more), 0xcc);
  const __m256i fours = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(x), by);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(fours, _mm256_set1_epi64x(flipped)));
}
#endif
// Positive ones.
INLINE void store_weights(uint32_t* to, vi x) {
#if VNNI
  store_fours(to, (__m512i)x, 0x0604020007050301, 0);
#elif W == 16
  store_fours(to, (__m512i)x, 0x0706030205040100, 0);
#else
  for (int i = 0; i < W; ++i) reinterpret_cast<uint16_t*>(to)[i / 4 * 4 + i % 2 * 2 + i % 4 / 2] = static_cast<uint16_t>(x[i]);
#endif
}
// At most 32,639; the byte of ones has a sign too.
INLINE void store_queries(uint32_t* to, vi x) {
#if VNNI
  store_fours(to, (__m512i)(x + 128), 0x0604020007050301, static_cast<long long>(0x8080808000000000));
#else
  store_weights(to, x);
#endif
}

// float32 rounded to bfloat16 (to nearest, ties to even), in the low halves. A NaN stays one.
INLINE vi bf16_bits(vf x) {
  const vi bits = (vi)x, high = (vi)((vu)bits >> 16);
  const vi rounded = (vi)((vu)(bits + 0x7fff + (high & 1)) >> 16);
  return (vi)pick((bits & 0x7fffffff) > 0x7f800000, (vf)(high | 0x40), (vf)rounded);
}

// Passes over a token's n channels go by whole vectors; buffers have room for them, and zeros behind the channels.
INLINE int whole(int n) { return (n + W - 1) / W * W; }

// Copies a token's q or k into `y`, rotated where the step rotates.
AT static void rotate(const Step& step, int64_t token, const float* x, int h, float* y) {
  for (int i = h / W * W; i < h; i += W) store(y + i, vf{});
  if (step.cos == nullptr) {
    memcpy(y, x, sizeof(float) * h);
    return;
  }
  const int half = step.half;
  const float *cos = step.cos + token * half, *sin = step.sin + token * half;
  int i = 0;
  for (; i + W <= half; i += W) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
  memcpy(y + 2 * half, x + 2 * half, sizeof(float) * (h - 2 * half));
}

#if W == 16
// x of lane i plus, or minus where `upper` has the bit of i, that of the lane it changes places with in `swapped`.
INLINE __m512 butterfly(__m512 x, __m512 swapped, __mmask16 upper) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), upper, swapped, x);
}
#endif

// Multiplies each `block` neighbours of x, a power of two, by the orthogonal Hadamard matrix, which is its own inverse: what is
// large in one channel of k is then spread over them all, and rounding to 8 bits costs the others nothing. q . k stays what it was.
AT static void mix(float* x, int n, int block) {
#if W == 16
  for (int i = 0; i < n; i += W) {
    __m512 y = (__m512)load(x + i);
    if (block > 1) y = butterfly(y, _mm512_permute_ps(y, 0xb1), 0xaaaa);
    if (block > 2) y = butterfly(y, _mm512_permute_ps(y, 0x4e), 0xcccc);
    if (block > 4) y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0xb1), 0xf0f0);
    if (block > 8) y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0x4e), 0xff00);
    store(x + i, (vf)y);
  }
#else
  for (int stride = 1; stride < W && stride < block; stride *= 2) {
    for (int begin = 0; begin < n; begin += 2 * stride) {
      for (int i = begin; i < begin + stride; ++i) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
#endif
  for (int stride = W; stride < block; stride *= 2) {
    for (int begin = 0; begin < n; begin += 2 * stride) {
      for (int i = begin; i < begin + stride; i += W) {
        const vf a = load(x + i), b = load(x + i + stride);
        store(x + i, a + b);
        store(x + i + stride, a - b);
      }
    }
  }
  const float unit = 1.0f / sqrtf(static_cast<float>(block));
  for (int i = 0; i < n; i += W) store(x + i, load(x + i) * unit);
}

AT static float largest_of(const float* x, int n) {
  vf largest = {};
  for (int i = 0; i < n; i += W) largest = vmax(largest, (vf)((vi)load(x + i) & 0x7fffffff));
  return max_lanes(largest);
}

// Symmetric int8; returns the scale.
AT static float quantize(const float* x, int n, int8_t* to) {
  const float scale = largest_of(x, n) * (1.0f / 127.0f), divisor = scale == 0.0f ? 1.0f : scale;
  for (int i = 0; i < n; i += W) store_bytes(to + i, nearest(load(x + i) / divisor));
  return scale;
}

// Fetches the panel of 16 tokens whose first one is to be written: each of its channels is a line of memory, and stores
// wait for one line after the other (a chunk's writes took twice the time).
AT static void fetch_panel(const Pool& pool, int64_t at, int slot) {
  const int64_t bytes = pool.kind == Kind::kFloat32 ? 4 : pool.kind == Kind::kBfloat16 ? 2 : 1;
  const int64_t pair = 4 / bytes;
  const char* k = static_cast<const char*>(pool.k) + (at * pool.h * pool.page_size + slot * pair) * bytes;
  const char* v = static_cast<const char*>(pool.v) + (at * pool.page_size + slot) * pool.hv * bytes;
  for (int i = 0; i < pool.h / pair; ++i) __builtin_prefetch(k + i * pool.page_size * pair * bytes, 1, 3);
  for (int64_t i = 0; i < PANEL * pool.hv * bytes; i += 64) __builtin_prefetch(v + i, 1, 3);
}

AT static void write_any(const Step& step, const Pool& pool, int64_t token, int head) {
  const int64_t index = step.index[token];
  const int64_t page = index / pool.page_size;
  const int slot = static_cast<int>(index % pool.page_size), size = pool.page_size, h = pool.h, hv = pool.hv;
  if (index < 0 || page >= pool.pages) return;
  float* const k = static_cast<float*>(scratch(kToken, sizeof(float) * (2 * whole(h) + 3 * hv)));
  rotate(step, token, step.k + token * step.k_token + head * step.k_head, h, k);
  const float* v = step.v + token * step.v_token + head * step.v_head;
  if (slot % PANEL == 0) fetch_panel(pool, page * pool.heads + head, slot);
  void* const rounded = k + whole(h);
  const int64_t at = page * pool.heads + head;
  if (pool.kind == Kind::kFloat32) {
    float* k_page = static_cast<float*>(pool.k) + at * h * size + slot;
    for (int i = 0; i < h; ++i) k_page[(int64_t)i * size] = k[i];
    memcpy(static_cast<float*>(pool.v) + (at * size + slot) * hv, v, sizeof(float) * hv);
  } else if (pool.kind == Kind::kBfloat16) {
    uint16_t* const bits = static_cast<uint16_t*>(rounded);
    uint16_t* k_page = static_cast<uint16_t*>(pool.k) + at * h * size + 2 * slot;
    for (int i = 0; i < h; i += W) store_halves(bits + i, bf16_bits(load(k + i)));
    for (int i = 0; i < h; i += 2) memcpy(k_page + (int64_t)i * size, bits + i, 4);
    uint16_t* v_page = static_cast<uint16_t*>(pool.v) + at * size * hv + (slot / 2) * 2 * hv + slot % 2;
    for (int i = 0; i < hv; i += W) store_halves(bits + i, bf16_bits(load(v + i)));
    for (int i = 0; i < hv; ++i) v_page[2 * i] = bits[i];
  } else {
    int8_t* const bytes = static_cast<int8_t*>(rounded);
    int8_t* k_page = static_cast<int8_t*>(pool.k) + at * h * size + 4 * slot;
    if (pool.k_mixed > 0) mix(k, h, pool.k_mixed);
    if (pool.v_mixed > 0) {
      float* const mixed = k + 2 * whole(h) + 2 * hv;
      memcpy(mixed, v, sizeof(float) * hv);
      mix(mixed, hv, pool.v_mixed);
      v = mixed;
    }
    pool.k_scale[at * size + slot] = quantize(k, h, bytes);
    for (int i = 0; i < h; i += 4) memcpy(k_page + (int64_t)i * size, bytes + i, 4);
    int8_t* v_page = static_cast<int8_t*>(pool.v) + at * size * hv + (slot / 4) * 4 * hv + slot % 4;
    pool.v_scale[at * size + slot] = quantize(v, hv, bytes);
    for (int i = 0; i < hv; ++i) v_page[4 * i] = bytes[i];
  }
}

// Rows are filled in order: one may run over into the next, and the last into what is behind it.
AT static void query_any(const Step& step, const Pool& pool, int64_t token, int head, int member, const Tile& tile,
                         int row) {
  const int h = pool.h;
  float* const q = static_cast<float*>(scratch(kToken, sizeof(float) * whole(h)));
  rotate(step, token, step.q + token * step.q_token + head * step.q_head + (int64_t)member * h, h, q);
  tile.q_unit[row] = 1;
  tile.less[row] = 0;
  if (pool.kind == Kind::kInt8) {
    if (pool.k_mixed > 0) mix(q, h, pool.k_mixed);
    const float largest = largest_of(q, h);
    // h products with an int8 stay within int32.
    const float limit = fminf(32639.0f, static_cast<float>(INT32_MAX) / (128.0f * static_cast<float>(h)));
    const float inverse = largest > 0 ? limit / largest : 0.0f;
    uint32_t* const to = static_cast<uint32_t*>(tile.q) + (int64_t)row * h / 4 * WORDS;
    vi sum = {};
    for (int i = 0; i < h; i += W) {
      const vi x = nearest(load(q + i) * inverse);
      store_queries(to + i / 4 * WORDS, x);
      sum += x;
    }
    if (VNNI)
      for (int i = 0; i < W; ++i) tile.less[row] -= 128 * sum[i];
    tile.q_unit[row] = largest / limit * step.scale;
  } else if (BF16_DOT && pool.kind == Kind::kBfloat16) {
    uint16_t* const to = static_cast<uint16_t*>(tile.q) + (int64_t)row * h;
    for (int i = 0; i < h; i += W) store_halves(to + i, bf16_bits(load(q + i) * step.scale));
  } else {
    float* const to = static_cast<float*>(tile.q) + (int64_t)row * h;
    for (int i = 0; i < h; i += W) store(to + i, load(q + i) * step.scale);
  }
}

AT static void finish_any(const Pool& pool, const float* sum, float inverse, float* out) {
  const int hv = pool.hv;
  for (int i = 0; i < hv; i += W) store(out + i, load(sum + i) * inverse);
  if (pool.v_mixed > 0) mix(out, hv, pool.v_mixed);
}
