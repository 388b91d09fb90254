// Scalar arithmetic: SOP1, SOP2, SOPC, SOPK.
#include <bit>

#include "operands.h"

namespace isa {

namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using i32 = int32_t;
using i64 = int64_t;

// A result, and what SCC becomes.
template <class Number>
struct Result {
  Number value;
  bool scc;
};

template <class Number>
Result<Number> nonzero(Number value) {
  return {value, value != 0};
}

template <auto F>
void one32(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, F(read_scalar(wave, i.src0)));
}

template <auto F>
void one32_scc(Wave& wave, const Instruction& i) {
  const Result<u32> result = F(read_scalar(wave, i.src0));
  write_scalar(wave, i.dst, result.value);
  wave.scc = result.scc;
}

template <auto F>
void one64_scc(Wave& wave, const Instruction& i) {
  const Result<u64> result = F(read_scalar64(wave, i.src0));
  write_scalar64(wave, i.dst, result.value);
  wave.scc = result.scc;
}

// 64 bits make 32.
template <auto F>
void count64(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, F(read_scalar64(wave, i.src0)));
}

template <auto F>
void two32(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, F(read_scalar(wave, i.src0), read_scalar(wave, i.src1)));
}

template <auto F>
void two32_scc(Wave& wave, const Instruction& i) {
  const Result<u32> result = F(read_scalar(wave, i.src0), read_scalar(wave, i.src1), wave.scc);
  write_scalar(wave, i.dst, result.value);
  wave.scc = result.scc;
}

template <auto F>
void two64(Wave& wave, const Instruction& i) {
  write_scalar64(wave, i.dst, F(read_scalar64(wave, i.src0), read_scalar64(wave, i.src1)));
}

template <auto F>
void two64_scc(Wave& wave, const Instruction& i) {
  const Result<u64> result = F(read_scalar64(wave, i.src0), read_scalar64(wave, i.src1));
  write_scalar64(wave, i.dst, result.value);
  wave.scc = result.scc;
}

// The second source has 32 bits.
template <auto F>
void mixed64_scc(Wave& wave, const Instruction& i) {
  const Result<u64> result = F(read_scalar64(wave, i.src0), read_scalar(wave, i.src1));
  write_scalar64(wave, i.dst, result.value);
  wave.scc = result.scc;
}

void mov_b64(Wave& wave, const Instruction& i) {
  write_scalar64(wave, i.dst, read_scalar64(wave, i.src0));
}

void cselect_b32(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, read_scalar(wave, wave.scc ? i.src0 : i.src1));
}

void cselect_b64(Wave& wave, const Instruction& i) {
  write_scalar64(wave, i.dst, read_scalar64(wave, wave.scc ? i.src0 : i.src1));
}

void cmov_b32(Wave& wave, const Instruction& i) {
  if (wave.scc) write_scalar(wave, i.dst, read_scalar(wave, i.src0));
}

template <bool BIT>
void bitset_b32(Wave& wave, const Instruction& i) {
  const u32 bit = 1u << (read_scalar(wave, i.src0) & 31), old = read_scalar(wave, i.dst);
  write_scalar(wave, i.dst, BIT ? old | bit : old & ~bit);
}

// EXEC goes to the destination, and becomes F(source, EXEC).
template <auto F>
void saveexec(Wave& wave, const Instruction& i) {
  const u64 source = read_mask(wave, i.src0), exec = wave.exec();
  write_mask(wave, i.dst, exec);
  const u64 all = wave.lanes == 32 ? 0xffffffff : ~u64{0};
  wave.set_exec(F(source, exec) & all);
  wave.scc = wave.exec() != 0;
}

// Both the destination and EXEC become the source without EXEC.
void andn2_wrexec(Wave& wave, const Instruction& i) {
  const u64 rest = read_mask(wave, i.src0) & ~wave.exec();
  wave.set_exec(rest);
  write_mask(wave, i.dst, rest);
  wave.scc = rest != 0;
}

void getpc_b64(Wave& wave, const Instruction& i) { write_scalar64(wave, i.dst, i.pc + i.size); }

// SOPK: the constant of 16 bits, extended by its sign.

void movk_i32(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, static_cast<u32>(i.simm));
}

void cmovk_i32(Wave& wave, const Instruction& i) {
  if (wave.scc) movk_i32(wave, i);
}

bool overflows(u32 a, u32 b, u32 sum) { return ((a ^ sum) & (b ^ sum)) >> 31; }

