// How most vector instructions work: read their sources for all lanes, do the same in each, write.
// The templates take what happens in one lane as a constant, so that its loop can be vectorized.
#pragma once

#include <algorithm>

#include "operands.h"

namespace isa {

template <class Body>
void each_lane(const Wave& wave, Body body) {
  if (wave.lanes == 32) {
    for (int lane = 0; lane < 32; ++lane) body(lane);
  } else {
    for (int lane = 0; lane < 64; ++lane) body(lane);
  }
}

// Integers of 32 bits

template <auto F>
void bits1(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffer, result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffer);
  each_lane(wave, [&](int lane) { result.lane[lane] = F(a[lane]); });
  write_bits(wave, i, i.dst, result.lane);
}

template <auto F>
void bits2(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffers[2], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  each_lane(wave, [&](int lane) { result.lane[lane] = F(a[lane], b[lane]); });
  write_bits(wave, i, i.dst, result.lane);
}

// Unsigned sums and differences, which F gives in 64 bits: clamp saturates them.
template <auto F>
void saturating2(Wave& wave, const Instruction& i) {
  constexpr auto WRAPPED = [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(F(a, b)); };
  constexpr auto BOUNDED = [](uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(std::clamp<int64_t>(F(a, b), 0, UINT32_MAX));
  };
  if (!i.clamp) return bits2<WRAPPED>(wave, i);
  Instruction unclamped = i;
  unclamped.clamp = false;
  bits2<BOUNDED>(wave, unclamped);
}

template <auto F>
void bits3(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffers[3], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_bits(wave, i, i.src2, 2, buffers[2]);
  each_lane(wave, [&](int lane) { result.lane[lane] = F(a[lane], b[lane], c[lane]); });
  write_bits(wave, i, i.dst, result.lane);
}

// Floats of 32 bits

template <auto F>
void f32_1(Wave& wave, const Instruction& i) {
  Lanes buffer, result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffer);
  each_lane(wave, [&](int lane) { result.lane[lane] = as_bits(F(as_float(a[lane]))); });
  write_f32(wave, i, result);
}

template <auto F>
void f32_2(Wave& wave, const Instruction& i) {
  Lanes buffers[2], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  each_lane(wave, [&](int lane) {
    result.lane[lane] = as_bits(F(as_float(a[lane]), as_float(b[lane])));
  });
  write_f32(wave, i, result);
}

template <auto F>
void f32_3(Wave& wave, const Instruction& i) {
  Lanes buffers[3], result;
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_f32(wave, i, i.src2, 2, buffers[2]);
  each_lane(wave, [&](int lane) {
    result.lane[lane] = as_bits(F(as_float(a[lane]), as_float(b[lane]), as_float(c[lane])));
  });
  write_f32(wave, i, result);
}

// Choices (minimum, maximum, median): with MODE.IEEE a signalling NaN comes out quiet.
inline bool is_signalling(float x) { return is_nan(x) && !(as_bits(x) & 0x400000); }

template <auto F>
void choice2(Wave& wave, const Instruction& i) {
  if (!wave.mode.is_ieee()) return f32_2<F>(wave, i);
  f32_2<[](float a, float b) {
    return is_signalling(a) ? quiet(a) : is_signalling(b) ? quiet(b) : F(a, b);
  }>(wave, i);
}

// 16 bits

// Integers have no omod; clamp would saturate.
inline void expect_plain_16(const Instruction& i) {
  if (i.clamp || i.omod) fail("clamp or omod of 16-bit integers is not interpreted");
}

template <auto F>
void u16_1(Wave& wave, const Instruction& i) {
  expect_plain_16(i);
  Lanes a;
  read_16(wave, i, i.src0, 0, false, a);
  each_lane(wave, [&](int lane) { a.lane[lane] = F(static_cast<uint16_t>(a.lane[lane])); });
  write_16(wave, i, a.lane);
}

template <auto F>
void u16_2(Wave& wave, const Instruction& i) {
  expect_plain_16(i);
  Lanes a, b;
  read_16(wave, i, i.src0, 0, false, a);
  read_16(wave, i, i.src1, 1, false, b);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = F(static_cast<uint16_t>(a.lane[lane]), static_cast<uint16_t>(b.lane[lane]));
  });
  write_16(wave, i, a.lane);
}

