// What the parts of low-rank adapters share.

#pragma once

#include <cstdint>

#include "common.h"

namespace jaxserve::lora {

using Bits = uint16_t;  // a bfloat16

constexpr int kBlock = 16;  // tokens of one adapter that share what is fetched of it

// Columns [begin, end) take the products with A's rows from `rank` on.
struct Columns {
  int64_t begin, end;
  int rank;
};

// E is how the matrices are stored: float or Bits.
template <typename E>
struct Kernels {
  // h[t][r] = x[t] . a[r] for up to kBlock rows x and all rows of a [ranks, inputs].
  void (*shrink)(const float* const* x, int count, const E* a, int ranks, int64_t inputs, float* h);
  // y[t] += sum_r h[t][r] * b[r] in the given columns of b [ranks, outputs]; a row of h has `stride` numbers.
  void (*expand)(const float* h, int stride, int count, const E* b, int ranks, int64_t outputs, int64_t begin,
                 int64_t end, float* const* y);
};

template <typename E>
Kernels<E> generic_kernels();
#if JAXSERVE_X86
template <typename E>
Kernels<E> avx2_kernels();
template <typename E>
Kernels<E> avx512_kernels();
Kernels<Bits> bf16_kernels();  // products of pairs of bfloat16, added up in float32: x and h are rounded to it
#endif

}  // namespace jaxserve::lora
