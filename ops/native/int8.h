// int8 x int8 products with float32 on both sides: activations are rounded to int8 with one scale for every 64 inputs of
// a row, weights have one scale an output channel. One scale a row is a tenth faster, but outliers in a few inputs then
// cost all others their precision: SmolLM2-135M's perplexity rises by 5 % instead of under 1 %.
//
// Where weights are rotated, a row is multiplied by the same Hadamard matrix in each group before it is rounded: an outlier
// then costs its neighbours nothing, and the rounding errors of a whole model shrink to a third (see ops/linear/weights/rotation.py).
//
// Packed weights: panels of 16 output channels, [ceil(O / 16)][ceil(I / 4)][16][4] int8, zeros beyond O and I. Four
// consecutive inputs of one channel fill the 32-bit lane that VNNI's dot product and AVX2's maddubs chain both take.
// Sums of the weights over each group of 64 inputs: [ceil(O / 16)][ceil(I / 64)][16] int16.

#pragma once

#include "common.h"

namespace jaxserve::int8 {

constexpr int kPanel = 16;   // output channels a panel
constexpr int kPanels = 4;   // panels that one block of a product covers at most
constexpr int kGroup = 64;   // inputs that share an activation scale
constexpr int kQuads = kGroup / 4;

enum class Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2, kRelu = 3, kGelu = 4, kQuickGelu = 5 };

// Quantized rows, whole groups wide. VNNI multiplies unsigned by signed, so there the bytes hold value + 128, and the
// weights' sums times 128 are taken off again.
struct Rows {
  const uint8_t* data;
  const float* scale;  // [rows][groups]
  int64_t stride;      // bytes: 64 * groups
};

// `rows` x (up to 4 panels) of a product and what happens to it. With an activation the first half of the panels are
// gates and the second half the matching ups: out = act(gate) * up, for half the panels.
struct Block {
  Rows a;
  int64_t rows, quads;              // quads: ceil(I / 4)
  int panels;                       // 1..4; even with an activation
  const int8_t* weight[kPanels];
  const int16_t* sums[kPanels];     // [groups][16]
  const float* scale[kPanels];      // [16], padded
  const float* bias[kPanels];       // [valid] or null
  int valid[kPanels];               // channels of the panel that exist
  float* out[kPanels];              // first row's
  const float* residual[kPanels];   // first row's, added to the result, or null
  const float* change;              // [rows][kPanels * 16], added to the sums before an activation, or null
  int64_t out_stride;               // floats; also the residual's
  Activation activation;
  Activation after;                 // of every channel of a product without gates, before the residual
  const int8_t* next[kPanels];      // weights of the thread's next block, to be fetched meanwhile, or null
  bool lasting;                     // out is too large to be read from a cache: whole lines of it go past them
  Fetch* fetch;                     // what the thread's next block reads besides weights, or null
};

// Rounds rows of x (float32, `width` wide) to int8: x, or x / rms(x) * gain when gain is given, times the Hadamard matrix
// of each group when they are rotated (`width` is then whole groups).
struct Rounding {
  const float* x;
  int64_t stride, width;
  const float* gain;   // or null
  float eps;
  uint8_t* data;
  int64_t groups;      // ceil(width / 64); data rows are 64 * groups bytes
  float* scale;        // [rows][groups]
  bool rotated = false;
  int64_t apart = 0;   // groups from one row's data and scales to the next one's; `groups` where it is 0

  int64_t at(int64_t row) const { return row * (apart == 0 ? groups : apart); }
};

// The orthogonal Hadamard matrix is this times one of +1 and -1; peak / 127 times this is a rotated group's scale.
constexpr float kRotation = 0.125f;  // 1 / sqrt(kGroup)

// The Hadamard transform of a group without its factor, in place: the order of sums that every instruction set keeps to.
FORCE_INLINE void rotate_group(float* value) {
  for (int stride = kGroup / 2; stride > 0; stride /= 2) {
    for (int begin = 0; begin < kGroup; begin += 2 * stride) {
      for (int i = begin; i < begin + stride; ++i) {
        const float a = value[i], b = value[i + stride];
        value[i] = a + b;
        value[i + stride] = a - b;
      }
    }
  }
}

struct Kernels {
  void (*block)(const Block&);
  void (*round_row)(const Rounding&, int64_t row);
};

// The kernels of the instruction set in use.
const Kernels& kernels();

extern const Kernels kGenericKernels;
#if JAXSERVE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kVnniKernels;
#endif

}  // namespace jaxserve::int8
