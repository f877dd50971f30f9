// Norms of rows. XLA sums a row in one order or another as the number of rows and what stands around ask, so its last bit depends
// on what else is in a step; here it does not.

#include <algorithm>
#include <cmath>

#include "norm.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve {
namespace {

#define ISA generic
#define AT
#define W 4
#include "norm_kernels.h"
#undef ISA
#undef AT
#undef W

#if JAXSERVE_X86
#define ISA avx2
#define AT TARGET_AVX2
#define W 8
#include "norm_kernels.h"
#undef ISA
#undef AT
#undef W

#define ISA avx512
#define AT TARGET_AVX512
#define W 16
#include "norm_kernels.h"
#undef ISA
#undef AT
#undef W
#endif

}  // namespace

NormRow norm_row() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return avx512::norm_row;
  if (isa() >= Isa::kAvx2) return avx2::norm_row;
#endif
  return generic::norm_row;
}

namespace {

constexpr int64_t kFloatsAChunk = 16384;  // below so many, waking another thread costs more than it saves

using F32 = ffi::Buffer<ffi::F32>;

ffi::Error norm(ffi::ThreadPool pool, F32 x, F32 scale, F32 bias, ffi::ResultBuffer<ffi::F32> y, float eps,
                int64_t centred) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const auto given = [&](const F32& of) { return of.element_count() == 0 ? nullptr : of.typed_data(); };
  for (const F32* of : {&scale, &bias}) {
    if (of->element_count() != 0 && static_cast<int64_t>(of->element_count()) != width)
      return ffi::Error::InvalidArgument("a norm's scale or bias is of another width than its rows");
  }
  const Norm how{width, given(scale), given(bias), eps, centred != 0};
  const NormRow use = norm_row();
  const int64_t step = std::max<int64_t>(1, kFloatsAChunk / std::max<int64_t>(width, 1));
  parallel_for(pool, ceil_div(rows, step), [&](int64_t chunk, int) {
    for (int64_t row = chunk * step; row < std::min(rows, (chunk + 1) * step); ++row)
      use(how, x.typed_data() + row * width, y->typed_data() + row * width);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_norm, jaxserve::norm,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::F32>()  // x [R, D]
                     .Arg<jaxserve::F32>()  // scale [D] or [0]
                     .Arg<jaxserve::F32>()  // bias [D] or [0]
                     .Ret<jaxserve::F32>()  // [R, D]
                     .Attr<float>("eps")
                     .Attr<int64_t>("centred"));
