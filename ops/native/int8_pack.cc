// From a dense weight to the packed int8 of int8.h in one pass over memory, for the loader: called from its threads, without
// XLA. What ops/linear/weights.py computes with `quantize` and `pack`.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "int8.h"

namespace jaxserve::int8 {
namespace {

constexpr float kMax = 127.0f;
// x + kMagic - kMagic rounds to the nearest integer, ties to even, for |x| < 2^22; unlike rintf every compiler vectorizes it.
constexpr float kMagic = 12582912.0f;

enum class Source : int64_t { kFloat32 = 0, kBfloat16 = 1 };

FORCE_INLINE void widen(const void* from, Source source, int64_t first, int64_t count, float* out) {
  if (source == Source::kFloat32) {
    std::memcpy(out, static_cast<const float*>(from) + first, count * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(from) + first;
  uint32_t* bits = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(half[i]) << 16;
}

// Rotated panels have whole groups of inputs. One panel: 16 channels from `first` on, of which `channels` exist. x and q hold one row and 16 rows of whole groups.
FORCE_INLINE void pack_panel(const void* from, Source source, int64_t first, int64_t channels, int64_t inputs,
                             bool rotated, int64_t quads, int64_t groups, float* x, int8_t* q, int8_t* panel, float* scale,
                             int16_t* sums) {
  const int64_t width = groups * kGroup;
  std::memset(q, 0, kPanel * width);
  for (int64_t c = 0; c < kPanel; ++c) {
    scale[c] = 0.0f;
    if (c >= channels) continue;
    widen(from, source, (first + c) * inputs, inputs, x);
    if (rotated) {
      for (int64_t i = 0; i < inputs; i += kGroup) rotate_group(x + i);
      for (int64_t i = 0; i < inputs; ++i) x[i] *= kRotation;
    }
    float peak = 0.0f;
    for (int64_t i = 0; i < inputs; ++i) peak = std::max(peak, std::fabs(x[i]));
    // A row of zeros gets scale 1; a denormal peak would overflow the division below.
    const float s = peak > 1e-30f ? peak / kMax : 1.0f;
    scale[c] = s;
    int8_t* row = q + c * width;
    for (int64_t i = 0; i < inputs; ++i) {
      const float rounded = (x[i] / s + kMagic) - kMagic;
      row[i] = static_cast<int8_t>(std::min(std::max(rounded, -kMax), kMax));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < kPanel; ++c) {
      int sum = 0;
      for (int64_t i = 0; i < kGroup; ++i) sum += q[c * width + g * kGroup + i];
      sums[g * kPanel + c] = static_cast<int16_t>(sum);
    }
  }
  for (int64_t quad = 0; quad < quads; ++quad) {
    for (int64_t c = 0; c < kPanel; ++c) {
      std::memcpy(panel + (quad * kPanel + c) * 4, q + c * width + quad * 4, 4);
    }
  }
}

using PackPanel = void (*)(const void*, Source, int64_t, int64_t, int64_t, bool, int64_t, int64_t, float*, int8_t*, int8_t*,
                           float*, int16_t*);

#define PACK_PANEL(name, target)                                                                                     \
  target void name(const void* from, Source source, int64_t first, int64_t channels, int64_t inputs, bool rotated,   \
                   int64_t quads, int64_t groups, float* x, int8_t* q, int8_t* panel, float* scale, int16_t* sums) { \
    pack_panel(from, source, first, channels, inputs, rotated, quads, groups, x, q, panel, scale, sums);             \
  }

PACK_PANEL(pack_generic, )
#if JAXSERVE_X86
PACK_PANEL(pack_avx2, TARGET_AVX2)
PACK_PANEL(pack_avx512, TARGET_AVX512)
#endif

PackPanel pack_for(Isa isa) {
#if JAXSERVE_X86
  if (isa >= Isa::kAvx512) return pack_avx512;
  if (isa >= Isa::kAvx2) return pack_avx2;
#endif
  return pack_generic;
}

}  // namespace
}  // namespace jaxserve::int8

// Quantizes and packs a weight [outputs, inputs]: panels int8 [ceil(outputs / 16)][ceil(inputs / 4)][16][4], scale float32 and
// sums int16 as in int8.h. `source`: 0 float32, 1 bfloat16. Rotated
// weights have a multiple of 64 inputs.
JAXSERVE_EXPORT void jaxserve_int8_pack(const void* from, int64_t source, int64_t outputs, int64_t inputs, int64_t rotated,
                                        int8_t* panels, float* scale, int16_t* sums) {
  using namespace jaxserve::int8;
  const int64_t quads = jaxserve::ceil_div(inputs, 4), groups = jaxserve::ceil_div(inputs, kGroup);
  std::vector<float> x(inputs);
  std::vector<int8_t> q(kPanel * groups * kGroup);
  const PackPanel pack = pack_for(jaxserve::isa());
  for (int64_t first = 0; first < outputs; first += kPanel) {
    pack(from, static_cast<Source>(source), first, std::min<int64_t>(kPanel, outputs - first), inputs, rotated,
         quads, groups,
         x.data(), q.data(), panels + first * quads * 4, scale + first, sums + first * groups);
  }
}
