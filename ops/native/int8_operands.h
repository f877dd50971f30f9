// Operands of int8 products as XLA gives them.

#pragma once

#include "int8.h"
#include "norm.h"

namespace jaxserve::int8 {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S16 = ffi::Buffer<ffi::S16>;

struct Weight {
  const int8_t* packed;   // [panels][quads][16][4]
  const float* scale;     // [panels * 16]
  const int16_t* sums;    // [panels][groups][16]
  const float* bias;      // [outputs] or null
  int64_t outputs, inputs, panels, quads, groups;
};

constexpr char kRagged[] = "a rotated weight's inputs are a multiple of 64";
constexpr char kNorm[] = "a norm's scale or bias is of another width than its rows";

inline const float* optional(const F32& buffer) { return buffer.element_count() == 0 ? nullptr : buffer.typed_data(); }

inline ffi::ErrorOr<Weight> weight_of(const S8& packed, const F32& scale, const S16& sums, const F32& bias, int64_t outputs,
                               int64_t inputs) {
  const auto dims = packed.dimensions();
  if (dims.size() != 4 || dims[0] != ceil_div(outputs, kPanel) || dims[1] != ceil_div(inputs, 4) ||
      dims[2] != kPanel || dims[3] != 4) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("int8 weights are packed for another shape"));
  }
  const int64_t padded = dims[0] * kPanel, groups = ceil_div(inputs, kGroup);
  if (static_cast<int64_t>(scale.element_count()) != padded ||
      static_cast<int64_t>(sums.element_count()) != padded * groups) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("int8 scales or sums do not fit the packed weights"));
  }
  if (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != outputs) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("the bias does not fit the weights"));
  }
  return Weight{packed.typed_data(), scale.typed_data(), sums.typed_data(), optional(bias),
                outputs,             inputs,             dims[0],           dims[1], groups};
}

// The norm of a product's rows as XLA gives it: x / rms(x) * gain, which the rounding does, or a centred one.
struct Normed {
  F32 gains, shifts;
  float eps;
  bool centred;

  bool fits(int64_t width) const {
    const auto fits = [&](const F32& of) { return of.element_count() == 0 || static_cast<int64_t>(of.element_count()) == width; };
    return fits(gains) && (!centred || fits(shifts));
  }
  const float* gain() const { return centred ? nullptr : optional(gains); }
  Norm row(int64_t width) const {
    return {width, optional(gains), centred ? optional(shifts) : nullptr, eps, centred};
  }
};

}  // namespace
}  // namespace jaxserve::int8
