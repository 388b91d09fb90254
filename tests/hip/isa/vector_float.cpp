// Floats of one value a lane, and conversions.
#include "lanes.h"

namespace isa {

namespace {

// Conversions

template <auto F>
void f32_from_bits(Wave& wave, const Instruction& i) {
  Lanes buffer, result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffer);
  each_lane(wave, [&](int lane) { result.lane[lane] = as_bits(F(a[lane])); });
  write_f32(wave, i, result);
}

template <auto F>
void bits_from_f32(Wave& wave, const Instruction& i) {
  if (i.clamp || i.omod) fail("clamp or omod of a conversion to integers is not interpreted");
  Lanes buffer, result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffer);
  each_lane(wave, [&](int lane) {
    result.lane[lane] = static_cast<uint32_t>(F(as_float(a[lane])));
  });
  write_bits(wave, i, i.dst, result.lane);
}

void cvt_f16_f32(Wave& wave, const Instruction& i) {
  Lanes buffer, result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffer);
  each_lane(wave, [&](int lane) {
    result.lane[lane] = rounded_f16(wave, i, as_float(a[lane]));
  });
  write_16(wave, i, result.lane);
}

void cvt_f32_f16(Wave& wave, const Instruction& i) {
  Lanes a;
  read_16(wave, i, i.src0, 0, true, a);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = as_bits(from_f16(static_cast<uint16_t>(a.lane[lane])));
  });
  write_f32(wave, i, a);
}

void cvt_f32_bf16(Wave& wave, const Instruction& i) {
  Lanes a;
  read_16(wave, i, i.src0, 0, false, a);
  each_lane(wave, [&](int lane) { a.lane[lane] <<= 16; });
  write_f32(wave, i, a);
}

// 16-bit integers in all of a register.
template <auto F>
void bits_from_u16(Wave& wave, const Instruction& i) {
  Lanes a;
  read_16(wave, i, i.src0, 0, false, a);
  each_lane(wave, [&](int lane) { a.lane[lane] = F(static_cast<uint16_t>(a.lane[lane])); });
  write_bits(wave, i, i.dst, a.lane);
}

template <auto F>
void f16_from_u16(Wave& wave, const Instruction& i) {
  Lanes a;
  read_16(wave, i, i.src0, 0, false, a);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = rounded_f16(wave, i, F(static_cast<uint16_t>(a.lane[lane])));
  });
  write_16(wave, i, a.lane);
}

// Two floats, each made 16 bits.
template <auto F>
void pack_f32(Wave& wave, const Instruction& i) {
  if (i.clamp || i.omod) fail("clamp or omod of a packing conversion is not interpreted");
  Lanes buffers[2], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  each_lane(wave, [&](int lane) {
    result.lane[lane] = F(as_float(a[lane])) | static_cast<uint32_t>(F(as_float(b[lane]))) << 16;
  });
  write_bits(wave, i, i.dst, result.lane);
}

void pack_b32_f16(Wave& wave, const Instruction& i) {
  expect_plain_16(i);
  Lanes a, b;
  read_16(wave, i, i.src0, 0, true, a);
  read_16(wave, i, i.src1, 1, true, b);
  each_lane(wave, [&](int lane) { a.lane[lane] |= b.lane[lane] << 16; });
  write_bits(wave, i, i.dst, a.lane);
}

void ldexp_f32(Wave& wave, const Instruction& i) {
  Lanes buffers[2], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* power = read_bits(wave, i, i.src1, 1, buffers[1]);
  for (int lane = 0; lane < wave.lanes; ++lane) {
    result.lane[lane] =
        as_bits(scale_by(as_float(a[lane]), static_cast<int32_t>(power[lane])));
  }
  write_f32(wave, i, result);
}

// Exact divisions: div_scale moves operands away from overflow and denormals, div_fmas undoes it,
// div_fixup puts in what is special.

// v_div_scale_f32 d, vcc, s0, s1, s2 with denominator s1 and numerator s2, one of which is s0.
struct Scaled {
  float value;
  bool is_undone;  // div_fmas will scale back
};

