// Plain C++: what runs where no instruction set is known, and the easiest to read.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocks/blocks.h"
#include "host_casts.h"
#include "int8.h"

namespace jaxserve::blocks {
namespace {

#define AT

float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0f + std::exp(-x));
    case Activation::kGeluTanh: return x / (1.0f + std::exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return std::max(x, 0.0f);
    case Activation::kNone: break;
  }
  return x;
}

void gate(const float* gates, const float* ups, Activation activation, float* out) {
  for (int c = 0; c < kPanel; ++c) out[c] = activated(gates[c], activation) * ups[c];
}

struct Sixteen {
  float at[kPanel];
};

Sixteen widened(const uint8_t* from, casts::Kind kind) {
  Sixteen out;
  casts::widen(from, kind, 0, kPanel, out.at);
  return out;
}
Sixteen floats(const uint8_t* from) { return widened(from, casts::Kind::kFloat32); }
Sixteen halves(const uint8_t* from) { return widened(from, casts::Kind::kFloat16); }
Sixteen brains(const uint8_t* from) { return widened(from, casts::Kind::kBfloat16); }
Sixteen bytes(const uint8_t* from) { return widened(from, casts::Kind::kUint8); }
Sixteen signed_bytes(const uint8_t* from) { return widened(from, casts::Kind::kInt8); }
Sixteen powers(const uint8_t* from) {
  Sixteen out;
  for (int c = 0; c < kPanel; ++c) out.at[c] = casts::as_float(static_cast<uint32_t>(from[c]) << 23);
  return out;
}
Sixteen same(float value) {
  Sixteen out;
  for (int c = 0; c < kPanel; ++c) out.at[c] = value;
  return out;
}
Sixteen times(Sixteen a, const Sixteen& b) {
  for (int c = 0; c < kPanel; ++c) a.at[c] *= b.at[c];
  return a;
}
void put(float* out, const Sixteen& value) { std::memcpy(out, value.at, sizeof value.at); }

void look_up(const uint8_t* table, const uint8_t* values, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = table[values[i]];
}

int64_t passes(const Form&, int64_t, bool) { return 1; }

int most(int64_t) { return 2; }

bool stored(int64_t) { return false; }

bool widens(const Form&, int64_t) { return false; }

bool crossed(const Form&) { return false; }

void unpack_crossed(const uint8_t*, int64_t, int64_t, uint8_t*, int32_t*) {}

void multiply(const Tile& t, const Chunk& chunk, int panels, float* sums) {
  const bool two = planes(*chunk.form) == 2;
  const int period = chunk.form->block < kStep ? 16 : kStep, parts = kStep / period;
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int p = 0; p < panels; ++p) {
      float* total = sums + (row * t.panels + p) * kPanel;
      for (int64_t step = 0; step < chunk.steps; ++step) {
        const Step& a = t.a.step(t.first_row + row, chunk.first_step + step);
        for (int c = 0; c < kPanel; ++c) {
          float scaled = 0.0f;
          for (int part = 0; part < parts; ++part) {
            int32_t product = 0;
            for (int64_t i = part * period; i < (part + 1) * period; ++i) {
              const uint8_t* at = chunk.values[p] + ((step * kStep + i) / 4 * kPanel + c) * 4 + i % 4;
              product += (two ? 256 * at[0] + at[chunk.plane] : at[0]) * a.value[i];
            }
            int32_t added = a.minus_sum[part];
            if (parts == 1) added += a.minus_sum[1];
            product += chunk.form->zero * added;
            scaled += static_cast<float>(product) * chunk.scale[p][(step * parts + part) * kPanel + c];
          }
          total[c] += scaled * a.scale;
          if (chunk.offset[p] != nullptr) {
            total[c] += chunk.offset[p][step * kPanel + c] * a.sum;
          }
        }
      }
    }
  }
}

#include "blocks/blocks_kernels.h"
#undef AT

}  // namespace

const Kernels kGenericKernels = {tile, round_row, channel};

const Kernels& kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kVnni) return kVnniKernels;
  if (isa() >= Isa::kAvx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

}  // namespace jaxserve::blocks
