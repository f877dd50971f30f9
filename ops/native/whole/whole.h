// Attention in which every query of a row sees all of its keys (ops/paged_attention/whole.py), in int8: a tower's patches among
// themselves. Queries and keys are rounded with a scale each, values with one for each channel of a stretch of keys, weights with
// one for each query of a stretch, so that what is far from the row's best key is as fine as its neighbours let it be. Sums are
// whole numbers within a stretch and float32 beyond.

#pragma once

#include "common.h"

namespace jaxserve::whole {

constexpr int kPanel = 16;     // keys, or channels of V, of one vector
constexpr int kTurn = 64;      // keys that lie together; in V number n of quad j is key j + 16 n of a turn
constexpr int kStretch = 64;   // keys whose weights, and whose values, have one unit; whole turns
constexpr int kRows = 6;       // queries at once
constexpr int kTile = 96;      // queries that meet a stretch one after the other
constexpr int kWidest = 256;   // channels of a head

// Where a row's numbers are: [tokens, heads, q, k and v, h].
struct Heads {
  const float* qkv;
  int64_t token, head;     // floats from one to the next
  const float *cos, *sin;  // [tokens, half] by which q and k turn, or null
  int half, h;
  int quads;               // ceil(h / 4)
  int columns;             // h in whole vectors
  float scale;             // what turns q . k into bits: weights are powers of 2
};

// A stretch of one head's keys and values as they are multiplied. Behind the last key there is nothing that weighs, up to a turn.
struct Stretch {
  int8_t* k;       // [kStretch / 64][quads][64][4]
  int8_t* v;       // [kStretch / 64][16][columns][4]
  float* k_scale;  // [kStretch]
  int32_t* start;  // [kStretch]: queries are value + 128, which is taken off again here
  float* v_scale;  // [columns]
  int keys;

  static int64_t bytes(const Heads& of) {
    return kStretch * (4 * of.quads + of.columns + sizeof(float) + sizeof(int32_t)) + of.columns * sizeof(float);
  }
  static Stretch at(char* memory, const Heads& of, int64_t keys) {
    Stretch one;
    one.k = reinterpret_cast<int8_t*>(memory);
    one.v = one.k + kStretch * 4 * of.quads;
    one.k_scale = reinterpret_cast<float*>(one.v + kStretch * of.columns);
    one.start = reinterpret_cast<int32_t*>(one.k_scale + kStretch);
    one.v_scale = reinterpret_cast<float*>(one.start + kStretch);
    one.keys = static_cast<int>(keys < kStretch ? keys : kStretch);
    return one;
  }
};

struct Kernels {
  // Rounds one head's keys and values from token `begin` on.
  void (*lay)(const Heads&, int head, int64_t begin, const Stretch& to);
  // Has `rows` queries, at most kTile, of one head attend to all of the row's stretches, which hold `keys` keys.
  void (*attend)(const Heads&, int head, int64_t first, int rows, char* stretches, int64_t keys, float* out,
                 int64_t out_stride);
};

Kernels generic_kernels();
#if JAXSERVE_X86
Kernels vnni_kernels();
#endif

}  // namespace jaxserve::whole