Scaled div_scale(float s0, float s1, float s2) {
  constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
  const auto is_denormal = [](double x) { return x != 0 && std::fabs(x) < 0x1p-126; };
  const bool is_denominator = as_bits(s0) == as_bits(s1), is_numerator = as_bits(s0) == as_bits(s2);
  const double reciprocal = 1.0 / s1, quotient = static_cast<double>(s2) / s1;
  if (s2 == 0 || s1 == 0) return {NOT_A_NUMBER, false};
  if (exponent_of(s2) - exponent_of(s1) >= 96) {
    return {is_denominator ? scale_by(s0, 64) : s0, true};
  }
  if (is_denormal(s1)) return {scale_by(s0, 64), false};
  // AMD's text scales up here too, which would make infinity of such a denominator.
  if (is_denormal(reciprocal) && is_denormal(quotient)) {
    return {is_denominator ? scale_by(s0, -64) : s0, true};
  }
  if (is_denormal(reciprocal)) return {scale_by(s0, -64), false};
  if (is_denormal(quotient)) return {is_numerator ? scale_by(s0, 64) : s0, true};
  if (exponent_of(s2) <= 23) return {scale_by(s0, 64), false};
  return {s0, false};
}

void div_scale_f32(Wave& wave, const Instruction& i) {
  Lanes buffers[3], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_f32(wave, i, i.src2, 2, buffers[2]);
  uint64_t undone = 0;
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const Scaled scaled = div_scale(as_float(a[lane]), as_float(b[lane]), as_float(c[lane]));
    result.lane[lane] = as_bits(scaled.value);
    if (scaled.is_undone && wave.is_active(lane)) undone |= uint64_t{1} << lane;
  }
  write_f32(wave, i, result);
  write_mask(wave, i.dst1, undone);
}

// a * b + c, rounded to odd: rounding it again, to float, gives what rounding the exact sum gives.
double fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, total = product + c;
  const double part = total - product, error = (product - (total - part)) + (c - part);
  const uint64_t bits = as_bits(total);
  if (!std::isfinite(total) || error == 0 || bits & 1) return total;
  return as_double((error > 0) == (total > 0) ? bits + 1 : bits - 1);
}

void div_fmas_f32(Wave& wave, const Instruction& i) {
  Lanes buffers[3], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_f32(wave, i, i.src2, 2, buffers[2]);
  const uint64_t undone = wave.mask(VCC);
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const double value = fused(as_float(a[lane]), as_float(b[lane]), as_float(c[lane]));
    const int power = exponent_of(as_float(c[lane])) > 127 ? 64 : -64;
    const bool is_scaled = undone >> lane & 1;
    result.lane[lane] = as_bits(static_cast<float>(std::ldexp(value, is_scaled ? power : 0)));
  }
  write_f32(wave, i, result);
}

float div_fixup(float quotient, float denominator, float numerator) {
  constexpr float INF = std::numeric_limits<float>::infinity();
  const bool is_negative = std::signbit(denominator) != std::signbit(numerator);
  const auto sign = [&](float x) { return is_negative ? -x : x; };
  if (is_nan(numerator)) return quiet(numerator);
  if (is_nan(denominator)) return quiet(denominator);
  const bool both_zero = denominator == 0 && numerator == 0;
  if (both_zero || (std::isinf(denominator) && std::isinf(numerator))) return as_float(0xffc00000);
  if (denominator == 0 || std::isinf(numerator)) return sign(INF);
  if (std::isinf(denominator) || numerator == 0) return sign(0);
  if (exponent_of(numerator) - exponent_of(denominator) < -150) return sign(0);
  // AMD's text says denominator, which cannot be meant: the quotient has overflowed, or become NaN.
  if (exponent_of(quotient) == 255) return sign(INF);
  return sign(std::fabs(quotient));
}

// With MODE.IEEE a signalling NaN comes out quiet, of each of two steps.
template <auto F>
void choice3(Wave& wave, const Instruction& i) {
  if (!wave.mode.is_ieee()) {
    return f32_3<[](float a, float b, float c) { return F(F(a, b), c); }>(wave, i);
  }
  f32_3<[](float a, float b, float c) {
    const auto choose = [](float x, float y) {
      return is_signalling(x) ? quiet(x) : is_signalling(y) ? quiet(y) : F(x, y);
    };
    return choose(choose(a, b), c);
  }>(wave, i);
}

// Scalar registers through the vector unit's functions (gfx12).
template <auto F>
void scalar_f32(Wave& wave, const Instruction& i) {
  if (i.clamp || i.omod || i.src0.neg || i.src0.abs) fail("a modifier is not interpreted");
  const auto flushed = [&](float x) { return wave.mode.keeps_f32_denormals() ? x : flush_f32(x); };
  write_scalar(wave, i.dst, as_bits(flushed(F(flushed(as_float(read_scalar(wave, i.src0)))))));
}

