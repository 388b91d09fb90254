#include "operands.h"

namespace isa {

void fail(const std::string& why) { throw Fault(why); }

// Scalars

uint32_t read_scalar(const Wave& wave, const Operand& operand, int part) {
  switch (operand.kind) {
    case Kind::sgpr:
      return wave.s[operand.index + part];
    case Kind::constant:
      return static_cast<uint32_t>(operand.value >> (32 * part));
    case Kind::null:
      return 0;
    case Kind::scc:
      return part ? 0 : wave.scc;
    case Kind::vccz:
      return part ? 0 : wave.mask(VCC) == 0;
    case Kind::execz:
      return part ? 0 : wave.exec() == 0;
    default:
      fail("a scalar operand is missing");
  }
}

uint64_t read_scalar64(const Wave& wave, const Operand& operand) {
  if (operand.kind == Kind::constant) return operand.value;
  return read_scalar(wave, operand, 0) |
         static_cast<uint64_t>(read_scalar(wave, operand, 1)) << 32;
}

void write_scalar(Wave& wave, const Operand& operand, uint32_t value, int part) {
  if (operand.kind == Kind::null) return;
  if (operand.kind != Kind::sgpr) fail("a scalar destination is missing");
  wave.s[operand.index + part] = value;
}

void write_scalar64(Wave& wave, const Operand& operand, uint64_t value) {
  write_scalar(wave, operand, static_cast<uint32_t>(value), 0);
  write_scalar(wave, operand, static_cast<uint32_t>(value >> 32), 1);
}

uint64_t read_mask(const Wave& wave, const Operand& operand) {
  if (wave.lanes == 64) return read_scalar64(wave, operand);
  return read_scalar(wave, operand);
}

void write_mask(Wave& wave, const Operand& operand, uint64_t mask) {
  if (wave.lanes == 64) return write_scalar64(wave, operand, mask);
  write_scalar(wave, operand, static_cast<uint32_t>(mask));
}

// All lanes

namespace {

// The lane that DPP gives `lane`; -1 where there is none.
int dpp_source(const Wave& wave, const Dpp& dpp, int lane) {
  const int in_row = lane & 15, row = lane & ~15;
  if (dpp.form == Dpp::Form::dpp8) {
    return (lane & ~7) | static_cast<int>(dpp.control >> (3 * (lane & 7)) & 7);
  }
  const int control = static_cast<int>(dpp.control), amount = control & 15;
  if (control < 0x100) return (lane & ~3) | (control >> (2 * (lane & 3)) & 3);  // quad_perm
  switch (control >> 4) {
    case 0x10:  // row_shl
      return in_row + amount < 16 ? lane + amount : -1;
    case 0x11:  // row_shr
      return in_row - amount >= 0 ? lane - amount : -1;
    case 0x12:  // row_ror
      return row | ((in_row - amount) & 15);
    case 0x15:  // row_newbcast on gfx90a and later, row_share on RDNA
      return row | amount;
    case 0x16:  // row_xmask
      return row | (in_row ^ amount);
  }
  switch (control) {
    case 0x130:  // wave_shl by one
      return lane + 1 < wave.lanes ? lane + 1 : -1;
    case 0x134:  // wave_rol
      return (lane + 1) % wave.lanes;
    case 0x138:  // wave_shr
      return lane - 1;
    case 0x13c:  // wave_ror
      return (lane + wave.lanes - 1) % wave.lanes;
    case 0x140:  // row_mirror
      return row | (15 - in_row);
    case 0x141:  // row_half_mirror
      return (lane & ~7) | (7 - (lane & 7));
    case 0x142:  // row_bcast:15, the last lane of the row before
      return row - 1;
    case 0x143:  // row_bcast:31, for the upper half
      return lane >= 32 ? 31 : -1;
  }
  fail("dpp_ctrl " + std::to_string(control) + " is not interpreted");
}

bool is_readable(const Wave& wave, const Dpp& dpp, int source) {
  return source >= 0 && (dpp.fetch_inactive || wave.is_active(source));
}

bool is_enabled(const Dpp& dpp, int lane) {
  return (dpp.row_mask >> (lane >> 4) & 1) && (dpp.bank_mask >> (lane >> 2 & 3) & 1);
}

// Lanes that may not be read give 0; whether they write anything is `written_lanes`'s business.
void exchange(const Wave& wave, const Dpp& dpp, Lanes& values) {
  const Lanes old = values;
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const int source = dpp_source(wave, dpp, lane);
    values.lane[lane] = is_readable(wave, dpp, source) ? old.lane[source] : 0;
  }
}

uint32_t selected(uint32_t value, Select select, bool sext) {
  switch (select) {
    case Select::dword:
      return value;
    case Select::word0:
    case Select::word1: {
      const auto word = static_cast<uint16_t>(select == Select::word1 ? value >> 16 : value);
      return sext ? static_cast<uint32_t>(static_cast<int16_t>(word)) : word;
    }
    default: {
      const auto byte = static_cast<uint8_t>(value >> (8 * static_cast<int>(select)));
      return sext ? static_cast<uint32_t>(static_cast<int8_t>(byte)) : byte;
    }
  }
}

void select_parts(const Operand& operand, Lanes& values) {
  for (uint32_t& value : values.lane) value = selected(value, operand.select, operand.sext);
}

void fill(Lanes& values, uint32_t value) { std::fill_n(values.lane, MAX_LANES, value); }

bool is_exchanged(const Instruction& instruction, int source) {
  return source == 0 && instruction.dpp.form != Dpp::Form::none;
}

}  // namespace

