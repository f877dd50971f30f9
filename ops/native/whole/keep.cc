// Keys and values that are kept, as paged attention reads pages that nobody writes to: of each 16 positions a page of K and behind
// it one of V, in bfloat16 (`keep` in ops/paged_attention/whole.py). The products that make them and their layout are one call: in
// float32 they never leave a thread's cache.

#include <algorithm>
#include <cstring>
#include <vector>

#include "int8_product.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#endif

namespace jaxserve {
namespace {

constexpr int kPage = 16;

#define ISA generic
#define AT
#define W 4
#include "keep_kernels.h"
#undef ISA
#undef AT
#undef W

#if JAXSERVE_X86
#define ISA avx2
#define AT TARGET_AVX2
#define W 8
#include "keep_kernels.h"
#undef ISA
#undef AT
#undef W

#define ISA avx512
#define AT TARGET_AVX512
#define W 16
#include "keep_kernels.h"
#undef ISA
#undef AT
#undef W
#endif

auto kernel() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return avx512::keep_page;
  if (isa() >= Isa::kAvx2) return avx2::keep_page;
#endif
  return generic::keep_page;
}

constexpr int64_t kRows = 3 * kPage;  // that a thread takes through all products at once

using F32 = ffi::Buffer<ffi::F32>;
using int8::Weight;

// Of x [S, D], normed, with each of several weights [H, K and V, h; D] the product: [weights][pages][K and V][H] of pages of a head.
ffi::Error keep(ffi::ThreadPool pool, F32 x, F32 gain, F32 shift, ffi::RemainingArgs operands, ffi::ResultBuffer<ffi::U16> out,
                float eps, int64_t centred, int64_t rotated, int64_t heads) {
  const int64_t S = x.dimensions()[0], inputs = x.dimensions()[1], parts = operands.size() / 4;
  const int64_t pages = ceil_div(S, kPage), size = out->element_count() / std::max<int64_t>(1, parts * pages);
  const int64_t width = size / kPage, h = width / (2 * std::max<int64_t>(1, heads));
  const int8::Normed norm{gain, shift, eps, centred != 0};
  if (!norm.fits(inputs)) return ffi::Error::InvalidArgument(int8::kNorm);
  if (rotated && inputs % int8::kGroup != 0) return ffi::Error::InvalidArgument(int8::kRagged);
  if (parts == 0 || operands.size() % 4 != 0 || h % kPage != 0 || 2 * heads * h != width ||
      size * parts * pages != static_cast<int64_t>(out->element_count()))
    return ffi::Error::InvalidArgument("what is kept are keys and values of heads of whole vectors");
  std::vector<Weight> weights;
  for (int64_t i = 0; i < 4 * parts; i += 4) {
    const auto packed = operands.get<ffi::Buffer<ffi::S8>>(i);
    const auto scale = operands.get<F32>(i + 1), bias = operands.get<F32>(i + 3);
    const auto sums = operands.get<ffi::Buffer<ffi::S16>>(i + 2);
    if (packed.has_error() || scale.has_error() || sums.has_error() || bias.has_error())
      return ffi::Error::InvalidArgument("what is kept is made by int8 weights");
    auto weight = int8::weight_of(*packed, *scale, *sums, *bias, width, inputs);
    if (weight.has_error()) return weight.error();
    weights.push_back(*weight);
  }
  const Norm of_row = norm.row(inputs);
  const auto use = kernel();
  uint16_t* const to = out->typed_data();
  Phases phases;
  phases.add_apart(in_rehearsal(ceil_div(S, kRows)), Phases::max_workers(pool), [&, &k = int8::kernels()](int64_t chunk, int) {
    const int64_t begin = chunk * kRows, count = std::min(kRows, S - begin);
    const float* const from = x.typed_data() + begin * inputs;
    const Norm* const centred = norm.centred ? &of_row : nullptr;
    const int8::Rounding a = int8::rounded(k, from, count, inputs, norm.gain(), eps, rotated != 0, 4, centred);
    float* const made = static_cast<float*>(scratch(5, kRows * width * sizeof(float)));
    for (int64_t part = 0; part < parts; ++part) {
      int8::product_of(k, a, count, weights[part], made, nullptr, int8::Activation::kNone);
      for (int64_t row = 0; row < count; row += kPage)
        use(made + row * width, static_cast<int>(std::min<int64_t>(kPage, count - row)), static_cast<int>(heads),
            static_cast<int>(h), to + (part * pages + (begin + row) / kPage) * size);
    }
  });
  phases.run(pool);
  if (rehearsing()) std::memset(to, 0, out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_int8_keep, jaxserve::keep,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::F32>()                     // x [S, D]
                     .Arg<jaxserve::F32>()                     // gain [D] or [0]
                     .Arg<jaxserve::F32>()                     // shift [D] or [0], of a centred norm
                     .RemainingArgs()                          // of each part's weight: packed, scale, sums, bias
                     .Ret<xla::ffi::Buffer<xla::ffi::U16>>()   // the bits of bfloat16
                     .Attr<float>("eps")
                     .Attr<int64_t>("centred")
                     .Attr<int64_t>("rotated")
                     .Attr<int64_t>("heads"));
