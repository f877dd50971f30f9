// Attention of towers as XLA calls it: a phase that rounds keys and values, and one in which the queries meet them.

#include <algorithm>
#include <cstring>

#include "whole.h"

namespace jaxserve::whole {
namespace {

constexpr float kBitsANat = 1.44269504089f;

using F32 = ffi::Buffer<ffi::F32>;

Kernels kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kVnni) return vnni_kernels();
#endif
  return generic_kernels();
}

// qkv [R S, H, 3, h], cos and sin [R S, h / 2] or empty, count [R] to out [R S, H, h].
ffi::Error attend_whole(ffi::ThreadPool pool, F32 qkv, F32 cos, F32 sin, ffi::Buffer<ffi::S32> count,
                        ffi::ResultBuffer<ffi::F32> out, float scale) {
  const auto dims = qkv.dimensions();
  const int64_t T = dims[0], H = dims[1], h = dims[3], R = count.dimensions()[0];
  const int64_t S = R == 0 ? 0 : T / R, half = cos.element_count() == 0 ? 0 : cos.dimensions()[1];
  if (h > kWidest || 2 * half > h || S * R != T)
    return ffi::Error::InvalidArgument("attention among all: heads of up to 256 channels, angles for half of them");
  Heads of{qkv.typed_data(), 3 * H * h, 3 * h, nullptr, nullptr, static_cast<int>(half), static_cast<int>(h),
           static_cast<int>(ceil_div(h, 4)), static_cast<int>(ceil_div(h, kPanel) * kPanel), scale * kBitsANat};
  const auto in_row = [=, cos = cos.typed_data(), sin = sin.typed_data()](int64_t r) {
    Heads row = of;
    row.qkv += r * S * of.token;
    if (half > 0) row.cos = cos + r * S * half, row.sin = sin + r * S * half;
    return row;
  };
  const auto keys = [=, counts = count.typed_data()](int64_t r) { return std::clamp<int64_t>(counts[r], 0, S); };
  const int64_t stretches = ceil_div(S, kStretch), tiles = ceil_div(S, kTile), size = Stretch::bytes(of);
  char* const memory = static_cast<char*>(scratch(0, R * H * stretches * size));
  const Kernels use = kernels();
  const int workers = Phases::max_workers(pool);
  Phases phases;
  phases.add_apart(in_rehearsal(R * H * stretches), workers, [=](int64_t i, int) {
    const int64_t r = i / (H * stretches), begin = i % stretches * kStretch, left = keys(r) - begin;
    const Heads row = in_row(r);
    if (left > 0) use.lay(row, static_cast<int>(i / stretches % H), begin, Stretch::at(memory + i * size, row, left));
  });
  float* const to = out->typed_data();
  phases.add_apart(in_rehearsal(R * H * tiles), workers, [=](int64_t i, int) {
    const int64_t r = i / (H * tiles), head = i / tiles % H, first = i % tiles * kTile;
    const int64_t rows = std::clamp<int64_t>(keys(r) - first, 0, kTile), all = std::min<int64_t>(kTile, S - first);
    float* const at = to + (r * S + first) * H * h + head * h;
    for (int64_t row = rows; row < all; ++row) std::memset(at + row * H * h, 0, sizeof(float) * h);
    if (rows > 0)
      use.attend(in_row(r), static_cast<int>(head), first, static_cast<int>(rows), memory + (r * H + head) * stretches * size,
                 keys(r), at, H * h);
  });
  phases.run(pool);
  if (rehearsing()) std::memset(to, 0, out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::whole

JAXSERVE_HANDLER(jaxserve_attend_whole, jaxserve::whole::attend_whole,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::whole::F32>()             // qkv [R S, H, 3, h]
                     .Arg<jaxserve::whole::F32>()             // cos [R S, half] or empty
                     .Arg<jaxserve::whole::F32>()             // sin
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // count [R]
                     .Ret<jaxserve::whole::F32>()             // [R S, H, h]
                     .Attr<float>("scale"));
