// A page of all heads, for one instruction set. Included once per set, by keep.cc, with
//   ISA  the namespace,
//   AT   the function attribute that enables the set,
//   W    floats a vector.

namespace ISA {

#include "vectors.h"

// float32 rounded to bfloat16 (to nearest, ties to even), in the low halves. A NaN stays one.
INLINE vu rounded(const float* x) {
  const vu bits = load(reinterpret_cast<const uint32_t*>(x));
  const vu nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (vu)pick((vi)((bits & 0x7fffffffu) > 0x7f800000u), (vf)((bits >> 16) | 0x40u), (vf)nearest);
}

// `x`: [tokens, H, K and V, h]; `page`: K as [H][h / 2][16][2], behind it V as [H][8][h][2]. Zeros where there are no tokens.
AT static void keep_page(const float* x, int tokens, int H, int h, uint16_t* page) {
  const int64_t token = 2LL * H * h, size = static_cast<int64_t>(h) * kPage;
  if (tokens < kPage) std::memset(page, 0, sizeof(uint16_t) * 2 * H * size);
  for (int head = 0; head < H; ++head) {
    uint16_t *const k = page + head * size, *const v = page + (H + head) * size;
    for (int t = 0; t < tokens; ++t) {
      const float* const from = x + t * token + 2 * head * h;
      for (int c = 0; c < h; c += W) {
        uint32_t bits[W];
        const vu some = rounded(from + c);
        std::memcpy(bits, &some, sizeof bits);
        for (int i = 0; i < W; i += 2) {
          const uint32_t pair = bits[i] | bits[i + 1] << 16;
          std::memcpy(k + ((c + i) / 2 * kPage + t) * 2, &pair, sizeof pair);
        }
      }
    }
    for (int t = 0; t < tokens; t += 2) {
      const float* const from = x + t * token + (2 * head + 1) * h;
      for (int c = 0; c < h; c += W) {
        vu pairs = rounded(from + c);
        if (t + 1 < tokens) pairs |= rounded(from + token + c) << 16;
        std::memcpy(v + (t / 2 * h + c) * 2, &pairs, sizeof pairs);
      }
    }
  }
}

#undef INLINE
}  // namespace ISA
