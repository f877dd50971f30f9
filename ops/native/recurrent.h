// What the parts of the recurrent layers share: a step's sequences, and the functions that each instruction set brings.

#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace jaxserve::recurrent {

constexpr int LANES = 16;        // sizes of v's heads, and channels, come in multiples of it: the most floats of a vector
constexpr int MAX_CHANNELS = 512;  // of k a head

// One sequence of a step: its tokens lie together, first those whose effect stays, then, `gap` tokens behind them, those
// whose effect goes with the step.
struct Sequence {
  int64_t slot;
  bool begins;  // with a state of zeros
  int64_t first, kept, gap, shown;
};

// Some columns of one head's matrix [n, p], and what its tokens bring.
struct Matrix {
  float* state;  // [n, width]
  int64_t pitch;    // floats from a row of `state` to the next
  const float *q, *k, *v, *log_decay, *beta;  // of the first token; beta may be null
  int64_t qk_token, v_token, decay_token, beta_token;  // floats from a token to the next
  float* out;       // as v
  int64_t out_token;
  int n, width;
  bool by_channel;  // log_decay is [n] a token and head, or one number
  const float* next = nullptr;  // where as many floats as the state has are fetched meanwhile, or null
};

struct Conv {
  float* past;                           // [taps - 1, pitch], the oldest first
  const float *x, *kernel, *bias;        // of the first token; [taps, pitch]; [pitch] or null
  float* out;
  int64_t pitch, past_pitch;    // floats from a tap to the next, and from a row of the past
  int64_t x_token, out_token;   // from a token to the next
  int taps, width;
  bool silu;
};

// Gated DeltaNet between its projections, one key head of it with the value heads that read it; see ops/recurrent/gated_delta.py.
struct Delta {
  const float *x, *gates;                 // of the first token: q, k, v and z; how far v replaces, how fast the state decays
  const float *kernel, *rate, *dt_bias, *gain;
  float *past, *state;                    // [taps - 1, past_pitch], [heads, n, p]
  float* out;                             // of the first token
  int64_t x_token, gates_token, out_token, pitch, past_pitch;  // pitch: the taps'
  int n, p, heads, taps;
  float eps, reach;
  float* room;                            // `delta_room` floats
  const float *next, *next_past;          // the states that the thread changes next, or null
};

constexpr int DELTA_BLOCK = 32;  // tokens of a piece that are taken together
constexpr float UNIT_EPS = 1e-6f;  // under the root of q's and k's norms

// Of each token of a block its q, k and v, the gates and a head's result; and a tile of the state.
inline int64_t delta_room(int n, int p, int heads) {
  return DELTA_BLOCK * (2 * n + static_cast<int64_t>(heads) * p + 2 * heads + p) + static_cast<int64_t>(n) * p;
}

struct Scan {
  float* state;  // [n, pitch]
  const float *x, *dt, *rate, *write, *read;  // rate [n, pitch]; write and read [n] a token
  float* out;
  int64_t pitch;
  int n, width;
};

struct Kernels {
  int columns;  // what `matrix`, `conv` and `scan` take at once, at most
  // Each runs `tokens` tokens in order and leaves the state behind the last.
  void (*matrix)(const Matrix&, int64_t tokens);
  void (*matrix_whole)(Matrix, int p);  // one token on all columns of a head's state, where it lies
  void (*conv)(const Conv&, int64_t tokens);
  void (*scan)(const Scan&, int64_t tokens);
  void (*delta)(const Delta&, int64_t tokens);
};

Kernels generic_kernels();
#if JAXSERVE_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace jaxserve::recurrent
