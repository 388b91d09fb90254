// Integers, moves, exchanges of lanes.
#include <bit>

#include "lanes.h"

namespace isa {

namespace {

void lshl_add_u64(Wave& wave, const Instruction& i) {
  Lanes buffer;
  uint64_t a[MAX_LANES], c[MAX_LANES];
  read_64(wave, i, i.src0, 0, a);
  const uint32_t* amount = read_bits(wave, i, i.src1, 1, buffer);
  read_64(wave, i, i.src2, 2, c);
  each_lane(wave, [&](int lane) { a[lane] = (a[lane] << (amount[lane] & 7)) + c[lane]; });
  write_64(wave, i, a);
}

void mov_b64(Wave& wave, const Instruction& i) {
  uint64_t a[MAX_LANES];
  read_64(wave, i, i.src0, 0, a);
  write_64(wave, i, a);
}

// 64 bits of a product and a sum; dst1 is the carry.
template <bool IS_SIGNED>
void mad_64_32(Wave& wave, const Instruction& i) {
  Lanes buffers[2];
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  uint64_t c[MAX_LANES], carries = 0;
  read_64(wave, i, i.src2, 2, c);
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const __int128 product =
        IS_SIGNED ? static_cast<__int128>(static_cast<int32_t>(a[lane])) *
                        static_cast<int32_t>(b[lane])
                  : static_cast<__int128>(a[lane]) * b[lane];
    const __int128 addend = IS_SIGNED ? static_cast<__int128>(static_cast<int64_t>(c[lane]))
                                      : static_cast<__int128>(c[lane]);
    const __int128 sum = product + addend;
    c[lane] = static_cast<uint64_t>(sum);
    // Bit 64 of 65: the carry, of signed numbers the sign
    if ((sum >> 64 & 1) && wave.is_active(lane)) carries |= uint64_t{1} << lane;
  }
  write_64(wave, i, c);
  write_mask(wave, i.dst1, carries);
}

// Sums and differences with carries: dst1 is the carry, src2 the one that comes in.
template <bool IS_SUM, bool HAS_CARRY_IN, bool IS_REVERSED = false>
void add_carry(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffers[2], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  const uint64_t in = HAS_CARRY_IN ? read_mask(wave, i.src2) : 0;
  uint64_t carries = 0;
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const uint64_t x = IS_REVERSED ? b[lane] : a[lane], y = IS_REVERSED ? a[lane] : b[lane];
    const uint64_t carry = in >> lane & 1;
    const uint64_t value = IS_SUM ? x + y + carry : x - y - carry;
    result.lane[lane] = static_cast<uint32_t>(value);
    if ((value >> 32 & 1) && wave.is_active(lane)) carries |= uint64_t{1} << lane;
  }
  write_bits(wave, i, i.dst, result.lane);
  write_mask(wave, i.dst1, carries);
}

// Choices and moves

void cndmask_b32(Wave& wave, const Instruction& i) {
  if (i.clamp || i.omod) fail("clamp or omod of a choice is not interpreted");
  Lanes buffers[2], result;
  // Bits are chosen as they are: neg and abs apply, denormals stay.
  const auto read = [&](const Operand& operand, int source, Lanes& buffer) {
    const uint32_t* bits = read_bits(wave, i, operand, source, buffer);
    if (!operand.neg && !operand.abs) return bits;
    for (int lane = 0; lane < MAX_LANES; ++lane) {
      const uint32_t value = operand.abs ? bits[lane] & 0x7fffffff : bits[lane];
      buffer.lane[lane] = operand.neg ? value ^ 0x80000000 : value;
    }
    return static_cast<const uint32_t*>(buffer.lane);
  };
  const uint32_t* a = read(i.src0, 0, buffers[0]);
  const uint32_t* b = read(i.src1, 1, buffers[1]);
  const uint64_t mask = read_mask(wave, i.src2);
  each_lane(wave, [&](int lane) { result.lane[lane] = mask >> lane & 1 ? b[lane] : a[lane]; });
  write_bits(wave, i, i.dst, result.lane);
}

