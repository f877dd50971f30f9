// A feed-forward block without gates in one call: out = act(norm(x) U^T + b) D^T + c + residual. Of many rows each thread takes some
// through the whole block, so that what is between its products never leaves the thread's cache; few rows are shared by columns.

#include "int8_product.h"

namespace jaxserve::int8 {
namespace {

ffi::Error mlp(ffi::ThreadPool pool, F32 x, F32 gain, F32 shift, S8 up_packed, F32 up_scale, S16 up_sums, F32 up_bias,
               S8 down_packed, F32 down_scale, S16 down_sums, F32 down_bias, F32 residual, ffi::ResultBuffer<ffi::F32> out,
               float eps, int64_t centred, int64_t activation, int64_t up_rotated, int64_t down_rotated) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = out->dimensions()[1];
  const int64_t width = up_packed.dimensions()[0] * kPanel;
  auto up = weight_of(up_packed, up_scale, up_sums, up_bias, width, inputs);
  if (up.has_error()) return up.error();
  auto down = weight_of(down_packed, down_scale, down_sums, down_bias, outputs, width);
  if (down.has_error()) return down.error();
  if ((up_rotated && inputs % kGroup != 0) || (down_rotated && width % kGroup != 0))
    return ffi::Error::InvalidArgument(kRagged);
  const Normed norm{gain, shift, eps, centred != 0};
  if (!norm.fits(inputs)) return ffi::Error::InvalidArgument(kNorm);
  const Norm of_row = norm.row(inputs);
  const Norm* const first = norm.centred ? &of_row : nullptr;
  const Activation after = static_cast<Activation>(activation);
  const int workers = Phases::max_workers(pool);
  const float* const rest = optional(residual);
  float* const to = out->typed_data();
  const Stretches own(x.typed_data(), rows, inputs, workers);
  const bool apart = own.worth(*up, {}) && own.worth(*down, {});
  Phases phases;
  if (apart && own.many()) {
    phases.add_apart(in_rehearsal(own.count()), workers, [&, &k = kernels()](int64_t i, int) {
      const int64_t begin = own.begin(i), count = own.rows(i), at = begin * outputs;
      const float* const from = x.typed_data() + begin * inputs;
      const Rounding a = rounded(k, from, count, inputs, norm.gain(), eps, up_rotated != 0, 4, first);
      float* const hidden = static_cast<float*>(scratch(5, count * width * sizeof(float)));
      product_of(k, a, count, *up, hidden, nullptr, after);
      const Rounding h = rounded(k, hidden, count, width, nullptr, 0.0f, down_rotated != 0, 6);
      product_of(k, h, count, *down, to + at, rest == nullptr ? nullptr : rest + at, Activation::kNone);
    });
  } else {
    // A group of rows goes through the whole block before the next.
    constexpr int64_t kMost = 4 * kRowBlock;
    const int64_t group = std::min(rows, kMost);
    const Rounding a = rounding(x.typed_data(), rows, inputs, norm.gain(), eps, up_rotated != 0, 0);
    float* const hidden = static_cast<float*>(scratch(1, group * width * sizeof(float)));
    const Rounding h = rounding(hidden, group, width, nullptr, 0.0f, down_rotated != 0, 2);
    add_rounding(phases, a, rows, {}, workers, first);
    for (int64_t begin = 0; begin < rows; begin += group) {
      const int64_t count = std::min(group, rows - begin);
      const Cut cut = apart ? Stretches(x.typed_data() + begin * inputs, count, inputs, workers).cut() : in_blocks(count);
      Rounding some = a;
      some.data += begin * a.groups * kGroup;
      some.scale += begin * a.groups;
      add_product(phases, some, *up, cut, hidden, nullptr, {}, workers, after);
      add_rounding(phases, h, count, {}, workers);
      add_product(phases, h, *down, cut, to + begin * outputs, rest == nullptr ? nullptr : rest + begin * outputs, {}, workers);
    }
  }
  phases.run(pool);
  if (rehearsing()) std::memset(to, 0, out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::int8

JAXSERVE_HANDLER(jaxserve_int8_mlp, jaxserve::int8::mlp,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, D]
                     .Arg<jaxserve::int8::F32>()  // gain [D] or [0]
                     .Arg<jaxserve::int8::F32>()  // shift [D] or [0], of a centred norm
                     .Arg<jaxserve::int8::S8>()   // up: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S8>()   // down: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::F32>()  // residual [T, D] or [0]
                     .Ret<jaxserve::int8::F32>()  // [T, D]
                     .Attr<float>("eps")
                     .Attr<int64_t>("centred")
                     .Attr<int64_t>("activation")
                     .Attr<int64_t>("up_rotated")
                     .Attr<int64_t>("down_rotated"));