void addk_i32(Wave& wave, const Instruction& i) {
  const u32 a = read_scalar(wave, i.dst), b = static_cast<u32>(i.simm);
  write_scalar(wave, i.dst, a + b);
  wave.scc = overflows(a, b, a + b);
}

void mulk_i32(Wave& wave, const Instruction& i) {
  write_scalar(wave, i.dst, read_scalar(wave, i.dst) * static_cast<u32>(i.simm));
}

// Comparisons

template <class Number, auto F>
void compare32(Wave& wave, const Instruction& i) {
  wave.scc = F(static_cast<Number>(read_scalar(wave, i.src0)),
               static_cast<Number>(read_scalar(wave, i.src1)));
}

template <auto F>
void compare64(Wave& wave, const Instruction& i) {
  wave.scc = F(read_scalar64(wave, i.src0), read_scalar64(wave, i.src1));
}

template <class Number, auto F>
void compare_k(Wave& wave, const Instruction& i) {
  const u32 constant =
      std::is_signed_v<Number> ? static_cast<u32>(i.simm) : static_cast<uint16_t>(i.simm);
  wave.scc = F(static_cast<Number>(read_scalar(wave, i.dst)), static_cast<Number>(constant));
}

template <auto F>
void compare_f32(Wave& wave, const Instruction& i) {
  wave.scc = F(as_float(read_scalar(wave, i.src0)), as_float(read_scalar(wave, i.src1)));
}

// Floats (gfx11.5 and 12)

float flushed(const Wave& wave, float x) {
  return wave.mode.keeps_f32_denormals() ? x : flush_f32(x);
}

float read_f32(const Wave& wave, const Operand& operand) {
  return flushed(wave, as_float(read_scalar(wave, operand)));
}

void write_f32(Wave& wave, const Operand& operand, float value) {
  write_scalar(wave, operand, as_bits(flushed(wave, value)));
}

template <auto F>
void f32_1(Wave& wave, const Instruction& i) {
  write_f32(wave, i.dst, F(read_f32(wave, i.src0)));
}

template <auto F>
void f32_2(Wave& wave, const Instruction& i) {
  write_f32(wave, i.dst, F(read_f32(wave, i.src0), read_f32(wave, i.src1)));
}

void fma_f32(Wave& wave, const Instruction& i) {
  write_f32(wave, i.dst,
            std::fma(read_f32(wave, i.src0), read_f32(wave, i.src1), read_f32(wave, i.src2)));
}

// [4:0] of b is where a field of a begins, [22:16] how many bits it has.
template <class Number>
Number field(Number a, u32 b) {
  constexpr u32 BITS = 8 * sizeof(Number);
  const u32 offset = b & (BITS - 1), width = b >> 16 & 127;
  if (!width) return 0;
  const Number value = a >> offset;
  if (width >= BITS || (std::is_signed_v<Number> && offset + width >= BITS)) return value;
  using Unsigned = std::make_unsigned_t<Number>;
  const u32 unused = BITS - width;
  return static_cast<Number>(static_cast<Unsigned>(value) << unused) >> unused;
}

template <u32 SHIFT>
Result<u32> shifted_sum(u32 a, u32 b, bool) {
  const u64 sum = (static_cast<u64>(a) << SHIFT) + b;
  return {static_cast<u32>(sum), sum >> 32 != 0};
}

constexpr auto EQ = [](auto a, auto b) { return a == b; };
constexpr auto NE = [](auto a, auto b) { return a != b; };
constexpr auto GT = [](auto a, auto b) { return a > b; };
constexpr auto GE = [](auto a, auto b) { return a >= b; };
constexpr auto LT = [](auto a, auto b) { return a < b; };
constexpr auto LE = [](auto a, auto b) { return a <= b; };
constexpr auto LG = [](float a, float b) { return a < b || a > b; };
constexpr auto ORDERED = [](float a, float b) { return a == a && b == b; };
constexpr auto UNORDERED = [](float a, float b) { return a != a || b != b; };

// Sums: SCC is the carry, or the signed overflow.

