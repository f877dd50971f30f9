// What the parts of low-rank adapters share.

#pragma once

#include <cstdint>

#include "common.h"

namespace jaxserve::lora {

constexpr int MAX_TOKENS = 4;  // that a kernel takes at once, of one adapter

struct Kernels {
  int tokens;  // at once, at most
  // h[t][r] = x[t] . a[r] for up to `tokens` rows x and all R rows of a [R, I].
  void (*shrink)(const float* const* x, int count, const float* a, int ranks, int64_t inputs, float* h);
  // y[t] += sum_r h[t][r] * b[r] for columns [begin, end) of b [R, O].
  void (*expand)(const float* h, int count, const float* b, int ranks, int64_t outputs, int64_t begin, int64_t end,
                 float* const* y);
};

Kernels generic_kernels();
#if JAXSERVE_X86
Kernels avx2_kernels();
Kernels avx512_kernels();
#endif

}  // namespace jaxserve::lora
