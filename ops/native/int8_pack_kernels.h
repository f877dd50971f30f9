// One panel of packed int8 weights, inside the namespace of a file that includes this once per instruction set, with AT and W
// as vectors.h takes them.

#include "vectors.h"

// `rotate_group` of int8.h, in registers where the set has shuffles for it.
INLINE void rotate(float* x) {
#if W >= 8
  constexpr int kVectors = kGroup / W;
  vf v[kVectors];
  UNROLL
  for (int i = 0; i < kVectors; ++i) v[i] = load(x + i * W);
  UNROLL
  for (int stride = kVectors / 2; stride > 0; stride /= 2) {
    UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if (i & stride) continue;
      const vf a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
  // Within a vector each lane meets the one `s` further on: their sum in the lower, their difference in the upper.
  const vi lane = iota(), minus = (vi)splat(-0.0f);
#define MEET(s, swapped) v[i] = (vf)((vi)v[i] ^ (((lane & s) != 0) & minus)) + (vf)(swapped)
  UNROLL
  for (int i = 0; i < kVectors; ++i) {
#if W == 16
    MEET(8, _mm512_shuffle_f32x4((__m512)v[i], (__m512)v[i], 0x4e));
    MEET(4, _mm512_shuffle_f32x4((__m512)v[i], (__m512)v[i], 0xb1));
    MEET(2, _mm512_permute_ps((__m512)v[i], 0x4e));
    MEET(1, _mm512_permute_ps((__m512)v[i], 0xb1));
#else
    MEET(4, _mm256_permute2f128_ps((__m256)v[i], (__m256)v[i], 1));
    MEET(2, _mm256_permute_ps((__m256)v[i], 0x4e));
    MEET(1, _mm256_permute_ps((__m256)v[i], 0xb1));
#endif
    store(x + i * W, v[i]);
  }
#undef MEET
#else
  rotate_group(x);
#endif
}

// One channel as float32 in x, rotated where asked, zeros up to whole groups; its largest magnitude.
AT static float read_channel(const void* from, casts::Kind source, int64_t channel, int64_t inputs, int64_t groups,
                             bool rotated, float* x) {
  casts::widen(from, source, channel * inputs, inputs, x);
  for (int64_t i = inputs; i < groups * kGroup; ++i) x[i] = 0.0f;
  const vi magnitude = ~(vi)splat(-0.0f);
  vf peaks = splat(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    float* value = x + g * kGroup;
    if (rotated) rotate(value);
    for (int i = 0; i < kGroup; i += W) peaks = vmax((vf)((vi)load(value + i) & magnitude), peaks);
  }
  return max_lanes(peaks);
}

// x * inverse rounded to integers, ties to even, and the sums of each group.
AT static void round_channel(const float* x, float inverse, int64_t groups, int8_t* q, int16_t* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    const float* value = x + g * kGroup;
    int8_t* out = q + g * kGroup;
#if W == 16
    __m512i total = _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < kGroup; i += W) {
      const __m512i rounded = _mm512_cvtps_epi32((__m512)(load(value + i) * splat(inverse)));
      total = _mm512_add_epi32(total, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(rounded));
    }
    sums[g * kPanel] = static_cast<int16_t>(_mm512_reduce_add_epi32(total));
#else
    int sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      // x + kMagic - kMagic rounds to the nearest integer for |x| < 2^22; unlike rintf every compiler vectorizes it.
      const int rounded = static_cast<int>((value[i] * inverse + kMagic) - kMagic);
      out[i] = static_cast<int8_t>(rounded);
      sum += rounded;
    }
    sums[g * kPanel] = static_cast<int16_t>(sum);
#endif
  }
}

// 16 channels from `first` on, of which `channels` exist. x holds one row of whole groups, q 16 of them, `stride` bytes apart.
AT static void pack_panel(const void* from, casts::Kind source, int64_t first, int64_t channels, int64_t inputs, bool rotated,
                          float* x, int8_t* q, int64_t stride, int8_t* panel, float* scale, int16_t* sums) {
  const int64_t quads = ceil_div(inputs, 4), groups = ceil_div(inputs, kGroup);
  for (int64_t c = 0; c < kPanel; ++c) {
    if (c >= channels) {
      scale[c] = 0.0f;
      std::memset(q + c * stride, 0, groups * kGroup);
      for (int64_t g = 0; g < groups; ++g) sums[g * kPanel + c] = 0;
      continue;
    }
    const float peak = read_channel(from, source, first + c, inputs, groups, rotated, x);
    // A row of zeros gets scale 1; a denormal peak would overflow the division.
    const bool some = peak > 1e-30f;
    scale[c] = some ? peak * (rotated ? kRotation : 1.0f) / kMax : 1.0f;
    round_channel(x, some ? kMax / peak : 0.0f, groups, q + c * stride, sums + c);
  }
  for (int64_t quad = 0; quad < quads; ++quad) {
    UNROLL
    for (int64_t c = 0; c < kPanel; ++c) std::memcpy(panel + (quad * kPanel + c) * 4, q + c * stride + quad * 4, 4);
  }
}

#undef INLINE
