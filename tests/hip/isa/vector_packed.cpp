// Packed operations, mixed precision, dot products.
#include "lanes.h"

namespace isa {

namespace {

// Packed operations: two of 16 bits. opsel and opsel_hi say which halves go into the two results.

uint32_t half_of(uint32_t value, bool high) { return high ? value >> 16 : value & 0xffff; }

struct Packed {
  Lanes buffers[3];
  const uint32_t* values[3];

  Packed(const Wave& wave, const Instruction& i, int num_sources) {
    const Operand* operands[] = {&i.src0, &i.src1, &i.src2};
    if (i.dpp.form != Dpp::Form::none) fail("DPP of packed operations is not interpreted");
    for (int k = 0; k < num_sources; ++k) {
      values[k] = read_bits(wave, i, *operands[k], k, buffers[k]);
    }
  }
};

// The halves of source k in lane: of the first result, or of the second.
uint16_t packed_half(const Packed& packed, const Instruction& i, int k, int result, int lane) {
  return static_cast<uint16_t>(
      half_of(packed.values[k][lane], (result ? i.opsel_hi : i.opsel) >> k & 1));
}

template <int NUM_SOURCES, auto F>
void packed_f16(Wave& wave, const Instruction& i) {
  const Packed packed(wave, i, NUM_SOURCES);
  Lanes result;
  const bool flushes = !wave.mode.keeps_f16_f64_denormals();
  for (int lane = 0; lane < wave.lanes; ++lane) {
    uint32_t both = 0;
    for (int half = 0; half < 2; ++half) {
      double x[3] = {};
      for (int k = 0; k < NUM_SOURCES; ++k) {
        uint16_t bits = packed_half(packed, i, k, half, lane);
        if (flushes) bits = flush_f16(bits);
        if ((half ? i.neg_hi : i.neg_lo) >> k & 1) bits ^= 0x8000;
        x[k] = from_f16(bits);
      }
      both |= static_cast<uint32_t>(rounded_f16(wave, i, F(x[0], x[1], x[2]))) << (16 * half);
    }
    result.lane[lane] = both;
  }
  write_bits(wave, i, i.dst, result.lane);
}

template <int NUM_SOURCES, auto F>
void packed_u16(Wave& wave, const Instruction& i) {
  if (i.clamp || i.neg_lo || i.neg_hi) fail("clamp or neg of packed integers is not interpreted");
  const Packed packed(wave, i, NUM_SOURCES);
  Lanes result;
  for (int lane = 0; lane < wave.lanes; ++lane) {
    uint32_t both = 0;
    for (int half = 0; half < 2; ++half) {
      uint16_t x[3] = {};
      for (int k = 0; k < NUM_SOURCES; ++k) x[k] = packed_half(packed, i, k, half, lane);
      both |= static_cast<uint32_t>(static_cast<uint16_t>(F(x[0], x[1], x[2]))) << (16 * half);
    }
    result.lane[lane] = both;
  }
  write_bits(wave, i, i.dst, result.lane);
}

// Register `part` of an operand of two; scalars and constants as well.
const uint32_t* read_part(const Wave& wave, const Instruction& i, const Operand& operand,
                          int source, int part, Lanes& buffer) {
  // A constant of 32 bits is the low register only.
  if (operand.kind == Kind::constant && part) {
    fail("the upper half of a packed constant is not interpreted");
  }
  return read_bits(wave, i, operand, source, buffer, part);
}

// Two of 32 bits each in a pair of registers.
template <int NUM_SOURCES, auto F>
void packed_f32(Wave& wave, const Instruction& i) {
  if (i.clamp) fail("clamp of packed f32 is not interpreted");
  const Operand* operands[] = {&i.src0, &i.src1, &i.src2};
  const bool flushes = !wave.mode.keeps_f32_denormals();
  Lanes results[2];
  for (int half = 0; half < 2; ++half) {
    Lanes buffers[3];
    const uint32_t* values[3] = {};
    for (int k = 0; k < NUM_SOURCES; ++k) {
      const int part = (half ? i.opsel_hi : i.opsel) >> k & 1;
      values[k] = read_part(wave, i, *operands[k], k, part, buffers[k]);
      const bool is_negated = (half ? i.neg_hi : i.neg_lo) >> k & 1;
      if (!is_negated && !flushes) continue;
      for (int lane = 0; lane < MAX_LANES; ++lane) {
        float x = as_float(values[k][lane]);
        if (flushes) x = flush_f32(x);
        buffers[k].lane[lane] = as_bits(x) ^ (is_negated ? 0x80000000 : 0);
      }
      values[k] = buffers[k].lane;
    }
    each_lane(wave, [&](int lane) {
      const auto x = [&](int k) { return k < NUM_SOURCES ? as_float(values[k][lane]) : 0.0f; };
      const float value = F(x(0), x(1), x(2));
      results[half].lane[lane] = as_bits(flushes ? flush_f32(value) : value);
    });
  }
  write_bits(wave, i, i.dst, results[0].lane);
  write_bits(wave, i, i.dst, results[1].lane, 1);
}

void pk_mov_b32(Wave& wave, const Instruction& i) {
  Lanes buffers[2];
  Lanes first, second;
  std::memcpy(first.lane, read_part(wave, i, i.src0, 0, i.opsel & 1, buffers[0]), sizeof first);
  std::memcpy(second.lane, read_part(wave, i, i.src1, 1, i.opsel >> 1 & 1, buffers[1]),
              sizeof second);
  write_bits(wave, i, i.dst, first.lane);
  write_bits(wave, i, i.dst, second.lane, 1);
}

// Fused products of f16 and f32: opsel_hi[k] says that source k is f16, and opsel[k] which half.
// neg_hi is abs here.
enum class MixTo { f32, low, high };

template <MixTo TO>
void fma_mix(Wave& wave, const Instruction& i) {
  const Packed packed(wave, i, 3);
  const Operand* operands[] = {&i.src0, &i.src1, &i.src2};
  Lanes result;
  const uint32_t* old = wave.v[i.dst.index].lane;
  float x[3][MAX_LANES];
  for (int k = 0; k < 3; ++k) {
    const bool is_f16 = i.opsel_hi >> k & 1, is_high = i.opsel >> k & 1;
    const bool is_negated = i.neg_lo >> k & 1, is_absolute = i.neg_hi >> k & 1;
    // Inline constants are f16 there, f32 here.
    if (operands[k]->kind == Kind::constant && is_f16 && is_high) fail("the upper half of a constant");
    for (int lane = 0; lane < wave.lanes; ++lane) {
      const uint32_t bits = packed.values[k][lane];
      float value = is_f16 ? from_f16(static_cast<uint16_t>(half_of(bits, is_high))) : as_float(bits);
      if (!is_f16 && !wave.mode.keeps_f32_denormals()) value = flush_f32(value);
      if (is_absolute) value = std::fabs(value);
      x[k][lane] = is_negated ? -value : value;
    }
  }
  for (int lane = 0; lane < wave.lanes; ++lane) {
    float value = std::fma(x[0][lane], x[1][lane], x[2][lane]);
    if (!wave.mode.keeps_f32_denormals()) value = flush_f32(value);
    if (i.clamp) value = clamped(value);
    const uint32_t half = TO == MixTo::f32 ? 0 : to_f16(value);
    result.lane[lane] = TO == MixTo::f32   ? as_bits(value)
                        : TO == MixTo::low ? (old[lane] & 0xffff0000) | half
                                           : (old[lane] & 0xffff) | half << 16;
  }
  write_bits(wave, i, i.dst, result.lane);
}

// Two products of 16-bit floats and a sum, summed exactly and rounded once.
template <auto FROM_16, bool HAS_SOURCE2>
void dot2_f32(Wave& wave, const Instruction& i) {
  if (i.clamp || i.neg_lo || i.neg_hi) fail("modifiers of a dot product are not interpreted");
  if (HAS_SOURCE2 && (i.opsel || (i.opsel_hi & 3) != 3)) fail("halves of a dot product");
  Lanes buffers[3], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_bits(wave, i, i.src2, 2, buffers[2]);
  const auto kept = [flushes = !wave.mode.keeps_f32_denormals()](float x) {
    return flushes ? flush_f32(x) : x;
  };
  for (int lane = 0; lane < wave.lanes; ++lane) {
    double sum = kept(as_float(c[lane]));
    for (int shift = 0; shift < 32; shift += 16) {
      sum += static_cast<double>(FROM_16(static_cast<uint16_t>(a[lane] >> shift))) *
             FROM_16(static_cast<uint16_t>(b[lane] >> shift));
    }
    result.lane[lane] = as_bits(kept(static_cast<float>(sum)));
  }
  write_bits(wave, i, i.dst, result.lane);
}

}  // namespace

std::vector<Entry> packed_instructions() {
  using u16 = uint16_t;
  using u32 = uint32_t;
  return {
      {"v_pk_add_f16", packed_f16<2, [](double a, double b, double) { return a + b; }>},
      {"v_pk_mul_f16", packed_f16<2, [](double a, double b, double) { return a * b; }>},
      {"v_pk_fma_f16", packed_f16<3, FMA16>},
      {"v_pk_max_f16", packed_f16<2, [](float a, float b, float) { return max_number(a, b); }>},
      {"v_pk_max_num_f16", packed_f16<2, [](float a, float b, float) { return max_number(a, b); }>},
      {"v_pk_min_f16", packed_f16<2, [](float a, float b, float) { return min_number(a, b); }>},
      {"v_pk_min_num_f16", packed_f16<2, [](float a, float b, float) { return min_number(a, b); }>},
      {"v_pk_add_u16", packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return a + b; }>},
      {"v_pk_sub_u16", packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return a - b; }>},
      {"v_pk_sub_i16", packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return a - b; }>},
      {"v_pk_mul_lo_u16",
       packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return static_cast<u32>(a) * b; }>},
      {"v_pk_lshlrev_b16", packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return b << (a & 15); }>},
      {"v_pk_lshrrev_b16", packed_u16<2, [](u16 a, u16 b, u16) -> u16 { return (b >> (a & 15)); }>},
      {"v_pk_add_f32", packed_f32<2, [](float a, float b, float) { return a + b; }>},
      {"v_pk_mul_f32", packed_f32<2, [](float a, float b, float) { return a * b; }>},
      {"v_pk_fma_f32", packed_f32<3, FMA>},
      {"v_pk_mov_b32", pk_mov_b32},
      {"v_fma_mix_f32", fma_mix<MixTo::f32>},
      {"v_mad_mix_f32", fma_mix<MixTo::f32>},
      {"v_fma_mixlo_f16", fma_mix<MixTo::low>},
      {"v_mad_mixlo_f16", fma_mix<MixTo::low>},
      {"v_fma_mixhi_f16", fma_mix<MixTo::high>},
      {"v_mad_mixhi_f16", fma_mix<MixTo::high>},
      {"v_dot2_f32_f16", dot2_f32<from_f16, true>},
      {"v_dot2_f32_bf16", dot2_f32<from_bf16, true>},
      {"v_dot2c_f32_f16", dot2_f32<from_f16, false>},
      {"v_dot2acc_f32_f16", dot2_f32<from_f16, false>},
      {"v_dual_dot2acc_f32_f16", dot2_f32<from_f16, false>},
      {"v_dot2c_f32_bf16", dot2_f32<from_bf16, false>},
      {"v_dot2acc_f32_bf16", dot2_f32<from_bf16, false>},
      {"v_dual_dot2acc_f32_bf16", dot2_f32<from_bf16, false>},
  };
}

}  // namespace isa
