// Rows sorted into groups, each multiplied by its group's matrix, read where it lies: `jax.lax.ragged_dot` for CPUs, which XLA
// expands to a product with every group.

#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross from one instruction set to another
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm256_undefined_pd
#endif

namespace jaxserve {
namespace {

#define ISA generic
#define AT
#define W 4
#define ROWS 2
#define OUTS 2
#include "grouped_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef OUTS
#if JAXSERVE_X86
#define ISA avx2
#define AT TARGET_AVX2
#define W 8
#define ROWS 3
#define OUTS 4
#include "grouped_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef OUTS
#define ISA avx512
#define AT TARGET_AVX512
#define W 16
#define ROWS 4
#define OUTS 4
#include "grouped_kernels.h"
#undef ISA
#undef AT
#undef W
#undef ROWS
#undef OUTS
#endif

// Outputs a chunk: small enough to deal out, large enough that starting a chunk costs nothing.
constexpr int64_t kOutputs = 64;

struct Group {
  int64_t index, first, rows;
};

template <typename T>
using Dot = void (*)(const float*, int64_t, const T*, int64_t, int64_t, float*, int64_t);

template <typename T>
Dot<T> dot_for(Isa isa) {
#if JAXSERVE_X86
  if (isa >= Isa::kAvx512) return avx512::dot<T>;
  if (isa >= Isa::kAvx2) return avx2::dot<T>;
#endif
  return generic::dot<T>;
}

template <ffi::DataType kType, typename T>
ffi::Error grouped_dot(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                       ffi::Buffer<kType> weights, ffi::ResultBuffer<ffi::F32> out) {
  const auto dims = weights.dimensions();
  const int64_t groups = dims[0], outputs = dims[1], inputs = dims[2], rows = x.dimensions()[0];
  if (x.dimensions()[1] != inputs || static_cast<int64_t>(sizes.element_count()) != groups ||
      out->dimensions()[0] != rows || out->dimensions()[1] != outputs) {
    return ffi::Error::InvalidArgument("grouped_dot: rows, sizes and matrices do not fit each other");
  }
  std::vector<Group> chosen;
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = std::min<int64_t>(std::max(sizes.typed_data()[g], 0), rows - first);
    if (count > 0) chosen.push_back({g, first, count});
    first += count;
  }
  float* y = out->typed_data();
  std::fill(y + first * outputs, y + rows * outputs, 0.0f);  // rows behind the last group
  const T* matrices = reinterpret_cast<const T*>(weights.untyped_data());
  const float* from = x.typed_data();
  const Dot<T> dot = dot_for<T>(isa());
  const int64_t columns = ceil_div(outputs, kOutputs);
  parallel_for(pool, static_cast<int64_t>(chosen.size()) * columns, [=, &chosen](int64_t chunk, int) {
    const Group& group = chosen[chunk / columns];
    const int64_t o = chunk % columns * kOutputs;
    dot(from + group.first * inputs, group.rows, matrices + (group.index * outputs + o) * inputs,
        std::min(kOutputs, outputs - o), inputs, y + group.first * outputs + o, outputs);
  });
  return ffi::Error::Success();
}

ffi::Error grouped_dot_f32(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                           ffi::Buffer<ffi::F32> weights, ffi::ResultBuffer<ffi::F32> out) {
  return grouped_dot<ffi::F32, float>(pool, x, sizes, weights, out);
}

ffi::Error grouped_dot_bf16(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> sizes,
                            ffi::Buffer<ffi::BF16> weights, ffi::ResultBuffer<ffi::F32> out) {
  return grouped_dot<ffi::BF16, uint16_t>(pool, x, sizes, weights, out);
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_grouped_dot_f32, jaxserve::grouped_dot_f32,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // x [M, I], sorted by group
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // rows of each group [E]
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // weights [E, O, I]
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>());  // [M, O]

JAXSERVE_HANDLER(jaxserve_grouped_dot_bf16, jaxserve::grouped_dot_bf16,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                     .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
