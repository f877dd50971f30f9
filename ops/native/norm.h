// A row's norm: what norm.cc computes of all rows, for handlers that round what is normed at once.

#pragma once

#include "common.h"

namespace jaxserve {

struct Norm {
  int64_t width;
  const float *scale, *bias;  // or null
  float eps;
  bool centred;  // the mean is taken off first
};

using NormRow = void (*)(const Norm&, const float* x, float* y);

// That of the instruction set in use.
NormRow norm_row();

}  // namespace jaxserve
