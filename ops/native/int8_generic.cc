// Plain C++: what runs where no instruction set is known, and the easiest to read.

#include <algorithm>
#include <cmath>

#include "int8.h"

namespace jaxserve::int8 {
namespace {

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kGeluTanh:
      return x / (1.0f + std::exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return std::max(x, 0.0f);
    case Activation::kNone:
      break;
  }
  return x;
}

void block(const Block& b) {
  const int half = b.activation == Activation::kNone ? b.panels : b.panels / 2;
  for (int64_t row = 0; row < b.rows; ++row) {
    const int8_t* a = reinterpret_cast<const int8_t*>(b.a.data) + row * b.a.stride;
    float result[kPanels][kPanel];
    for (int p = 0; p < b.panels; ++p) {
      int32_t sum[kPanel] = {};
      const int8_t* w = b.weight[p];
      for (int64_t quad = 0; quad < b.quads; ++quad, w += 4 * kPanel) {
        for (int c = 0; c < kPanel; ++c) {
          for (int i = 0; i < 4; ++i) sum[c] += int32_t{a[4 * quad + i]} * w[4 * c + i];
        }
      }
      for (int c = 0; c < kPanel; ++c) {
        const float bias = b.bias[p] != nullptr && c < b.valid[p] ? b.bias[p][c] : 0.0f;
        result[p][c] = static_cast<float>(sum[c]) * (b.a.scale[row] * b.scale[p][c]) + bias;
      }
    }
    for (int p = 0; p < half; ++p) {
      for (int c = 0; c < b.valid[p]; ++c) {
        float value = result[p][c];
        if (half != b.panels) value = activate(b.activation, value) * result[p + half][c];
        if (b.residual[p] != nullptr) value += b.residual[p][row * b.out_stride + c];
        b.out[p][row * b.out_stride + c] = value;
      }
    }
  }
}

void round_row(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  float squares = 0.0f, peak = 0.0f;
  for (int64_t i = 0; i < r.width; ++i) {
    const float value = r.gain == nullptr ? x[i] : x[i] * r.gain[i];
    squares += x[i] * x[i];
    peak = std::max(peak, std::abs(value));
  }
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  int8_t* data = reinterpret_cast<int8_t*>(r.data) + row * r.data_stride;
  for (int64_t i = 0; i < r.width; ++i) {
    const float value = r.gain == nullptr ? x[i] : x[i] * r.gain[i];
    data[i] = static_cast<int8_t>(std::nearbyint(value * inverse));
  }
  for (int64_t i = r.width; i < (r.width + 3) / 4 * 4; ++i) data[i] = 0;
  // The norm is one factor a row: rounding does not see it, the scale takes it.
  const float norm = r.gain == nullptr ? 1.0f : 1.0f / std::sqrt(squares / static_cast<float>(r.width) + r.eps);
  r.scale[row] = peak > 1e-30f ? peak * norm / 127.0f : norm;
}

}  // namespace

const Kernels kGenericKernels = {block, round_row};

const Kernels& kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kVnni) return kVnniKernels;
  if (isa() >= Isa::kAvx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace jaxserve::int8
