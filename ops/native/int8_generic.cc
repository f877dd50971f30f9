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
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.707106781f));
    case Activation::kQuickGelu:
      return x / (1.0f + std::exp(-1.702f * x));
    case Activation::kNone:
      break;
  }
  return x;
}

void block(const Block& b) {
  const int half = b.activation == Activation::kNone ? b.panels : b.panels / 2;
  const int64_t groups = b.a.stride / kGroup;
  for (int64_t row = 0; row < b.rows; ++row) {
    const int8_t* a = reinterpret_cast<const int8_t*>(b.a.data) + row * b.a.stride;
    float result[kPanels][kPanel];
    for (int p = 0; p < b.panels; ++p) {
      float total[kPanel] = {};
      const int8_t* w = b.weight[p];
      for (int64_t group = 0; group * kQuads < b.quads; ++group) {
        int32_t sum[kPanel] = {};
        for (int64_t quad = group * kQuads; quad < std::min(b.quads, (group + 1) * kQuads); ++quad, w += 4 * kPanel) {
          for (int c = 0; c < kPanel; ++c) {
            for (int i = 0; i < 4; ++i) sum[c] += int32_t{a[4 * quad + i]} * w[4 * c + i];
          }
        }
        const float scale = b.a.scale[row * groups + group];
        for (int c = 0; c < kPanel; ++c) total[c] += static_cast<float>(sum[c]) * scale;
      }
      for (int c = 0; c < kPanel; ++c) {
        const float bias = b.bias[p] != nullptr && c < b.valid[p] ? b.bias[p][c] : 0.0f;
        result[p][c] = total[c] * b.scale[p][c] + bias;
        if (b.change != nullptr) result[p][c] += b.change[(row * kPanels + p) * kPanel + c];
      }
    }
    for (int p = 0; p < half; ++p) {
      for (int c = 0; c < b.valid[p]; ++c) {
        float value = result[p][c];
        if (half != b.panels) value = activate(b.activation, value) * result[p + half][c];
        value = activate(b.after, value);
        if (b.residual[p] != nullptr) value += b.residual[p][row * b.out_stride + c];
        b.out[p][row * b.out_stride + c] = value;
      }
    }
  }
}

void round_row(const Rounding& r, int64_t row) {
  const float* x = r.x + row * r.stride;
  int8_t* data = reinterpret_cast<int8_t*>(r.data) + r.at(row) * kGroup;
  float* scale = r.scale + r.at(row);
  float squares = 0.0f;
  for (int64_t group = 0; group < r.groups; ++group) {
    float value[kGroup] = {}, peak = 0.0f;
    for (int64_t i = group * kGroup, j = 0; i < std::min(r.width, (group + 1) * kGroup); ++i, ++j) {
      squares += x[i] * x[i];
      value[j] = r.gain == nullptr ? x[i] : x[i] * r.gain[i];
    }
    if (r.rotated) rotate_group(value);
    for (int j = 0; j < kGroup; ++j) peak = std::max(peak, std::abs(value[j]));
    const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    for (int j = 0; j < kGroup; ++j) data[group * kGroup + j] = static_cast<int8_t>(std::nearbyint(value[j] * inverse));
    scale[group] = peak / 127.0f * (r.rotated ? kRotation : 1.0f);
  }
  if (r.gain == nullptr) return;
  // The norm is one factor a row: rounding does not see it, the scales take it.
  const float norm = 1.0f / std::sqrt(squares / static_cast<float>(r.width) + r.eps);
  for (int64_t group = 0; group < r.groups; ++group) scale[group] *= norm;
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