void cndmask_b16(Wave& wave, const Instruction& i) {
  expect_plain_16(i);
  Lanes a, b;
  read_16(wave, i, i.src0, 0, false, a);
  read_16(wave, i, i.src1, 1, false, b);
  const uint64_t mask = read_mask(wave, i.src2);
  each_lane(wave, [&](int lane) { a.lane[lane] = mask >> lane & 1 ? b.lane[lane] : a.lane[lane]; });
  write_16(wave, i, a.lane);
}

constexpr auto MOVE = [](uint32_t a) { return a; };

// A register whose number is raised.
Operand raised(const Operand& operand, uint32_t by) {
  Operand result = operand;
  const uint32_t number = operand.index + by;
  if (!operand.is_vector() || number >= AGPR) fail("M0 leads beyond the vector registers");
  result.index = static_cast<uint16_t>(number);
  return result;
}

// A move from or to a register that is known only now, and may be pending as any other.
void move_indexed(Wave& wave, const Instruction& i, uint32_t read_by, uint32_t write_by) {
  Instruction moved = i;
  moved.dst = raised(i.dst, write_by);
  moved.reads.clear();
  moved.writes = {{true, moved.dst.index, 1}};
  if (i.src0.is_vector()) {
    moved.src0 = raised(i.src0, read_by);
    moved.reads = {{true, moved.src0.index, 1}};
  }
  if (wave.group->launch->settings.check_waits) wave.waits.check(moved, wave);
  bits1<MOVE>(wave, moved);
}

void movrels_b32(Wave& wave, const Instruction& i) { move_indexed(wave, i, wave.s[M0], 0); }

void movreld_b32(Wave& wave, const Instruction& i) { move_indexed(wave, i, 0, wave.s[M0]); }

void mov_b32(Wave& wave, const Instruction& i) {
  if (!wave.mode.indexes_registers()) [[likely]] return bits1<MOVE>(wave, i);
  constexpr uint32_t SOURCE0 = 1u << 12, TARGET = 1u << 15;
  const uint32_t m0 = wave.s[M0], index = m0 & 255;
  move_indexed(wave, i, m0 & SOURCE0 ? index : 0, m0 & TARGET ? index : 0);
}

void readfirstlane_b32(Wave& wave, const Instruction& i) {
  const uint64_t exec = wave.exec();
  const int lane = exec ? std::countr_zero(exec) : 0;
  Lanes buffer;
  write_scalar(wave, i.dst, read_bits(wave, i, i.src0, 0, buffer)[lane]);
}

void readlane_b32(Wave& wave, const Instruction& i) {
  const uint32_t lane = read_scalar(wave, i.src1) & (wave.lanes - 1);
  Lanes buffer;
  write_scalar(wave, i.dst, read_bits(wave, i, i.src0, 0, buffer)[lane]);
}

void writelane_b32(Wave& wave, const Instruction& i) {
  const uint32_t lane = read_scalar(wave, i.src1) & (wave.lanes - 1);
  wave.v[i.dst.index].lane[lane] = read_scalar(wave, i.src0);
}

// Lanes take from the same row of 16, or from the other one of their 32, as 16 numbers of 4 bits
// say. opsel[0] reads inactive lanes, opsel[1] writes 0 where nothing can be read.
template <int OTHER_ROW>
void permlane16_b32(Wave& wave, const Instruction& i) {
  const uint64_t selectors =
      read_scalar(wave, i.src1) | static_cast<uint64_t>(read_scalar(wave, i.src2)) << 32;
  const bool fetches_inactive = i.opsel & 1, bound_ctrl = i.opsel & 2;
  const Lanes from = wave.v[i.src0.index];
  uint32_t* to = wave.v[i.dst.index].lane;
  const uint64_t exec = wave.exec();
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const int in_row = static_cast<int>(selectors >> (4 * (lane & 15)) & 15);
    const int source = ((lane & ~15) ^ OTHER_ROW) | in_row;
    const bool is_read = fetches_inactive || (exec >> source & 1);
    if (!(exec >> lane & 1) || !(is_read || bound_ctrl)) continue;
    to[lane] = is_read ? from.lane[source] : 0;
  }
}