const uint32_t* read_bits(const Wave& wave, const Instruction& instruction, const Operand& operand,
                          int source, Lanes& buffer, int part) {
  if (!operand.is_vector()) {
    fill(buffer, read_scalar(wave, operand, part));
  } else if (!is_exchanged(instruction, source) && operand.select == Select::dword) {
    return wave.v[operand.index + part].lane;
  } else {
    buffer = wave.v[operand.index + part];
  }
  if (is_exchanged(instruction, source)) exchange(wave, instruction.dpp, buffer);
  if (operand.select != Select::dword) select_parts(operand, buffer);
  return buffer.lane;
}

const uint32_t* read_f32(const Wave& wave, const Instruction& instruction, const Operand& operand,
                         int source, Lanes& buffer) {
  const uint32_t* bits = read_bits(wave, instruction, operand, source, buffer);
  const bool flushes = !wave.mode.keeps_f32_denormals();
  if (!operand.neg && !operand.abs && !flushes) return bits;
  const uint32_t keep = operand.abs ? 0x7fffffff : 0xffffffff;
  const uint32_t flip = operand.neg ? 0x80000000 : 0;
  for (int lane = 0; lane < MAX_LANES; ++lane) {
    uint32_t value = bits[lane];
    if (flushes) value = as_bits(flush_f32(as_float(value)));
    buffer.lane[lane] = (value & keep) ^ flip;
  }
  return buffer.lane;
}

void read_16(const Wave& wave, const Instruction& instruction, const Operand& operand, int source,
             bool is_float, Lanes& values) {
  const uint32_t* bits = read_bits(wave, instruction, operand, source, values);
  const int shift = operand.high && operand.kind != Kind::constant ? 16 : 0;
  const uint32_t keep = operand.abs ? 0x7fff : 0xffff, flip = operand.neg ? 0x8000 : 0;
  const bool flushes = is_float && !wave.mode.keeps_f16_f64_denormals();
  if (!is_float && (operand.neg || operand.abs)) fail("neg or abs of an integer");
  for (int lane = 0; lane < MAX_LANES; ++lane) {
    auto value = static_cast<uint16_t>(bits[lane] >> shift);
    if (flushes) value = flush_f16(value);
    values.lane[lane] = (value & keep) ^ flip;
  }
}

void read_64(const Wave& wave, const Instruction& instruction, const Operand& operand, int source,
             uint64_t* values) {
  if (is_exchanged(instruction, source)) fail("DPP of 64 bits is not interpreted");
  if (!operand.is_vector()) {
    std::fill_n(values, MAX_LANES, read_scalar64(wave, operand));
  } else {
    const uint32_t *low = wave.v[operand.index].lane, *high = wave.v[operand.index + 1].lane;
    for (int lane = 0; lane < MAX_LANES; ++lane) {
      values[lane] = low[lane] | static_cast<uint64_t>(high[lane]) << 32;
    }
  }
  if (!operand.neg && !operand.abs) return;
  constexpr uint64_t SIGN = uint64_t{1} << 63;
  for (int lane = 0; lane < MAX_LANES; ++lane) {
    if (operand.abs) values[lane] &= ~SIGN;
    if (operand.neg) values[lane] ^= SIGN;
  }
}

