// The int8 products as XLA calls them: rounding of the activations, product, and everything around it in one call.

#include "int8_gated.h"

namespace jaxserve::int8 {
namespace {

ffi::Error product(ffi::ThreadPool& pool, F32 x, const Normed& norm, S8 packed, F32 scale, S16 sums, F32 bias, F32 residual,
                   const Adapters* adapters, ffi::ResultBuffer<ffi::F32>& out, int64_t rotated, Activation after) {
  const auto dims = x.dimensions();
  const int64_t rows = dims[0], inputs = dims[1], outputs = out->dimensions()[1];
  auto weight = weight_of(packed, scale, sums, bias, outputs, inputs);
  if (weight.has_error()) return weight.error();
  if (residual.element_count() != 0 && residual.element_count() != out->element_count()) {
    return ffi::Error::InvalidArgument("the residual does not fit the result");
  }
  if (rotated && inputs % kGroup != 0) return ffi::Error::InvalidArgument(kRagged);
  Beside beside;
  Change change;
  if (const char* wrong = read(adapters, rows, inputs, outputs, beside, change)) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (!norm.fits(inputs)) return ffi::Error::InvalidArgument(kNorm);
  const Norm of_row = norm.row(inputs);
  const Norm* const centred = norm.centred ? &of_row : nullptr;
  const int workers = Phases::max_workers(pool);
  const float* const rest = optional(residual);
  float* const to = out->typed_data();
  const Stretches own(x.typed_data(), rows, inputs, workers);
  const bool apart = own.worth(*weight, change);
  Phases phases;
  if (apart && own.many()) {
    const bool lasting = is_lasting(rows, *weight, to);
    phases.add_apart(in_rehearsal(own.count()), workers, [&, lasting, &k = kernels()](int64_t i, int) {
      const int64_t begin = own.begin(i), count = own.rows(i), at = begin * outputs;
      const float* const from = x.typed_data() + begin * inputs;
      const Rounding a = rounded(k, from, count, inputs, norm.gain(), norm.eps, rotated, 4, centred);
      product_of(k, a, count, *weight, to + at, rest == nullptr ? nullptr : rest + at, after, lasting);
    });
  } else {
    const Rounding a = rounding(x.typed_data(), rows, inputs, norm.gain(), norm.eps, rotated, 0);
    add_rounding(phases, a, rows, change, workers, centred);
    add_product(phases, a, *weight, apart ? own.cut() : in_blocks(rows), to, rest, change, workers, after);
  }
  phases.run(pool);
  if (rehearsing()) std::memset(to, 0, out->size_bytes());
  return ffi::Error::Success();
}

// One weight's operands of a gated block.
struct Packed {
  const S8& values;
  const F32& scale;
  const S16& sums;
  const F32& bias;
  bool rotated;
  const Adapters* adapters;
};

ffi::Error gated_block(ffi::ThreadPool& pool, F32 x, F32 gain, const Packed& first, const Packed& second, F32 residual,
                       ffi::ResultBuffer<ffi::F32>& out, float eps, int64_t activation) {
  const auto dims = x.dimensions();
  const int64_t rows = dims[0], inputs = dims[1], outputs = out->dimensions()[1];
  const int64_t width = first.values.dimensions()[0] * kPanel / 2;
  auto up = weight_of(first.values, first.scale, first.sums, first.bias, 2 * width, inputs);
  if (up.has_error()) return up.error();
  auto down = weight_of(second.values, second.scale, second.sums, second.bias, outputs, width);
  if (down.has_error()) return down.error();
  if (width % kPanel != 0) return ffi::Error::InvalidArgument("the hidden width is not a multiple of 16");
  if ((first.rotated && inputs % kGroup != 0) || (second.rotated && width % kGroup != 0)) {
    return ffi::Error::InvalidArgument(kRagged);
  }
  Beside beside[2];
  Change of_up, of_down;
  const char* wrong = read(first.adapters, rows, inputs, 2 * width, beside[0], of_up);
  if (wrong == nullptr) wrong = read(second.adapters, rows, width, outputs, beside[1], of_down);
  if (wrong != nullptr) return ffi::Error::InvalidArgument(wrong);
  static_assert(lora::kSpan == 4 * kRowBlock);
  const int workers = Phases::max_workers(pool);
  const float* const rest = optional(residual);
  float* const to = out->typed_data();
  const Activation gate = static_cast<Activation>(activation);
  const Stretches own(x.typed_data(), rows, inputs, workers);
  const bool apart = own.worth(*up, of_up) && own.worth(*down, of_down);
  Phases phases;
  if (apart && own.many()) {
    phases.add_apart(in_rehearsal(own.count()), workers, [&, &k = kernels()](int64_t i, int) {
      const int64_t begin = own.begin(i), count = own.rows(i), at = begin * outputs;
      const float* const from = x.typed_data() + begin * inputs;
      const Rounding a = rounded(k, from, count, inputs, optional(gain), eps, first.rotated, 4);
      const Rounding h = rounding(nullptr, count, width, nullptr, 0.0f, second.rotated, 6);
      gate_of(k, a, count, *up, h, gate);
      product_of(k, h, count, *down, to + at, rest == nullptr ? nullptr : rest + at, Activation::kNone);
    });
  } else {
    // A group of rows goes through the whole block before the next: its hidden values stay in the cache.
    const int64_t group = std::min<int64_t>(rows, lora::kSpan);
    const bool beside_adapters = of_up.beside != nullptr || of_down.beside != nullptr;
    const Rounding a = rounding(x.typed_data(), rows, inputs, optional(gain), eps, first.rotated, 0);
    float* const hidden = beside_adapters ? static_cast<float*>(scratch(1, group * width * sizeof(float))) : nullptr;
    const Rounding h = rounding(hidden, group, width, nullptr, 0.0f, second.rotated, 2);
    add_rounding(phases, a, rows, of_up, workers);
    for (int64_t begin = 0; begin < rows; begin += group) {
      const int64_t count = std::min(group, rows - begin), at = begin * outputs;
      const Cut cut = apart ? Stretches(x.typed_data() + begin * inputs, count, inputs, workers).cut() : in_blocks(count);
      of_down.origin = begin;
      if (beside_adapters) {
        add_gate_beside(phases, a, *up, begin, count, hidden, gate, of_up, workers);
        add_rounding(phases, h, count, of_down, workers);
      } else {
        add_gate(phases, a, *up, begin, cut, h, gate, workers);
      }
      add_product(phases, h, *down, cut, to + at, rest == nullptr ? nullptr : rest + at, of_down, workers);
    }
  }
  phases.run(pool);
  if (rehearsing()) std::memset(to, 0, out->size_bytes());
  return ffi::Error::Success();
}

ffi::Error linear(ffi::ThreadPool pool, F32 x, F32 gain, F32 shift, S8 packed, F32 scale, S16 sums, F32 bias, F32 residual,
                  ffi::ResultBuffer<ffi::F32> out, float eps, int64_t centred, int64_t rotated, int64_t activation) {
  return product(pool, x, {gain, shift, eps, centred != 0}, packed, scale, sums, bias, residual, nullptr, out, rotated,
                 static_cast<Activation>(activation));
}

ffi::Error linear_lora(ffi::ThreadPool pool, F32 x, F32 gain, S8 packed, F32 scale, S16 sums, F32 bias, F32 residual,
                       ffi::Buffer<ffi::S32> slot, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::ResultBuffer<ffi::F32> out,
                       float eps, int64_t rotated, ffi::Span<const int64_t> ends) {
  const Adapters adapters{slot, a, b, ends};
  return product(pool, x, {gain, gain, eps, false}, packed, scale, sums, bias, residual, &adapters, out, rotated,
                 Activation::kNone);
}

ffi::Error gated_mlp(ffi::ThreadPool pool, F32 x, F32 gain, S8 up_packed, F32 up_scale, S16 up_sums, F32 up_bias,
                     S8 down_packed, F32 down_scale, S16 down_sums, F32 down_bias, F32 residual,
                     ffi::ResultBuffer<ffi::F32> out, float eps, int64_t activation, int64_t up_rotated,
                     int64_t down_rotated) {
  const Packed up{up_packed, up_scale, up_sums, up_bias, up_rotated != 0, nullptr};
  const Packed down{down_packed, down_scale, down_sums, down_bias, down_rotated != 0, nullptr};
  return gated_block(pool, x, gain, up, down, residual, out, eps, activation);
}

ffi::Error gated_mlp_lora(ffi::ThreadPool pool, F32 x, F32 gain, S8 up_packed, F32 up_scale, S16 up_sums, F32 up_bias,
                          S8 down_packed, F32 down_scale, S16 down_sums, F32 down_bias, F32 residual,
                          ffi::Buffer<ffi::S32> slot, ffi::AnyBuffer up_a, ffi::AnyBuffer up_b, ffi::AnyBuffer down_a,
                          ffi::AnyBuffer down_b, ffi::ResultBuffer<ffi::F32> out, float eps, int64_t activation,
                          int64_t up_rotated, int64_t down_rotated, ffi::Span<const int64_t> up_ends,
                          ffi::Span<const int64_t> down_ends) {
  const Adapters of_up{slot, up_a, up_b, up_ends}, of_down{slot, down_a, down_b, down_ends};
  const Packed up{up_packed, up_scale, up_sums, up_bias, up_rotated != 0, &of_up};
  const Packed down{down_packed, down_scale, down_sums, down_bias, down_rotated != 0, &of_down};
  return gated_block(pool, x, gain, up, down, residual, out, eps, activation);
}

}  // namespace
}  // namespace jaxserve::int8