// Rows of WIDTH lanes change places between two registers (gfx950).
template <int WIDTH>
void permlane_swap_b32(Wave& wave, const Instruction& i) {
  if (wave.exec() != ~uint64_t{0}) fail("a swap of rows with lanes off is not interpreted");
  uint32_t* a = wave.v[i.dst.index].lane;
  uint32_t* b = wave.v[i.src0.index].lane;
  for (int lane = 0; lane < MAX_LANES; lane += 2 * WIDTH) {
    std::swap_ranges(a + lane + WIDTH, a + lane + 2 * WIDTH, b + lane);
  }
}

void swap_b32(Wave& wave, const Instruction& i) {
  const Lanes a = wave.v[i.dst.index], b = wave.v[i.src0.index];
  write_bits(wave, i, i.dst, b.lane);
  write_bits(wave, i, i.src0, a.lane);
}

template <bool IS_HIGH>
void mbcnt(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffers[2], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const uint64_t below = (uint64_t{1} << lane) - 1;
    const auto mask = static_cast<uint32_t>(IS_HIGH ? below >> 32 : below);
    result.lane[lane] = b[lane] + std::popcount(a[lane] & mask);
  }
  write_bits(wave, i, i.dst, result.lane);
}

// Bit k of `simm` is the result for sources whose bits are those of k, the first one's on top.
void bitop3_b32(Wave& wave, const Instruction& i) {
  Lanes buffers[3], result;
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  const uint32_t* c = read_bits(wave, i, i.src2, 2, buffers[2]);
  for (int lane = 0; lane < wave.lanes; ++lane) {
    uint32_t bits = 0;
    for (int k = 0; k < 8; ++k) {
      const auto of = [k](uint32_t value, int bit) { return k >> bit & 1 ? value : ~value; };
      if (i.simm >> k & 1) bits |= of(a[lane], 2) & of(b[lane], 1) & of(c[lane], 0);
    }
    result.lane[lane] = bits;
  }
  write_bits(wave, i, i.dst, result.lane);
}

constexpr auto MIN_I32 = [](uint32_t a, uint32_t b) -> uint32_t {
  return std::min(static_cast<int32_t>(a), static_cast<int32_t>(b));
};
constexpr auto MAX_I32 = [](uint32_t a, uint32_t b) -> uint32_t {
  return std::max(static_cast<int32_t>(a), static_cast<int32_t>(b));
};
constexpr auto MIN_U32 = [](uint32_t a, uint32_t b) { return std::min(a, b); };
constexpr auto MAX_U32 = [](uint32_t a, uint32_t b) { return std::max(a, b); };
constexpr auto SIGNED_24 = [](uint32_t a) {
  return static_cast<int64_t>(static_cast<int32_t>(a << 8) >> 8);
};

uint32_t extract_signed(uint32_t a, uint32_t offset, uint32_t width) {
  offset &= 31, width &= 31;
  if (!width) return 0;
  const int64_t value = static_cast<int64_t>(static_cast<int32_t>(a)) >> offset;
  return static_cast<uint32_t>(static_cast<int64_t>(static_cast<uint64_t>(value) << (64 - width)) >>
                               (64 - width));
}

// Bytes of {a, b} as the bytes of c choose: 8 to 11 are signs of its halves, 12 is 0, above 255.
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t all = static_cast<uint64_t>(a) << 32 | b;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t choice = c >> (8 * k) & 255;
    uint32_t byte = choice == 12 ? 0 : 255;
    if (choice < 8) byte = all >> (8 * choice) & 255;
    if (choice >= 8 && choice < 12) byte = all >> (16 * (choice - 8) + 15) & 1 ? 255 : 0;
    result |= byte << (8 * k);
  }
  return result;
}

}  // namespace