Result<u32> add_carry(u32 a, u32 b, bool) {
  const u32 sum = a + b;
  return {sum, sum < a};
}
Result<u32> sub_carry(u32 a, u32 b, bool) { return {a - b, b > a}; }
Result<u32> add_with_carry(u32 a, u32 b, bool carry) {
  const u64 sum = static_cast<u64>(a) + b + carry;
  return {static_cast<u32>(sum), sum >> 32 != 0};
}
Result<u32> sub_with_carry(u32 a, u32 b, bool carry) {
  return {a - b - carry, static_cast<u64>(b) + carry > a};
}
Result<u32> add_overflow(u32 a, u32 b, bool) { return {a + b, overflows(a, b, a + b)}; }
Result<u32> sub_overflow(u32 a, u32 b, bool) {
  const u32 difference = a - b;
  return {difference, static_cast<bool>(((a ^ b) & (a ^ difference)) >> 31)};
}

// Bits of both: SCC says whether any is set.
template <auto F>
constexpr auto LOGIC32 = [](u32 a, u32 b, bool) { return nonzero<u32>(F(a, b)); };
template <auto F>
constexpr auto LOGIC64 = [](u64 a, u64 b) { return nonzero<u64>(F(a, b)); };

constexpr auto AND = [](auto a, auto b) { return a & b; };
constexpr auto OR = [](auto a, auto b) { return a | b; };
constexpr auto XOR = [](auto a, auto b) { return a ^ b; };
constexpr auto NAND = [](auto a, auto b) { return ~(a & b); };
constexpr auto NOR = [](auto a, auto b) { return ~(a | b); };
constexpr auto XNOR = [](auto a, auto b) { return ~(a ^ b); };
constexpr auto AND_NOT = [](auto a, auto b) { return a & ~b; };
constexpr auto OR_NOT = [](auto a, auto b) { return a | ~b; };
constexpr auto NOT_AND = [](auto a, auto b) { return ~a & b; };

u32 reversed(u32 a) {
  u32 result = 0;
  for (int k = 0; k < 32; ++k) result |= (a >> k & 1) << (31 - k);
  return result;
}