template <auto F>
void u16_3(Wave& wave, const Instruction& i) {
  expect_plain_16(i);
  Lanes a, b, c;
  read_16(wave, i, i.src0, 0, false, a);
  read_16(wave, i, i.src1, 1, false, b);
  read_16(wave, i, i.src2, 2, false, c);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = F(static_cast<uint16_t>(a.lane[lane]), static_cast<uint16_t>(b.lane[lane]),
                     static_cast<uint16_t>(c.lane[lane]));
  });
  write_16(wave, i, a.lane);
}

// A result in double or float, rounded once to f16.
template <class Number>
uint16_t rounded_f16(const Wave& wave, const Instruction& i, Number x) {
  constexpr float FACTORS[] = {1, 2, 4, 0.5f};
  if (i.omod) x *= FACTORS[i.omod];
  uint16_t bits = to_f16(x);
  if (!wave.mode.keeps_f16_f64_denormals()) bits = flush_f16(bits);
  return i.clamp ? to_f16(clamped(from_f16(bits))) : bits;
}

template <auto F>
void f16_1(Wave& wave, const Instruction& i) {
  Lanes a;
  read_16(wave, i, i.src0, 0, true, a);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = rounded_f16(wave, i, F(from_f16(static_cast<uint16_t>(a.lane[lane]))));
  });
  write_16(wave, i, a.lane);
}

template <auto F>
void f16_2(Wave& wave, const Instruction& i) {
  Lanes a, b;
  read_16(wave, i, i.src0, 0, true, a);
  read_16(wave, i, i.src1, 1, true, b);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = rounded_f16(wave, i, F(from_f16(static_cast<uint16_t>(a.lane[lane])),
                                          from_f16(static_cast<uint16_t>(b.lane[lane]))));
  });
  write_16(wave, i, a.lane);
}

template <auto F>
void f16_3(Wave& wave, const Instruction& i) {
  Lanes a, b, c;
  read_16(wave, i, i.src0, 0, true, a);
  read_16(wave, i, i.src1, 1, true, b);
  read_16(wave, i, i.src2, 2, true, c);
  each_lane(wave, [&](int lane) {
    a.lane[lane] = rounded_f16(wave, i, F(from_f16(static_cast<uint16_t>(a.lane[lane])),
                                          from_f16(static_cast<uint16_t>(b.lane[lane])),
                                          from_f16(static_cast<uint16_t>(c.lane[lane]))));
  });
  write_16(wave, i, a.lane);
}

// 64 bits

template <auto F>
void u64_2(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  uint64_t a[MAX_LANES], b[MAX_LANES];
  read_64(wave, i, i.src0, 0, a);
  read_64(wave, i, i.src1, 1, b);
  each_lane(wave, [&](int lane) { a[lane] = F(a[lane], b[lane]); });
  write_64(wave, i, a);
}

// The first source, of 32 bits, says by how much the second is shifted.
template <auto F>
void shift64(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffer;
  uint64_t b[MAX_LANES];
  const uint32_t* amount = read_bits(wave, i, i.src0, 0, buffer);
  read_64(wave, i, i.src1, 1, b);
  each_lane(wave, [&](int lane) { b[lane] = F(amount[lane] & 63, b[lane]); });
  write_64(wave, i, b);
}

template <auto F>
void f64_2(Wave& wave, const Instruction& i) {
  if (i.clamp || i.omod) fail("clamp or omod of f64 is not interpreted");
  uint64_t a[MAX_LANES], b[MAX_LANES];
  read_64(wave, i, i.src0, 0, a);
  read_64(wave, i, i.src1, 1, b);
  each_lane(wave, [&](int lane) { a[lane] = as_bits(F(as_double(a[lane]), as_double(b[lane]))); });
  write_64(wave, i, a);
}

constexpr auto ADD = [](auto a, auto b) { return a + b; };
constexpr auto SUB = [](auto a, auto b) { return a - b; };
constexpr auto SUBREV = [](auto a, auto b) { return b - a; };
constexpr auto MUL = [](auto a, auto b) { return a * b; };
constexpr auto FMA = [](float a, float b, float c) { return std::fma(a, b, c); };
constexpr auto FMA16 = [](double a, double b, double c) { return a * b + c; };

// Parts of the table of vector instructions.
std::vector<Entry> integer_instructions();
std::vector<Entry> float_instructions();
std::vector<Entry> packed_instructions();
std::vector<Entry> comparisons();

}  // namespace isa
