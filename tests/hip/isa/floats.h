// Numbers as the chips have them: conversions, rounding, NaN rules, denormals.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace isa {

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t as_bits(double value) { return std::bit_cast<uint64_t>(value); }

inline float from_f16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

inline bool is_nan(float x) { return x != x; }
inline float quiet(float x) { return as_float(as_bits(x) | 0x400000); }

// To nearest, ties to even. A NaN stays one, quiet.
inline uint16_t to_f16(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t to_f16(double x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if (is_nan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Towards zero.
inline uint16_t to_f16_rtz(float x) {
  const uint16_t nearest = to_f16(x);
  const bool is_finite = (as_bits(x) & 0x7f800000) != 0x7f800000;
  return is_finite && std::fabs(from_f16(nearest)) > std::fabs(x) ? nearest - 1 : nearest;
}

inline int exponent_of(float x) { return as_bits(x) >> 23 & 255; }
inline float flush_f32(float x) {
  return exponent_of(x) ? x : as_float(as_bits(x) & 0x80000000);
}
inline uint16_t flush_f16(uint16_t x) { return x & 0x7c00 ? x : x & 0x8000; }

// The chips' minimum and maximum: a NaN gives way to a number, and -0 lies below +0.
inline float min_number(float a, float b) {
  const float least = a < b || (a == b && std::signbit(a)) ? a : b;
  return is_nan(a) ? b : is_nan(b) ? a : least;
}
inline float max_number(float a, float b) {
  const float most = a > b || (a == b && !std::signbit(a)) ? a : b;
  return is_nan(a) ? b : is_nan(b) ? a : most;
}
// IEEE 754-2019's minimum and maximum: a NaN wins.
inline float minimum(float a, float b) {
  return is_nan(a) ? quiet(a) : is_nan(b) ? quiet(b) : min_number(a, b);
}
inline float maximum(float a, float b) {
  return is_nan(a) ? quiet(a) : is_nan(b) ? quiet(b) : max_number(a, b);
}
inline float median(float a, float b, float c) {
  if (is_nan(a) || is_nan(b) || is_nan(c)) return min_number(min_number(a, b), c);
  return max_number(min_number(a, b), min_number(max_number(a, b), c));
}

// Conversions saturate, and give 0 for NaN.
inline int32_t to_i32(float x) {
  if (is_nan(x)) return 0;
  if (x >= 2147483648.0f) return std::numeric_limits<int32_t>::max();
  if (x <= -2147483648.0f) return std::numeric_limits<int32_t>::min();
  return static_cast<int32_t>(x);
}
inline uint32_t to_u32(float x) {
  if (!(x > 0)) return 0;
  if (x >= 4294967296.0f) return std::numeric_limits<uint32_t>::max();
  return static_cast<uint32_t>(x);
}

inline float clamped(float x) { return is_nan(x) ? 0.0f : x < 0 ? 0.0f : x > 1 ? 1.0f : x; }
inline float scale_by(float x, int power) {
  return std::ldexp(x, power < -400 ? -400 : power > 400 ? 400 : power);
}

}  // namespace isa