JAXSERVE_HANDLER(jaxserve_int8_linear, jaxserve::int8::linear,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, I]
                     .Arg<jaxserve::int8::F32>()  // gain [I] or [0]
                     .Arg<jaxserve::int8::F32>()  // shift [I] or [0], of a centred norm
                     .Arg<jaxserve::int8::S8>()   // packed
                     .Arg<jaxserve::int8::F32>()  // scale
                     .Arg<jaxserve::int8::S16>()  // sums
                     .Arg<jaxserve::int8::F32>()  // bias [O] or [0]
                     .Arg<jaxserve::int8::F32>()  // residual [T, O] or [0]
                     .Ret<jaxserve::int8::F32>()  // [T, O]
                     .Attr<float>("eps")
                     .Attr<int64_t>("centred")
                     .Attr<int64_t>("rotated")
                     .Attr<int64_t>("activation"));

JAXSERVE_HANDLER(jaxserve_int8_linear_lora, jaxserve::int8::linear_lora,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, I]
                     .Arg<jaxserve::int8::F32>()  // gain [I] or [0]
                     .Arg<jaxserve::int8::S8>()   // packed
                     .Arg<jaxserve::int8::F32>()  // scale
                     .Arg<jaxserve::int8::S16>()  // sums
                     .Arg<jaxserve::int8::F32>()  // bias [O] or [0]
                     .Arg<jaxserve::int8::F32>()  // residual [T, O] or [0]
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // slot [T]
                     .Arg<xla::ffi::AnyBuffer>()  // a
                     .Arg<xla::ffi::AnyBuffer>()  // b
                     .Ret<jaxserve::int8::F32>()  // [T, O]
                     .Attr<float>("eps")
                     .Attr<int64_t>("rotated")
                     .Attr<xla::ffi::Span<const int64_t>>("ends"));

