// Numbers of 8 and 16 bits to float32 and back, one at a time and without branches: loops over them become vectors of whatever
// set the function around them is compiled for.

#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace jaxserve::casts {

// As ops/casts.py numbers them. kFloat8E4M3 has no infinities (OCP 8-bit floating point, "E4M3").
enum class Kind : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3, kFloat8E5M2 = 4, kInt8 = 5, kUint8 = 6 };

FORCE_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FORCE_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FORCE_INLINE float from_bfloat16(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

// Exponent and mantissa moved to float32's places, times the difference of the exponents' offsets: right for subnormals too. The
// largest exponent stands for infinities and what is no number.
FORCE_INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return as_float(as_bits(as_float(magnitude) * 0x1p112f) | special | sign);
}

FORCE_INLINE float from_float8_e4m3(uint8_t byte) {
  const uint32_t magnitude = static_cast<uint32_t>(byte & 0x7fu) << 20;
  const uint32_t special = magnitude == 0x07f00000u ? 0x7fc00000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80u) << 24;
  return as_float(as_bits(as_float(magnitude) * 0x1p120f) | special | sign);
}

FORCE_INLINE float from_float8_e5m2(uint8_t byte) { return from_float16(static_cast<uint16_t>(byte << 8)); }

// Rounds to the nearest, ties to even; what is no number stays none.
FORCE_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t none = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? none : rounded);
}

FORCE_INLINE void widen(const void* from, Kind kind, int64_t first, int64_t count, float* out) {
  const uint16_t* halves = static_cast<const uint16_t*>(from) + first;
  const uint8_t* bytes = static_cast<const uint8_t*>(from) + first;
  switch (kind) {
    case Kind::kFloat32:
      std::memcpy(out, static_cast<const float*>(from) + first, count * sizeof(float));
      return;
    case Kind::kBfloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(halves[i]);
      return;
    case Kind::kFloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_float16(halves[i]);
      return;
    case Kind::kFloat8E4M3:
      for (int64_t i = 0; i < count; ++i) out[i] = from_float8_e4m3(bytes[i]);
      return;
    case Kind::kFloat8E5M2:
      for (int64_t i = 0; i < count; ++i) out[i] = from_float8_e5m2(bytes[i]);
      return;
    case Kind::kInt8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
      return;
    case Kind::kUint8:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(bytes[i]);
      return;
  }
}

}  // namespace jaxserve::casts