std::vector<Entry> integer_instructions() {
  using u16 = uint16_t;
  using u32 = uint32_t;
  using u64 = uint64_t;
  using i32 = int32_t;
  using i64 = int64_t;
  constexpr auto add_u32 = saturating2<[](i64 a, i64 b) { return a + b; }>;
  constexpr auto sub_u32 = saturating2<[](i64 a, i64 b) { return a - b; }>;
  constexpr auto subrev_u32 = saturating2<[](i64 a, i64 b) { return b - a; }>;
  constexpr auto add_u16 = u16_2<[](u16 a, u16 b) -> u16 { return a + b; }>;
  constexpr auto sub_u16 = u16_2<[](u16 a, u16 b) -> u16 { return a - b; }>;
  constexpr auto clz = bits1<[](u32 a) -> u32 { return a ? std::countl_zero(a) : ~0u; }>;
  constexpr auto ctz = bits1<[](u32 a) -> u32 { return a ? std::countr_zero(a) : ~0u; }>;
  // GCC 12 takes >> in a template's argument for closing brackets: shifts stand in parentheses.
  return {
      // Moves
      {"v_nop", [](Wave&, const Instruction&) {}},
      {"v_mov_b32", mov_b32},
      {"v_dual_mov_b32", bits1<MOVE>},
      {"v_mov_b64", mov_b64},
      {"v_mov_b16", u16_1<[](u16 a) { return a; }>},
      {"v_accvgpr_read_b32", bits1<MOVE>},
      {"v_accvgpr_write_b32", bits1<MOVE>},
      {"v_accvgpr_mov_b32", bits1<MOVE>},
      {"v_accvgpr_read", bits1<MOVE>},
      {"v_accvgpr_write", bits1<MOVE>},
      {"v_movrels_b32", movrels_b32},
      {"v_movreld_b32", movreld_b32},
      {"v_readfirstlane_b32", readfirstlane_b32},
      {"v_readlane_b32", readlane_b32},
      {"v_writelane_b32", writelane_b32},
      {"v_permlane16_b32", permlane16_b32<0>},
      {"v_permlanex16_b32", permlane16_b32<16>},
      {"v_permlane16_swap_b32", permlane_swap_b32<16>},
      {"v_permlane32_swap_b32", permlane_swap_b32<32>},
      {"v_swap_b32", swap_b32},
      {"v_cndmask_b32", cndmask_b32},
      {"v_dual_cndmask_b32", cndmask_b32},
      {"v_cndmask_b16", cndmask_b16},
      {"v_mbcnt_lo_u32_b32", mbcnt<false>},
      {"v_mbcnt_hi_u32_b32", mbcnt<true>},
      // 32 bits
      {"v_not_b32", bits1<[](u32 a) { return ~a; }>},
      {"v_bfrev_b32", bits1<[](u32 a) {
         u32 result = 0;
         for (int k = 0; k < 32; ++k) result |= (a >> k & 1) << (31 - k);
         return result;
       }>},
      {"v_ffbh_u32", clz},
      {"v_clz_i32_u32", clz},
      {"v_ffbl_b32", ctz},
      {"v_ctz_i32_b32", ctz},
      {"v_add_u32", add_u32},
      {"v_add_nc_u32", add_u32},
      {"v_dual_add_nc_u32", add_u32},
      {"v_sub_u32", sub_u32},
      {"v_sub_nc_u32", sub_u32},
      {"v_subrev_u32", subrev_u32},
      {"v_subrev_nc_u32", subrev_u32},
      {"v_and_b32", bits2<[](u32 a, u32 b) { return a & b; }>},
      {"v_dual_and_b32", bits2<[](u32 a, u32 b) { return a & b; }>},
      {"v_or_b32", bits2<[](u32 a, u32 b) { return a | b; }>},
      {"v_xor_b32", bits2<[](u32 a, u32 b) { return a ^ b; }>},
      {"v_xnor_b32", bits2<[](u32 a, u32 b) { return ~(a ^ b); }>},
      {"v_lshlrev_b32", bits2<[](u32 a, u32 b) { return b << (a & 31); }>},
      {"v_dual_lshlrev_b32", bits2<[](u32 a, u32 b) { return b << (a & 31); }>},
      {"v_lshrrev_b32", bits2<[](u32 a, u32 b) { return (b >> (a & 31)); }>},
      {"v_ashrrev_i32", bits2<[](u32 a, u32 b) -> u32 { return (static_cast<i32>(b) >> (a & 31)); }>},
      {"v_mul_lo_u32", bits2<[](u32 a, u32 b) { return a * b; }>},
      {"v_mul_hi_u32", bits2<[](u32 a, u32 b) -> u32 { return (static_cast<u64>(a) * b >> 32); }>},
      {"v_mul_hi_i32", bits2<[](u32 a, u32 b) -> u32 {
         return (static_cast<i64>(static_cast<i32>(a)) * static_cast<i32>(b) >> 32);
       }>},
      {"v_mul_u32_u24", bits2<[](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }>},
      {"v_mul_hi_u32_u24", bits2<[](u32 a, u32 b) -> u32 {
         return (static_cast<u64>(a & 0xffffff) * (b & 0xffffff) >> 32);
       }>},
      {"v_mul_i32_i24",
       bits2<[](u32 a, u32 b) { return static_cast<u32>(SIGNED_24(a) * SIGNED_24(b)); }>},
      {"v_min_i32", bits2<MIN_I32>},
      {"v_max_i32", bits2<MAX_I32>},
      {"v_min_u32", bits2<MIN_U32>},
      {"v_max_u32", bits2<MAX_U32>},
      {"v_bcnt_u32_b32", bits2<[](u32 a, u32 b) -> u32 { return std::popcount(a) + b; }>},
      {"v_bfm_b32", bits2<[](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }>},
      {"v_add3_u32", bits3<[](u32 a, u32 b, u32 c) { return a + b + c; }>},
      {"v_add_lshl_u32", bits3<[](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); }>},
      {"v_lshl_add_u32", bits3<[](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; }>},
      {"v_lshl_or_b32", bits3<[](u32 a, u32 b, u32 c) { return a << (b & 31) | c; }>},
      {"v_and_or_b32", bits3<[](u32 a, u32 b, u32 c) { return (a & b) | c; }>},
      {"v_or3_b32", bits3<[](u32 a, u32 b, u32 c) { return a | b | c; }>},
      {"v_xor3_b32", bits3<[](u32 a, u32 b, u32 c) { return a ^ b ^ c; }>},
      {"v_xad_u32", bits3<[](u32 a, u32 b, u32 c) { return (a ^ b) + c; }>},
      {"v_bfe_u32", bits3<[](u32 a, u32 b, u32 c) { return (a >> (b & 31) & ((1u << (c & 31)) - 1)); }>},
      {"v_bfe_i32", bits3<extract_signed>},
      {"v_bfi_b32", bits3<[](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); }>},
      {"v_alignbit_b32", bits3<[](u32 a, u32 b, u32 c) -> u32 {
         return ((static_cast<u64>(a) << 32 | b) >> (c & 31));
       }>},
      {"v_alignbyte_b32", bits3<[](u32 a, u32 b, u32 c) -> u32 {
         return ((static_cast<u64>(a) << 32 | b) >> (8 * (c & 3)));
       }>},
      {"v_perm_b32", bits3<permute_bytes>},
      {"v_bitop3_b32", bitop3_b32},
      {"v_mad_u32_u24",
       bits3<[](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; }>},
      {"v_mad_i32_i24", bits3<[](u32 a, u32 b, u32 c) {
         return static_cast<u32>(SIGNED_24(a) * SIGNED_24(b)) + c;
       }>},
      {"v_min3_i32", bits3<[](u32 a, u32 b, u32 c) { return MIN_I32(MIN_I32(a, b), c); }>},
      {"v_max3_i32", bits3<[](u32 a, u32 b, u32 c) { return MAX_I32(MAX_I32(a, b), c); }>},
      {"v_min3_u32", bits3<[](u32 a, u32 b, u32 c) { return MIN_U32(MIN_U32(a, b), c); }>},
      {"v_max3_u32", bits3<[](u32 a, u32 b, u32 c) { return MAX_U32(MAX_U32(a, b), c); }>},
      {"v_minmax_i32", bits3<[](u32 a, u32 b, u32 c) { return MAX_I32(MIN_I32(a, b), c); }>},
      {"v_maxmin_i32", bits3<[](u32 a, u32 b, u32 c) { return MIN_I32(MAX_I32(a, b), c); }>},
      {"v_minmax_u32", bits3<[](u32 a, u32 b, u32 c) { return MAX_U32(MIN_U32(a, b), c); }>},
      {"v_maxmin_u32", bits3<[](u32 a, u32 b, u32 c) { return MIN_U32(MAX_U32(a, b), c); }>},
      {"v_med3_i32", bits3<[](u32 a, u32 b, u32 c) {
         return MAX_I32(MIN_I32(a, b), MIN_I32(MAX_I32(a, b), c));
       }>},
      {"v_med3_u32", bits3<[](u32 a, u32 b, u32 c) {
         return MAX_U32(MIN_U32(a, b), MIN_U32(MAX_U32(a, b), c));
       }>},
      {"v_add_co_u32", add_carry<true, false>},
      {"v_addc_co_u32", add_carry<true, true>},
      {"v_add_co_ci_u32", add_carry<true, true>},
      {"v_sub_co_u32", add_carry<false, false>},
      {"v_subb_co_u32", add_carry<false, true>},
      {"v_sub_co_ci_u32", add_carry<false, true>},
      {"v_subrev_co_u32", add_carry<false, false, true>},
      {"v_subbrev_co_u32", add_carry<false, true, true>},
      {"v_subrev_co_ci_u32", add_carry<false, true, true>},
      // 64 bits
      {"v_lshlrev_b64", shift64<[](u32 a, u64 b) { return b << a; }>},
      {"v_lshrrev_b64", shift64<[](u32 a, u64 b) { return (b >> a); }>},
      {"v_ashrrev_i64", shift64<[](u32 a, u64 b) -> u64 { return (static_cast<i64>(b) >> a); }>},
      {"v_lshl_add_u64", lshl_add_u64},
      {"v_mad_u64_u32", mad_64_32<false>},
      {"v_mad_co_u64_u32", mad_64_32<false>},
      {"v_mad_i64_i32", mad_64_32<true>},
      {"v_mad_co_i64_i32", mad_64_32<true>},
      {"v_add_f64", f64_2<ADD>},
      {"v_mul_f64", f64_2<MUL>},
      // 16 bits
      {"v_not_b16", u16_1<[](u16 a) -> u16 { return ~a; }>},
      {"v_and_b16", u16_2<[](u16 a, u16 b) -> u16 { return a & b; }>},
      {"v_or_b16", u16_2<[](u16 a, u16 b) -> u16 { return a | b; }>},
      {"v_xor_b16", u16_2<[](u16 a, u16 b) -> u16 { return a ^ b; }>},
      {"v_add_u16", add_u16},
      {"v_add_nc_u16", add_u16},
      {"v_sub_u16", sub_u16},
      {"v_sub_nc_u16", sub_u16},
      {"v_subrev_u16", u16_2<[](u16 a, u16 b) -> u16 { return b - a; }>},
      {"v_mul_lo_u16", u16_2<[](u16 a, u16 b) -> u16 { return static_cast<u32>(a) * b; }>},
      {"v_lshlrev_b16", u16_2<[](u16 a, u16 b) -> u16 { return b << (a & 15); }>},
      {"v_lshrrev_b16", u16_2<[](u16 a, u16 b) -> u16 { return (b >> (a & 15)); }>},
      {"v_ashrrev_i16",
       u16_2<[](u16 a, u16 b) -> u16 { return (static_cast<int16_t>(b) >> (a & 15)); }>},
      {"v_min_u16", u16_2<[](u16 a, u16 b) { return std::min(a, b); }>},
      {"v_max_u16", u16_2<[](u16 a, u16 b) { return std::max(a, b); }>},
      {"v_min_i16", u16_2<[](u16 a, u16 b) -> u16 {
         return std::min(static_cast<int16_t>(a), static_cast<int16_t>(b));
       }>},
      {"v_max_i16", u16_2<[](u16 a, u16 b) -> u16 {
         return std::max(static_cast<int16_t>(a), static_cast<int16_t>(b));
       }>},
      {"v_mad_u16", u16_3<[](u16 a, u16 b, u16 c) -> u16 { return static_cast<u32>(a) * b + c; }>},
      {"v_mad_legacy_u16",
       u16_3<[](u16 a, u16 b, u16 c) -> u16 { return static_cast<u32>(a) * b + c; }>},
  };
}

}  // namespace isa