std::vector<Entry> all() {
  std::vector<Entry> table = {
      // Moves
      {"s_mov_b32", one32<[](u32 a) { return a; }>},
      {"s_mov_b64", mov_b64},
      {"s_cmov_b32", cmov_b32},
      {"s_movk_i32", movk_i32},
      {"s_cmovk_i32", cmovk_i32},
      {"s_cselect_b32", cselect_b32},
      {"s_cselect_b64", cselect_b64},
      {"s_getpc_b64", getpc_b64},
      {"s_bitset0_b32", bitset_b32<false>},
      {"s_bitset1_b32", bitset_b32<true>},
      // One source
      {"s_not_b32", one32_scc<[](u32 a) { return nonzero<u32>(~a); }>},
      {"s_not_b64", one64_scc<[](u64 a) { return nonzero<u64>(~a); }>},
      {"s_brev_b32", one32<reversed>},
      {"s_abs_i32", one32_scc<[](u32 a) { return nonzero<u32>(static_cast<i32>(a) < 0 ? -a : a); }>},
      {"s_sext_i32_i8", one32<[](u32 a) -> u32 { return static_cast<int8_t>(a); }>},
      {"s_sext_i32_i16", one32<[](u32 a) -> u32 { return static_cast<int16_t>(a); }>},
      {"s_bcnt1_i32_b32", one32_scc<[](u32 a) { return nonzero<u32>(std::popcount(a)); }>},
      {"s_ff1_i32_b32", one32<[](u32 a) -> u32 { return a ? std::countr_zero(a) : ~0u; }>},
      {"s_ctz_i32_b32", one32<[](u32 a) -> u32 { return a ? std::countr_zero(a) : ~0u; }>},
      {"s_flbit_i32_b32", one32<[](u32 a) -> u32 { return a ? std::countl_zero(a) : ~0u; }>},
      {"s_clz_i32_u32", one32<[](u32 a) -> u32 { return a ? std::countl_zero(a) : ~0u; }>},
      {"s_ff1_i32_b64", count64<[](u64 a) -> u32 { return a ? std::countr_zero(a) : ~0u; }>},
      {"s_ctz_i32_b64", count64<[](u64 a) -> u32 { return a ? std::countr_zero(a) : ~0u; }>},
      {"s_flbit_i32_b64", count64<[](u64 a) -> u32 { return a ? std::countl_zero(a) : ~0u; }>},
      {"s_clz_i32_u64", count64<[](u64 a) -> u32 { return a ? std::countl_zero(a) : ~0u; }>},
      // Sums
      {"s_add_u32", two32_scc<add_carry>},
      {"s_add_co_u32", two32_scc<add_carry>},
      {"s_sub_u32", two32_scc<sub_carry>},
      {"s_sub_co_u32", two32_scc<sub_carry>},
      {"s_addc_u32", two32_scc<add_with_carry>},
      {"s_add_co_ci_u32", two32_scc<add_with_carry>},
      {"s_subb_u32", two32_scc<sub_with_carry>},
      {"s_sub_co_ci_u32", two32_scc<sub_with_carry>},
      {"s_add_i32", two32_scc<add_overflow>},
      {"s_add_co_i32", two32_scc<add_overflow>},
      {"s_sub_i32", two32_scc<sub_overflow>},
      {"s_sub_co_i32", two32_scc<sub_overflow>},
      {"s_addk_i32", addk_i32},
      {"s_addk_co_i32", addk_i32},
      {"s_add_u64", two64<[](u64 a, u64 b) { return a + b; }>},
      {"s_add_nc_u64", two64<[](u64 a, u64 b) { return a + b; }>},
      {"s_sub_u64", two64<[](u64 a, u64 b) { return a - b; }>},
      {"s_sub_nc_u64", two64<[](u64 a, u64 b) { return a - b; }>},
      {"s_lshl1_add_u32", two32_scc<shifted_sum<1>>},
      {"s_lshl2_add_u32", two32_scc<shifted_sum<2>>},
      {"s_lshl3_add_u32", two32_scc<shifted_sum<3>>},
      {"s_lshl4_add_u32", two32_scc<shifted_sum<4>>},
      // Products
      {"s_mul_i32", two32<[](u32 a, u32 b) { return a * b; }>},
      {"s_mulk_i32", mulk_i32},
      {"s_mul_u64", two64<[](u64 a, u64 b) { return a * b; }>},
      {"s_mul_hi_u32",
       two32<[](u32 a, u32 b) -> u32 { return (static_cast<u64>(a) * b) / (u64{1} << 32); }>},
      {"s_mul_hi_i32", two32<[](u32 a, u32 b) -> u32 {
         return ((static_cast<i64>(static_cast<i32>(a)) * static_cast<i32>(b)) >> 32);
       }>},
      // Minima and maxima: SCC says whether the first source was taken
      {"s_min_i32", two32_scc<[](u32 a, u32 b, bool) -> Result<u32> {
         const bool first = static_cast<i32>(a) < static_cast<i32>(b);
         return {first ? a : b, first};
       }>},
      {"s_max_i32", two32_scc<[](u32 a, u32 b, bool) -> Result<u32> {
         const bool first = static_cast<i32>(a) >= static_cast<i32>(b);
         return {first ? a : b, first};
       }>},
      {"s_min_u32",
       two32_scc<[](u32 a, u32 b, bool) -> Result<u32> { return {a < b ? a : b, a < b}; }>},
      {"s_max_u32",
       two32_scc<[](u32 a, u32 b, bool) -> Result<u32> { return {a >= b ? a : b, a >= b}; }>},
      // Bits
      {"s_and_b32", two32_scc<LOGIC32<AND>>},
      {"s_or_b32", two32_scc<LOGIC32<OR>>},
      {"s_xor_b32", two32_scc<LOGIC32<XOR>>},
      {"s_nand_b32", two32_scc<LOGIC32<NAND>>},
      {"s_nor_b32", two32_scc<LOGIC32<NOR>>},
      {"s_xnor_b32", two32_scc<LOGIC32<XNOR>>},
      {"s_andn2_b32", two32_scc<LOGIC32<AND_NOT>>},
      {"s_and_not1_b32", two32_scc<LOGIC32<AND_NOT>>},
      {"s_orn2_b32", two32_scc<LOGIC32<OR_NOT>>},
      {"s_or_not1_b32", two32_scc<LOGIC32<OR_NOT>>},
      {"s_and_b64", two64_scc<LOGIC64<AND>>},
      {"s_or_b64", two64_scc<LOGIC64<OR>>},
      {"s_xor_b64", two64_scc<LOGIC64<XOR>>},
      {"s_nand_b64", two64_scc<LOGIC64<NAND>>},
      {"s_nor_b64", two64_scc<LOGIC64<NOR>>},
      {"s_xnor_b64", two64_scc<LOGIC64<XNOR>>},
      {"s_andn2_b64", two64_scc<LOGIC64<AND_NOT>>},
      {"s_and_not1_b64", two64_scc<LOGIC64<AND_NOT>>},
      {"s_orn2_b64", two64_scc<LOGIC64<OR_NOT>>},
      {"s_or_not1_b64", two64_scc<LOGIC64<OR_NOT>>},
      {"s_lshl_b32", two32_scc<[](u32 a, u32 b, bool) { return nonzero<u32>(a << (b & 31)); }>},
      {"s_lshr_b32", two32_scc<[](u32 a, u32 b, bool) { return nonzero<u32>((a >> (b & 31))); }>},
      {"s_ashr_i32", two32_scc<[](u32 a, u32 b, bool) {
         return nonzero<u32>((static_cast<i32>(a) >> (b & 31)));
       }>},
      {"s_lshl_b64", mixed64_scc<[](u64 a, u32 b) { return nonzero<u64>(a << (b & 63)); }>},
      {"s_lshr_b64", mixed64_scc<[](u64 a, u32 b) { return nonzero<u64>((a >> (b & 63))); }>},
      {"s_ashr_i64", mixed64_scc<[](u64 a, u32 b) {
         return nonzero<u64>((static_cast<i64>(a) >> (b & 63)));
       }>},
      {"s_bfe_u32", two32_scc<[](u32 a, u32 b, bool) { return nonzero<u32>(field<u32>(a, b)); }>},
      {"s_bfe_i32", two32_scc<[](u32 a, u32 b, bool) {
         return nonzero<u32>(static_cast<u32>(field<i32>(static_cast<i32>(a), b)));
       }>},
      {"s_bfe_u64", mixed64_scc<[](u64 a, u32 b) { return nonzero<u64>(field<u64>(a, b)); }>},
      {"s_bfe_i64", mixed64_scc<[](u64 a, u32 b) {
         return nonzero<u64>(static_cast<u64>(field<i64>(static_cast<i64>(a), b)));
       }>},
      {"s_bfm_b32", two32<[](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }>},
      {"s_pack_ll_b32_b16", two32<[](u32 a, u32 b) { return (a & 0xffff) | b << 16; }>},
      {"s_pack_lh_b32_b16", two32<[](u32 a, u32 b) { return (a & 0xffff) | (b & 0xffff0000); }>},
      {"s_pack_hh_b32_b16",
       two32<[](u32 a, u32 b) { return a / 0x10000 | (b & 0xffff0000); }>},
      {"s_bitcmp0_b32", compare32<u32, [](u32 a, u32 b) { return !(a & 1u << (b & 31)); }>},
      {"s_bitcmp1_b32", compare32<u32, [](u32 a, u32 b) { return (a & 1u << (b & 31)) != 0; }>},
      {"s_cmp_eq_u64", compare64<EQ>},
      {"s_cmp_lg_u64", compare64<NE>},
      // Floats
      {"s_add_f32", f32_2<[](float a, float b) { return a + b; }>},
      {"s_sub_f32", f32_2<[](float a, float b) { return a - b; }>},
      {"s_mul_f32", f32_2<[](float a, float b) { return a * b; }>},
      {"s_min_f32", f32_2<min_number>},
      {"s_min_num_f32", f32_2<min_number>},
      {"s_max_f32", f32_2<max_number>},
      {"s_max_num_f32", f32_2<max_number>},
      {"s_fmac_f32", fma_f32},
      {"s_fmamk_f32", fma_f32},
      {"s_fmaak_f32", fma_f32},
      {"s_trunc_f32", f32_1<[](float a) { return std::trunc(a); }>},
      {"s_floor_f32", f32_1<[](float a) { return std::floor(a); }>},
      {"s_ceil_f32", f32_1<[](float a) { return std::ceil(a); }>},
      {"s_rndne_f32", f32_1<[](float a) { return std::nearbyint(a); }>},
      {"s_cvt_f32_u32", one32<[](u32 a) { return as_bits(static_cast<float>(a)); }>},
      {"s_cvt_f32_i32",
       one32<[](u32 a) { return as_bits(static_cast<float>(static_cast<i32>(a))); }>},
      {"s_cvt_u32_f32", one32<[](u32 a) { return to_u32(as_float(a)); }>},
      {"s_cvt_i32_f32", one32<[](u32 a) { return static_cast<u32>(to_i32(as_float(a))); }>},
      {"s_cvt_f16_f32", one32<[](u32 a) -> u32 { return to_f16(as_float(a)); }>},
      {"s_cvt_f32_f16",
       one32<[](u32 a) { return as_bits(from_f16(static_cast<uint16_t>(a))); }>},
      {"s_cmp_lt_f32", compare_f32<LT>},
      {"s_cmp_eq_f32", compare_f32<EQ>},
      {"s_cmp_le_f32", compare_f32<LE>},
      {"s_cmp_gt_f32", compare_f32<GT>},
      {"s_cmp_lg_f32", compare_f32<LG>},
      {"s_cmp_ge_f32", compare_f32<GE>},
      {"s_cmp_o_f32", compare_f32<ORDERED>},
      {"s_cmp_u_f32", compare_f32<UNORDERED>},
      {"s_cmp_nge_f32", compare_f32<[](float a, float b) { return !(a >= b); }>},
      {"s_cmp_nlg_f32", compare_f32<[](float a, float b) { return !LG(a, b); }>},
      {"s_cmp_ngt_f32", compare_f32<[](float a, float b) { return !(a > b); }>},
      {"s_cmp_nle_f32", compare_f32<[](float a, float b) { return !(a <= b); }>},
      {"s_cmp_neq_f32", compare_f32<NE>},
      {"s_cmp_nlt_f32", compare_f32<[](float a, float b) { return !(a < b); }>},
  };
  const auto add_saveexec = [&](const char* b32, const char* b64, Handler handler) {
    table.push_back({b32, handler});
    table.push_back({b64, handler});
  };
  add_saveexec("s_and_saveexec_b32", "s_and_saveexec_b64", saveexec<AND>);
  add_saveexec("s_or_saveexec_b32", "s_or_saveexec_b64", saveexec<OR>);
  add_saveexec("s_xor_saveexec_b32", "s_xor_saveexec_b64", saveexec<XOR>);
  add_saveexec("s_andn2_saveexec_b32", "s_andn2_saveexec_b64", saveexec<AND_NOT>);
  add_saveexec("s_and_not1_saveexec_b32", "s_and_not1_saveexec_b64", saveexec<AND_NOT>);
  add_saveexec("s_andn1_saveexec_b32", "s_andn1_saveexec_b64", saveexec<NOT_AND>);
  add_saveexec("s_and_not0_saveexec_b32", "s_and_not0_saveexec_b64", saveexec<NOT_AND>);
  add_saveexec("s_andn2_wrexec_b32", "s_andn2_wrexec_b64", andn2_wrexec);
  add_saveexec("s_and_not1_wrexec_b32", "s_and_not1_wrexec_b64", andn2_wrexec);
  const auto add_comparison = [&](const char* i32_name, const char* u32_name, const char* ki,
                                  const char* ku, Handler of_i32, Handler of_u32, Handler of_ki,
                                  Handler of_ku) {
    table.insert(table.end(),
                 {{i32_name, of_i32}, {u32_name, of_u32}, {ki, of_ki}, {ku, of_ku}});
  };
  add_comparison("s_cmp_eq_i32", "s_cmp_eq_u32", "s_cmpk_eq_i32", "s_cmpk_eq_u32",
                 compare32<i32, EQ>, compare32<u32, EQ>, compare_k<i32, EQ>, compare_k<u32, EQ>);
  add_comparison("s_cmp_lg_i32", "s_cmp_lg_u32", "s_cmpk_lg_i32", "s_cmpk_lg_u32",
                 compare32<i32, NE>, compare32<u32, NE>, compare_k<i32, NE>, compare_k<u32, NE>);
  add_comparison("s_cmp_gt_i32", "s_cmp_gt_u32", "s_cmpk_gt_i32", "s_cmpk_gt_u32",
                 compare32<i32, GT>, compare32<u32, GT>, compare_k<i32, GT>, compare_k<u32, GT>);
  add_comparison("s_cmp_ge_i32", "s_cmp_ge_u32", "s_cmpk_ge_i32", "s_cmpk_ge_u32",
                 compare32<i32, GE>, compare32<u32, GE>, compare_k<i32, GE>, compare_k<u32, GE>);
  add_comparison("s_cmp_lt_i32", "s_cmp_lt_u32", "s_cmpk_lt_i32", "s_cmpk_lt_u32",
                 compare32<i32, LT>, compare32<u32, LT>, compare_k<i32, LT>, compare_k<u32, LT>);
  add_comparison("s_cmp_le_i32", "s_cmp_le_u32", "s_cmpk_le_i32", "s_cmpk_le_u32",
                 compare32<i32, LE>, compare32<u32, LE>, compare_k<i32, LE>, compare_k<u32, LE>);
  return table;
}

}  // namespace

extern const std::vector<Entry> SCALAR = all();

}  // namespace isa
