// Casts of whole tensors for the loader: called from its threads, without XLA. See ops/casts.py.

#include <algorithm>

#include "host_casts.h"

namespace jaxserve::casts {
namespace {

constexpr int64_t kBlock = 1024;  // numbers whose float32 is on the way: 4 KB, in the first cache

FORCE_INLINE void cast_all(const void* from, Kind source, void* to, Kind target, int64_t count) {
  if (target == Kind::kFloat32) {
    widen(from, source, 0, count, static_cast<float*>(to));
    return;
  }
  float wide[kBlock];
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    widen(from, source, first, size, wide);
    for (int64_t i = 0; i < size; ++i) out[first + i] = to_bfloat16(wide[i]);
  }
}

FORCE_INLINE void scale_all(const void* from, Kind source, float* out, int64_t rows, int64_t columns, const float* scale,
                            const float* zero, int64_t block_rows, int64_t block_columns) {
  const int64_t across = ceil_div(columns, block_columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < across; ++block) {
      const int64_t begin = block * block_columns, size = std::min(block_columns, columns - begin);
      float* part = out + row * columns + begin;
      widen(from, source, row * columns + begin, size, part);
      const int64_t at = row / block_rows * across + block;
      const float factor = scale[at], none = zero == nullptr ? 0.0f : zero[at];
      for (int64_t i = 0; i < size; ++i) part[i] = (part[i] - none) * factor;
    }
  }
}

using CastAll = void (*)(const void*, Kind, void*, Kind, int64_t);
using ScaleAll = void (*)(const void*, Kind, float*, int64_t, int64_t, const float*, const float*, int64_t, int64_t);

#define CASTS(name, target)                                                                                    \
  target void cast_##name(const void* from, Kind source, void* to, Kind kind, int64_t count) {                 \
    cast_all(from, source, to, kind, count);                                                                   \
  }                                                                                                            \
  target void scale_##name(const void* from, Kind source, float* out, int64_t rows, int64_t columns,           \
                           const float* scale, const float* zero, int64_t block_rows, int64_t block_columns) { \
    scale_all(from, source, out, rows, columns, scale, zero, block_rows, block_columns);                       \
  }

CASTS(generic, )
#if JAXSERVE_X86
CASTS(avx2, TARGET_AVX2)
CASTS(avx512, TARGET_AVX512)
#endif

}  // namespace
}  // namespace jaxserve::casts

// `count` numbers from one kind to another, to float32 or bfloat16 (rounded to the nearest).
JAXSERVE_EXPORT void jaxserve_cast(const void* from, int64_t source, void* to, int64_t target, int64_t count) {
  using namespace jaxserve::casts;
  CastAll cast = cast_generic;
#if JAXSERVE_X86
  if (jaxserve::isa() >= jaxserve::Isa::kAvx512) cast = cast_avx512;
  else if (jaxserve::isa() >= jaxserve::Isa::kAvx2) cast = cast_avx2;
#endif
  cast(from, static_cast<Kind>(source), to, static_cast<Kind>(target), count);
}

// A matrix [rows, columns] to float32, each block of it less its zero (null: none) and times its scale: [ceil(rows / block_rows)]
// [ceil(columns / block_columns)].
JAXSERVE_EXPORT void jaxserve_cast_scaled(const void* from, int64_t source, float* out, int64_t rows, int64_t columns,
                                          const float* scale, const float* zero, int64_t block_rows,
                                          int64_t block_columns) {
  using namespace jaxserve::casts;
  ScaleAll scaled = scale_generic;
#if JAXSERVE_X86
  if (jaxserve::isa() >= jaxserve::Isa::kAvx512) scaled = scale_avx512;
  else if (jaxserve::isa() >= jaxserve::Isa::kAvx2) scaled = scale_avx2;
#endif
  scaled(from, static_cast<Kind>(source), out, rows, columns, scale, zero, block_rows, block_columns);
}
