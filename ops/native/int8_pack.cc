// From a dense weight to the packed int8 of int8.h in one pass over memory, for the loader: called from its threads, without
// XLA. What ops/linear/weights/int8.py computes with `quantize` and `pack`.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "host_casts.h"
#include "int8.h"

namespace jaxserve::int8 {
namespace {

constexpr float kMax = 127.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it to a float leaves an integer in its low bits

namespace generic {
#define AT
#define W 4
#include "int8_pack_kernels.h"
#undef AT
#undef W
}  // namespace generic

#if JAXSERVE_X86
namespace avx2 {
#define AT TARGET_AVX2
#define W 8
#include "int8_pack_kernels.h"
#undef AT
#undef W
}  // namespace avx2

namespace avx512 {
#define AT TARGET_AVX512
#define W 16
#include "int8_pack_kernels.h"
#undef AT
#undef W
}  // namespace avx512
#endif

auto pack_for(Isa isa) {
#if JAXSERVE_X86
  if (isa >= Isa::kAvx512) return avx512::pack_panel;
  if (isa >= Isa::kAvx2) return avx2::pack_panel;
#endif
  return generic::pack_panel;
}

}  // namespace
}  // namespace jaxserve::int8

// Quantizes and packs a weight [outputs, inputs]: panels int8 [ceil(outputs / 16)][ceil(inputs / 4)][16][4], scale float32 and
// sums int16 as in int8.h. `source`: a kind of host_casts.h. Rotated weights have a multiple of 64 inputs.
JAXSERVE_EXPORT void jaxserve_int8_pack(const void* from, int64_t source, int64_t outputs, int64_t inputs, int64_t rotated,
                                        int8_t* panels, float* scale, int16_t* sums) {
  using namespace jaxserve::int8;
  const int64_t quads = jaxserve::ceil_div(inputs, 4), groups = jaxserve::ceil_div(inputs, kGroup);
  // A cache line more than a row: rows that lie a power of two apart would share few sets of the first cache.
  const int64_t stride = (groups + 1) * kGroup;
  std::vector<float> x(groups * kGroup);
  std::vector<int8_t> q(kPanel * stride);
  const auto pack = pack_for(jaxserve::isa());
  for (int64_t first = 0; first < outputs; first += kPanel) {
    pack(from, static_cast<jaxserve::casts::Kind>(source), first, std::min<int64_t>(kPanel, outputs - first), inputs,
         rotated != 0, x.data(), q.data(), stride, panels + first * quads * 4, scale + first, sums + first * groups);
  }
}
