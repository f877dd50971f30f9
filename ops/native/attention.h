// What the parts of paged attention share: a layer's pages, a step's operands, tiles of queries, and the functions that
// each instruction set brings.

#pragma once

#include <climits>
#include <cstdint>

#include "common.h"

namespace jaxserve::attention {

constexpr int PANEL = 16;          // neighbouring tokens that lie together in K; a page holds a multiple of it
constexpr int ROWS_AT_ONCE = 6;    // most queries that any instruction set takes at once
constexpr int LANES = 16;          // most floats of a vector
// Keys that are folded into a softmax at once: positions from one multiple of it to the next, whichever token asks and whatever
// else is in the step. A token's sums are then added up in one order, in a prompt of any cut, in decode, alone and among others.
constexpr int STRETCH = 256;
constexpr float kBitsANat = 1.44269504089f;
constexpr float NOTHING = -1e30f;  // running maximum before any key; finite, so that differences are not NaN

enum class Kind { kFloat32, kBfloat16, kInt8 };

struct Pool {  // the pages of a layer
  void *k, *v;
  float *k_scale, *v_scale;
  Kind kind;
  int64_t pages;
  int heads, h, hv, page_size;
  int window;     // positions; INT_MAX / 2 for all
  float softcap;  // in bits, like scores; 0 for none
  int k_mixed, v_mixed;  // neighbouring channels that are multiplied by a Hadamard matrix before they are rounded; 0 for none
};

// A step's operands, with the strides in which q, k and v lie.
struct Step {
  const float *q, *k, *v;  // k is null where the pages have what is needed: nothing is written
  int64_t q_token, k_token, v_token;  // floats from a token to the next
  int64_t q_head, k_head, v_head;     // floats from a KV head to the next
  const float *cos, *sin;             // [T, half], or null
  int half;
  const float* sinks;  // [K, G] in nats, or null
  const int32_t* index;
  int group;
  bool whole;   // every token of a chunk sees its row's whole context, and not just up to itself
  float scale;  // what turns q . k into bits: weights are powers of 2
  float* out;   // [T, K, G, hv]
};

struct Piece {  // a stretch of one request's keys, for one KV head
  const int32_t* table;
  int head, begin, end;
};

// What a tile asks memory for while it computes: nothing; the keys that come next; or those that it begins with as well.
enum class Ask { kNothing, kNext, kAll };

struct Tile {  // queries of one head of one request, and their softmax so far; positions ascend
  int rows;
  void* q;        // [rows, h], scaled; pairs of bfloat16 where the instruction set multiplies those, int16 for int8
  int* position;  // [rows]
  float* best;    // [rows]
  float* total;   // [rows, LANES], to be summed up
  float* q_unit;        // [rows] what 1 in q stands for
  int32_t* less;        // [rows] what sums of products with int8 keys begin with
  float* sum;           // [rows, hv]
  float* score;         // [ROWS_AT_ONCE, STRETCH]
  void* weight;         // likewise; the same memory where weights are float32
};

// A row's softmax on its own, as floats: LANES of its total, its best, hv of its sum.
constexpr int PART = LANES + 1;

// Slots of a thread's scratch memory.
enum { kToken, kTile, kPartial, kRow };

// What an instruction set brings.
struct Kernels {
  bool bf16_dot;  // it multiplies pairs of bfloat16
  // Writes K and V of one head, k rotated, of a token and maybe more of `tokens` neighbours, into their pages; nothing where a page is
  // not there. Returns how many it wrote.
  int (*write)(const Step&, const Pool&, int64_t token, int tokens, int head);
  // Puts a token's queries of one KV head, rotated and scaled, into the rows of a tile from `row` on.
  void (*queries)(const Step&, const Pool&, int64_t token, int head, const Tile&, int row);
  // Folds a piece's keys into a tile's softmax. What it asks for meanwhile is what it reads a little later: within the piece and,
  // at its end, the first keys of `next`, where there is one.
  void (*attend)(const Tile&, const Pool&, const Piece&, const Piece* next, Ask);
  // Folds what another tile's row came to, a `Part`, into a row's softmax as if its keys had been folded into that.
  void (*join)(float* row, const float* part, int hv);
  // out = sum / (the sum of a total's lanes), as v was before it was mixed; zeros when nothing was attended to.
  void (*finish)(const Pool&, const float* sum, const float* total, float* out);
};

Kernels generic_kernels();
#if JAXSERVE_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels bf16_kernels();
#endif

struct Rows {  // the rows of one part of a batch
  const int32_t *pages, *start, *qlen, *len;  // decode rows have no start, and no qlen where each has one place
  int64_t count, width;
  int64_t places;  // of a decode row
};

// Does a layer's step: rotation of q and k (when cosines are given), the write, decode rows and chunk tokens.
ffi::Error run_step(ffi::ThreadPool& threads, const Step& step, const Pool& pool, const Rows& decode, const Rows& chunk,
                    int64_t num_tokens);

}  // namespace jaxserve::attention