JAXSERVE_HANDLER(jaxserve_int8_gated_mlp, jaxserve::int8::gated_mlp,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, D]
                     .Arg<jaxserve::int8::F32>()  // gain [D] or [0]
                     .Arg<jaxserve::int8::S8>()   // gate and up: packed, scale, sums, bias
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
                     .Attr<int64_t>("activation")
                     .Attr<int64_t>("up_rotated")
                     .Attr<int64_t>("down_rotated"));

JAXSERVE_HANDLER(jaxserve_int8_gated_mlp_lora, jaxserve::int8::gated_mlp_lora,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, D]
                     .Arg<jaxserve::int8::F32>()  // gain [D] or [0]
                     .Arg<jaxserve::int8::S8>()   // gate and up: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S8>()   // down: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::F32>()  // residual [T, D] or [0]
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // slot [T]
                     .Arg<xla::ffi::AnyBuffer>()  // gate and up's a
                     .Arg<xla::ffi::AnyBuffer>()  // b
                     .Arg<xla::ffi::AnyBuffer>()  // down's a
                     .Arg<xla::ffi::AnyBuffer>()  // b
                     .Ret<jaxserve::int8::F32>()  // [T, D]
                     .Attr<float>("eps")
                     .Attr<int64_t>("activation")
                     .Attr<int64_t>("up_rotated")
                     .Attr<int64_t>("down_rotated")
                     .Attr<xla::ffi::Span<const int64_t>>("up_ends")
                     .Attr<xla::ffi::Span<const int64_t>>("down_ends"));