uint64_t written_lanes(const Wave& wave, const Instruction& instruction) {
  const Dpp& dpp = instruction.dpp;
  uint64_t lanes = wave.exec();
  if (dpp.form == Dpp::Form::none) return lanes;
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const bool has_value =
        dpp.form == Dpp::Form::dpp8 || dpp.bound_ctrl ||
        is_readable(wave, dpp, dpp_source(wave, dpp, lane));
    if (!is_enabled(dpp, lane) || !has_value) lanes &= ~(uint64_t{1} << lane);
  }
  return lanes;
}

void write_bits(Wave& wave, const Instruction& instruction, const Operand& operand,
                const uint32_t* values, int part) {
  if (!operand.is_vector()) fail("a vector destination is missing");
  uint32_t* to = wave.v[operand.index + part].lane;
  const uint64_t lanes = written_lanes(wave, instruction);
  if (lanes == ~uint64_t{0} && !instruction.is_sdwa) {
    std::memcpy(to, values, sizeof(Lanes));
    return;
  }
  if (lanes == 0xffffffff && wave.lanes == 32) {
    std::memcpy(to, values, sizeof(Lanes) / 2);
    return;
  }
  if (!instruction.is_sdwa || instruction.dst_select == Select::dword) {
    for (int lane = 0; lane < wave.lanes; ++lane) {
      if (lanes >> lane & 1) to[lane] = values[lane];
    }
    return;
  }
  const Select select = instruction.dst_select;
  const bool is_word = select >= Select::word0;
  const int shift = is_word ? 16 * (select == Select::word1) : 8 * static_cast<int>(select);
  const uint32_t mask = (is_word ? 0xffffu : 0xffu) << shift;
  if (instruction.dst_unused == 1) fail("dst_unused:UNUSED_SEXT is not interpreted");
  for (int lane = 0; lane < wave.lanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint32_t around = instruction.dst_unused == 2 ? to[lane] & ~mask : 0;
    to[lane] = around | (values[lane] << shift & mask);
  }
}

void write_f32(Wave& wave, const Instruction& instruction, Lanes& values) {
  if (instruction.omod || instruction.clamp || !wave.mode.keeps_f32_denormals()) {
    constexpr float FACTORS[] = {1, 2, 4, 0.5f};
    const bool flushes = !wave.mode.keeps_f32_denormals();
    for (uint32_t& value : values.lane) {
      float x = as_float(value);
      if (flushes) x = flush_f32(x);
      if (instruction.omod) x = flush_f32(x * FACTORS[instruction.omod]);
      value = as_bits(instruction.clamp ? clamped(x) : x);
    }
  }
  write_bits(wave, instruction, instruction.dst, values.lane);
}

void write_16(Wave& wave, const Instruction& instruction, const uint32_t* values) {
  const Operand& operand = instruction.dst;
  if (instruction.is_sdwa) return write_bits(wave, instruction, operand, values);
  if (!operand.is_vector()) fail("a vector destination is missing");
  const uint32_t* old = wave.v[operand.index].lane;
  const bool keeps = wave.arch != Arch::cdna;
  Lanes whole;
  for (int lane = 0; lane < MAX_LANES; ++lane) {
    const uint32_t value = values[lane] & 0xffff;
    const uint32_t low = (keeps ? old[lane] & 0xffff0000 : 0) | value;
    whole.lane[lane] = operand.high ? (old[lane] & 0xffff) | value << 16 : low;
  }
  write_bits(wave, instruction, operand, whole.lane);
}

void write_64(Wave& wave, const Instruction& instruction, const uint64_t* values) {
  Lanes low, high;
  for (int lane = 0; lane < MAX_LANES; ++lane) {
    low.lane[lane] = static_cast<uint32_t>(values[lane]);
    high.lane[lane] = static_cast<uint32_t>(values[lane] >> 32);
  }
  write_bits(wave, instruction, instruction.dst, low.lane);
  write_bits(wave, instruction, instruction.dst, high.lane, 1);
}

void expect_no_float_modifiers(const Instruction& instruction) {
  const auto is_modified = [](const Operand& operand) { return operand.neg || operand.abs; };
  if (instruction.clamp || instruction.omod || is_modified(instruction.src0) ||
      is_modified(instruction.src1) || is_modified(instruction.src2)) {
    fail("a modifier of floats on integers is not interpreted");
  }
}

}  // namespace isa