constexpr auto EXP2 = [](float x) { return static_cast<float>(std::exp2(static_cast<double>(x))); };
constexpr auto LOG2 = [](float x) { return static_cast<float>(std::log2(static_cast<double>(x))); };
constexpr auto RECIPROCAL = [](float x) { return 1.0f / x; };
constexpr auto RSQRT = [](float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
};
constexpr auto SQRT = [](float x) { return std::sqrt(x); };
constexpr double TURN = 6.283185307179586;  // angles are in turns
constexpr auto SIN = [](float x) { return static_cast<float>(std::sin(TURN * x)); };
constexpr auto COS = [](float x) { return static_cast<float>(std::cos(TURN * x)); };
// Flushes denormals, whatever MODE says.
constexpr auto MAD = [](float a, float b, float c) {
  return flush_f32(flush_f32(flush_f32(a) * flush_f32(b)) + flush_f32(c));
};
constexpr auto FMAMK = [](float a, float k, float c) { return std::fma(a, k, c); };

}  // namespace

std::vector<Entry> float_instructions() {
  using u16 = uint16_t;
  using u32 = uint32_t;
  using i32 = int32_t;
  constexpr auto max_f32 = choice2<max_number>;
  constexpr auto min_f32 = choice2<min_number>;
  constexpr auto max3_f32 = choice3<max_number>;
  constexpr auto min3_f32 = choice3<min_number>;
  constexpr auto mul_legacy = f32_2<[](float a, float b) { return a == 0 || b == 0 ? 0.0f : a * b; }>;
  constexpr auto max_f16 = f16_2<max_number>;
  constexpr auto min_f16 = f16_2<min_number>;
  return {
      // f32
      {"v_add_f32", f32_2<ADD>},
      {"v_dual_add_f32", f32_2<ADD>},
      {"v_sub_f32", f32_2<SUB>},
      {"v_dual_sub_f32", f32_2<SUB>},
      {"v_subrev_f32", f32_2<SUBREV>},
      {"v_dual_subrev_f32", f32_2<SUBREV>},
      {"v_mul_f32", f32_2<MUL>},
      {"v_dual_mul_f32", f32_2<MUL>},
      {"v_mul_legacy_f32", mul_legacy},
      {"v_mul_dx9_zero_f32", mul_legacy},
      {"v_dual_mul_dx9_zero_f32", mul_legacy},
      {"v_max_f32", max_f32},
      {"v_max_num_f32", max_f32},
      {"v_dual_max_f32", max_f32},
      {"v_dual_max_num_f32", max_f32},
      {"v_min_f32", min_f32},
      {"v_min_num_f32", min_f32},
      {"v_dual_min_f32", min_f32},
      {"v_dual_min_num_f32", min_f32},
      {"v_max3_f32", max3_f32},
      {"v_max3_num_f32", max3_f32},
      {"v_min3_f32", min3_f32},
      {"v_min3_num_f32", min3_f32},
      {"v_med3_f32", f32_3<median>},
      {"v_med3_num_f32", f32_3<median>},
      {"v_maximum_f32", f32_2<maximum>},
      {"v_minimum_f32", f32_2<minimum>},
      {"v_maximum3_f32",
       f32_3<[](float a, float b, float c) { return maximum(maximum(a, b), c); }>},
      {"v_minimum3_f32",
       f32_3<[](float a, float b, float c) { return minimum(minimum(a, b), c); }>},
      {"v_fma_f32", f32_3<FMA>},
      {"v_fmac_f32", f32_3<FMA>},
      {"v_dual_fmac_f32", f32_3<FMA>},
      {"v_fmamk_f32", f32_3<FMAMK>},
      {"v_dual_fmamk_f32", f32_3<FMAMK>},
      {"v_fmaak_f32", f32_3<FMA>},
      {"v_dual_fmaak_f32", f32_3<FMA>},
      {"v_mad_f32", f32_3<MAD>},
      {"v_mac_f32", f32_3<MAD>},
      {"v_madmk_f32", f32_3<MAD>},
      {"v_madak_f32", f32_3<MAD>},
      {"v_exp_f32", f32_1<EXP2>},
      {"v_log_f32", f32_1<LOG2>},
      {"v_rcp_f32", f32_1<RECIPROCAL>},
      {"v_rcp_iflag_f32", f32_1<RECIPROCAL>},
      {"v_rsq_f32", f32_1<RSQRT>},
      {"v_sqrt_f32", f32_1<SQRT>},
      {"v_sin_f32", f32_1<SIN>},
      {"v_cos_f32", f32_1<COS>},
      {"v_s_exp_f32", scalar_f32<EXP2>},
      {"v_s_log_f32", scalar_f32<LOG2>},
      {"v_s_rcp_f32", scalar_f32<RECIPROCAL>},
      {"v_s_rsq_f32", scalar_f32<RSQRT>},
      {"v_s_sqrt_f32", scalar_f32<SQRT>},
      {"v_rndne_f32", f32_1<[](float a) { return std::nearbyint(a); }>},
      {"v_trunc_f32", f32_1<[](float a) { return std::trunc(a); }>},
      {"v_floor_f32", f32_1<[](float a) { return std::floor(a); }>},
      {"v_ceil_f32", f32_1<[](float a) { return std::ceil(a); }>},
      {"v_fract_f32", f32_1<[](float a) { return std::min(a - std::floor(a), 0x1.fffffep-1f); }>},
      {"v_ldexp_f32", ldexp_f32},
      {"v_div_scale_f32", div_scale_f32},
      {"v_div_fmas_f32", div_fmas_f32},
      {"v_div_fixup_f32", f32_3<div_fixup>},
      // Conversions
      {"v_cvt_f32_i32", f32_from_bits<[](u32 a) { return static_cast<float>(static_cast<i32>(a)); }>},
      {"v_cvt_f32_u32", f32_from_bits<[](u32 a) { return static_cast<float>(a); }>},
      {"v_cvt_f32_ubyte0", f32_from_bits<[](u32 a) { return static_cast<float>(a & 255); }>},
      {"v_cvt_f32_ubyte1", f32_from_bits<[](u32 a) { return (static_cast<float>(a >> 8 & 255)); }>},
      {"v_cvt_f32_ubyte2", f32_from_bits<[](u32 a) { return (static_cast<float>(a >> 16 & 255)); }>},
      {"v_cvt_f32_ubyte3", f32_from_bits<[](u32 a) { return (static_cast<float>(a >> 24)); }>},
      {"v_cvt_i32_f32", bits_from_f32<to_i32>},
      {"v_cvt_u32_f32", bits_from_f32<to_u32>},
      {"v_cvt_f16_f32", cvt_f16_f32},
      {"v_cvt_f32_f16", cvt_f32_f16},
      {"v_cvt_f32_bf16", cvt_f32_bf16},
      {"v_cvt_u32_u16", bits_from_u16<[](u16 a) -> u32 { return a; }>},
      {"v_cvt_i32_i16", bits_from_u16<[](u16 a) -> u32 { return static_cast<int16_t>(a); }>},
      {"v_cvt_f16_u16", f16_from_u16<[](u16 a) { return static_cast<float>(a); }>},
      {"v_cvt_f16_i16",
       f16_from_u16<[](u16 a) { return static_cast<float>(static_cast<int16_t>(a)); }>},
      {"v_cvt_pk_f16_f32", pack_f32<[](float a) { return to_f16(a); }>},
      {"v_cvt_pk_bf16_f32", pack_f32<to_bf16>},
      {"v_cvt_pkrtz_f16_f32", pack_f32<to_f16_rtz>},
      {"v_cvt_pk_rtz_f16_f32", pack_f32<to_f16_rtz>},
      {"v_pack_b32_f16", pack_b32_f16},
      // f16
      {"v_add_f16", f16_2<ADD>},
      {"v_sub_f16", f16_2<SUB>},
      {"v_subrev_f16", f16_2<SUBREV>},
      {"v_mul_f16", f16_2<MUL>},
      {"v_max_f16", max_f16},
      {"v_max_num_f16", max_f16},
      {"v_min_f16", min_f16},
      {"v_min_num_f16", min_f16},
      {"v_max3_f16", f16_3<[](float a, float b, float c) { return max_number(max_number(a, b), c); }>},
      {"v_max3_num_f16",
       f16_3<[](float a, float b, float c) { return max_number(max_number(a, b), c); }>},
      {"v_min3_f16", f16_3<[](float a, float b, float c) { return min_number(min_number(a, b), c); }>},
      {"v_fma_f16", f16_3<FMA16>},
      {"v_fmac_f16", f16_3<FMA16>},
      {"v_rcp_f16", f16_1<RECIPROCAL>},
      {"v_exp_f16", f16_1<EXP2>},
      {"v_rsq_f16", f16_1<RSQRT>},
      {"v_sqrt_f16", f16_1<SQRT>},
  };
}

}  // namespace isa
