// Vectors of float for one instruction set, inside the namespace of a file that is included once per set with
//   AT  the function attribute that enables the set,
//   W   floats a vector.
// Leaves INLINE defined; the including file undefines it at its end.

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_loose __attribute__((vector_size(W * 4), aligned(4), may_alias));

#define INLINE AT static inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_loose*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_loose*>(p) = x; }
INLINE vf splat(float x) {
#if W == 16
  return (vf)_mm512_set1_ps(x);
#elif W == 8
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf vmax(vf a, vf b) {
#if W == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif W == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return pick(a > b, a, b);
#endif
}
// x where a >= b, else 0.
INLINE vf keep_from(vf x, vf a, vf b) {
#if W == 16
  return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ), (__m512)x);
#else
  return (vf)((vi)x & (a >= b));
#endif
}

// a * b + c in one rounding where the set has it: the build turns the compiler's own contraction off.
INLINE vf fma(vf a, vf b, vf c) {
#if W == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif W == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE vi iota() {
  vi x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// e^x for x <= 0 within 2 ulp; exactly 0 below -87.3, where float32 is no longer normal. Cody-Waite reduction and a
// polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
INLINE vf vexp(vf x) {
  const vf big = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const vf shifted = fma(x, splat(1.44269504f), big);
  const vf n = shifted - big;
  const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  vf y = splat(1.0f / 720);
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  const vi power = ((vi)shifted << 23) + 0x3f800000;
  return keep_from(y * (vf)power, x, splat(-87.3f));
}

INLINE float sum_lanes(vf x) {
#if W == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
#endif
}

INLINE float max_lanes(vf x) {
#if W == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}
