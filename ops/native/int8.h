// int8 x int8 products with float32 on both sides: rows of activations are rounded to int8 on their own scale, weights
// have one scale an output channel.
//
// Packed weights: panels of 16 output channels, [ceil(O / 16)][ceil(I / 4)][16][4] int8, zeros beyond O and I. Four
// consecutive inputs of one channel fill the 32-bit lane that VNNI's dot product and AVX2's maddubs chain both take.

#pragma once

#include "common.h"

namespace jaxserve::int8 {

constexpr int kPanel = 16;   // output channels a panel
constexpr int kPanels = 4;   // panels that one block of a product covers at most

enum class Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2, kRelu = 3 };

// Quantized rows. VNNI multiplies unsigned by signed, so there the bytes hold value + 128, and the weights' column sums
// times 128 are taken off again.
struct Rows {
  const uint8_t* data;
  const float* scale;  // [rows]
  int64_t stride;      // bytes
};

// `rows` x (up to 4 panels) of a product and what happens to it. With an activation the first half of the panels are
// gates and the second half the matching ups: out = act(gate) * up, for half the panels.
struct Block {
  Rows a;
  int64_t rows, quads;              // quads: ceil(I / 4)
  int panels;                       // 1..4; even with an activation
  const int8_t* weight[kPanels];
  const int32_t* sum128[kPanels];   // 128 * sum over inputs
  const float* scale[kPanels];      // [16], padded
  const float* bias[kPanels];       // [valid] or null
  int valid[kPanels];               // channels of the panel that exist
  float* out[kPanels];              // first row's
  const float* residual[kPanels];   // first row's, added to the result, or null
  int64_t out_stride;               // floats; also the residual's
  Activation activation;
};

// Rounds rows of x (float32, `width` wide) to int8: x, or x / rms(x) * gain when gain is given.
struct Rounding {
  const float* x;
  int64_t stride, width;
  const float* gain;   // or null
  float eps;
  uint8_t* data;
  int64_t data_stride; // a multiple of 64, at least width
  float* scale;
};

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
