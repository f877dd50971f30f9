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
  int n, width;
  bool by_channel;  // log_decay is [n] a token and head, or one number
};

struct Conv {
  float* past;                           // [taps - 1, pitch], the oldest first
  const float *x, *kernel, *bias;        // of the first token; [taps, pitch]; [pitch] or null
  float* out;
  int64_t pitch;  // floats from a token, a tap or a row of the past to the next
  int taps, width;
  bool silu;
};

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
  void (*conv)(const Conv&, int64_t tokens);
  void (*scan)(const Scan&, int64_t tokens);
};

Kernels generic_kernels();
#if JAXSERVE_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace jaxserve::recurrent
