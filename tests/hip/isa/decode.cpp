// Bytes to instructions.
//
// Encodings, fields, opcodes and types of operands are tables that tables.py writes. Here is the
// rest: how codes name registers and constants, what modifiers mean, and what is implied.
#include <algorithm>
#include <cstring>
#include <string_view>
#include <unordered_map>

#include "wave.h"

namespace isa {

namespace {

enum class Field : uint8_t;
enum class Type : uint8_t;   // which form constants take
enum class Place : uint8_t;  // which registers an operand may be in
enum class Variant : uint8_t { none, lit, dpp16, dpp8, sdwa };

// Bits of an encoding. Registers have the code base + (bits << shift).
struct FieldRow {
  Field field;
  uint8_t low, width;
  uint16_t base;
  uint8_t shift;
};

struct OperandRow {
  Field field;
  Place place;
  Type type;
  uint8_t registers;
  bool is_16_bits;
};

struct OpcodeRow {
  uint16_t number;
  const char* name;
  uint16_t first_operand, num_operands;
  bool is_earlier;  // of chips before gfx940
};

// A variant follows its main encoding, and has the same opcodes.
struct FormatRow {
  const char* name;
  Variant variant;
  uint8_t size;
  uint32_t mask, value;  // of the first dword
  uint16_t first_field, num_fields, first_opcode, num_opcodes;
};

#include "tables.inc"

using std::string_view;

constexpr uint32_t VGPR_CODE = 256;
constexpr uint32_t LITERAL_CODE = 255, DPP16_CODE = 250, SDWA_CODE = 249, DPP8_CODE = 233;

bool contains(string_view text, string_view part) { return text.find(part) != text.npos; }

bool starts_with_any(string_view text, std::initializer_list<string_view> prefixes) {
  return std::any_of(prefixes.begin(), prefixes.end(),
                     [&](string_view prefix) { return text.starts_with(prefix); });
}

bool is_before_gfx940(const Chip& chip) {
  return chip.name == "gfx908" || chip.name == "gfx90a";
}

int32_t sign_extended(uint32_t value, int width) {
  return static_cast<int32_t>(value << (32 - width)) >> (32 - width);
}

std::string hex(const uint8_t* bytes, size_t size) {
  std::string text;
  for (size_t k = 0; k + 4 <= size; k += 4) {
    uint32_t word;
    std::memcpy(&word, bytes + k, 4);
    char digits[12];
    std::snprintf(digits, sizeof digits, " %08x", word);
    text += digits;
  }
  return text;
}

// The bytes of an instruction together with its row of the tables.
struct Encoding {
  const Chip& chip;
  const FormatRow* format;
  const OpcodeRow* opcode;
  uint32_t words[4] = {};

  uint32_t bits(int low, int width) const {
    return words[low / 32] >> (low % 32) & static_cast<uint32_t>((uint64_t{1} << width) - 1);
  }
  const FieldRow* find(Field field) const {
    const FieldRow* row = FIELDS + format->first_field;
    const FieldRow* end = row + format->num_fields;
    row = std::find_if(row, end, [&](const FieldRow& r) { return r.field == field; });
    return row == end ? nullptr : row;
  }
  bool has(Field field) const { return find(field); }
  // 0 where the format has no such field.
  uint32_t operator[](Field field) const {
    const FieldRow* row = find(field);
    return row ? bits(row->low, row->width) : 0;
  }
  uint32_t code(Field field) const {
    const FieldRow* row = find(field);
    return row->base + (bits(row->low, row->width) << row->shift);
  }
  const OperandRow* operand(Field field) const { return operand_of(*opcode, field); }
  static const OperandRow* operand_of(const OpcodeRow& opcode, Field field) {
    const OperandRow* row = OPERANDS + opcode.first_operand;
    const OperandRow* end = row + opcode.num_operands;
    row = std::find_if(row, end, [&](const OperandRow& r) { return r.field == field; });
    return row == end ? nullptr : row;
  }
  bool is_rdna() const { return chip.arch != Arch::cdna; }
  bool is_scalar() const { return string_view(format->name).starts_with("SOP"); }
  string_view family() const {  // the format's name without its variant
    const string_view name = format->name;
    return name.substr(0, name.find('_'));
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw Fault(std::string(opcode ? opcode->name : "?") + " (" + format->name +
                hex(reinterpret_cast<const uint8_t*>(words), format->size) + "): " + why);
  }
};

// Which format, which opcode

struct Formats {
  const FormatRow *begin, *end;
};

Formats formats_of(Arch arch) {
  switch (arch) {
    case Arch::cdna:
      return {std::begin(CDNA_FORMATS), std::end(CDNA_FORMATS)};
    case Arch::rdna3:
      return {std::begin(RDNA3_FORMATS), std::end(RDNA3_FORMATS)};
    default:
      return {std::begin(RDNA4_FORMATS), std::end(RDNA4_FORMATS)};
  }
}

const OpcodeRow* find_opcode(const Chip& chip, const FormatRow& format, uint32_t number) {
  const OpcodeRow* found = nullptr;
  for (int k = 0; k < format.num_opcodes; ++k) {
    const OpcodeRow& row = OPCODES[format.first_opcode + k];
    if (row.number != number) continue;
    if (!row.is_earlier || is_before_gfx940(chip)) found = &row;  // earlier ones come last
  }
  return found;
}

bool has_k(string_view name) {
  return contains(name, "fmamk_") || contains(name, "fmaak_") || contains(name, "madmk_") ||
         contains(name, "madak_");
}

bool needs_literal(string_view name) { return name == "s_setreg_imm32_b32" || has_k(name); }

Variant variant_of(const Encoding& e, const OpcodeRow* second) {
  if (needs_literal(e.opcode->name) || (second && needs_literal(second->name))) {
    return Variant::lit;
  }
  for (const Field field : {Field::src0, Field::src1, Field::src2, Field::srcx0}) {
    if (!e.has(field)) continue;
    const uint32_t code = e.code(field);
    if (code == LITERAL_CODE) return Variant::lit;
    if (code == DPP16_CODE) return Variant::dpp16;
    if (e.is_rdna() && (code == DPP8_CODE || code == DPP8_CODE + 1)) return Variant::dpp8;
    if (!e.is_rdna() && code == SDWA_CODE) return Variant::sdwa;
  }
  return Variant::none;
}

// Bits that no field has must be 0: who knows what they ask for.
void expect_known_bits(const Encoding& e) {
  uint32_t known[4] = {e.format->mask};
  for (int k = 0; k < e.format->num_fields; ++k) {
    const FieldRow& row = FIELDS[e.format->first_field + k];
    known[row.low / 32] |= static_cast<uint32_t>((uint64_t{1} << row.width) - 1) << row.low % 32;
  }
  for (int word = 0; word < e.format->size / 4; ++word) {
    if (e.words[word] & ~known[word]) e.fail("a bit is set that its format does not have");
  }
}

Encoding find_encoding(const Chip& chip, const uint8_t* bytes, size_t size) {
  Encoding e{.chip = chip, .format = nullptr, .opcode = nullptr};
  std::memcpy(e.words, bytes, std::min(size, sizeof e.words));
  const auto [begin, end] = formats_of(chip.arch);
  for (const FormatRow* format = begin; format != end && size >= 4; ++format) {
    if (format->variant != Variant::none || (e.words[0] & format->mask) != format->value) continue;
    e.format = format;
    const bool is_pair = e.has(Field::opx);
    e.opcode = find_opcode(chip, *format, e[is_pair ? Field::opx : Field::op]);
    if (!e.opcode) continue;
    const Variant variant =
        variant_of(e, is_pair ? find_opcode(chip, *format, e[Field::opy]) : nullptr);
    for (; format->variant != variant; ++format) {
      if (format + 1 == end || format[1].variant == Variant::none) {
        e.fail("its format has no such variant");
      }
    }
    e.format = format;
    if (format->size > size) e.fail("the code ends within it");
    expect_known_bits(e);
    return e;
  }
  throw Fault(chip.name + " has no instruction" + hex(bytes, std::min<size_t>(size, 8)));
}

// Operands

constexpr int NUM_FLOATS = 9;  // 0.5, -0.5, 1, -1, 2, -2, 4, -4, 1 / (2 pi)
constexpr uint16_t F16_CONSTANTS[NUM_FLOATS] = {0x3800, 0xb800, 0x3c00, 0xbc00, 0x4000,
                                                0xc000, 0x4400, 0xc400, 0x3118};
constexpr uint32_t F32_CONSTANTS[NUM_FLOATS] = {0x3f000000, 0xbf000000, 0x3f800000,
                                                0xbf800000, 0x40000000, 0xc0000000,
                                                0x40800000, 0xc0800000, 0x3e22f983};
constexpr uint64_t F64_CONSTANTS[NUM_FLOATS] = {
    0x3fe0000000000000, 0xbfe0000000000000, 0x3ff0000000000000,
    0xbff0000000000000, 0x4000000000000000, 0xc000000000000000,
    0x4010000000000000, 0xc010000000000000, 0x3fc45f306dc9c882};

uint64_t float_constant(int which, Type type) {
  switch (type) {
    case Type::f16:
    case Type::b16:
      return F16_CONSTANTS[which];
    case Type::bf16:
      return F32_CONSTANTS[which] >> 16;
    case Type::f64:
    case Type::i64:
    case Type::b64:
      return F64_CONSTANTS[which];
    default:
      return F32_CONSTANTS[which];
  }
}

uint64_t literal_constant(const Encoding& e, const OperandRow& row) {
  const uint32_t literal = e[Field::literal];
  if (row.is_16_bits && !e.is_scalar()) return literal & 0xffff;
  if (row.type == Type::f64) return static_cast<uint64_t>(literal) << 32;
  if (row.type == Type::i64) return static_cast<uint64_t>(static_cast<int32_t>(literal));
  return literal;
}

Operand register_operand(Kind kind, uint32_t index, uint8_t count) {
  Operand operand;
  operand.kind = kind;
  operand.index = static_cast<uint16_t>(index);
  operand.count = count;
  return operand;
}

Operand constant_operand(uint32_t code, uint64_t value) {
  Operand operand;
  operand.kind = Kind::constant;
  operand.code = static_cast<uint16_t>(code);
  operand.value = value;
  return operand;
}

// Codes below 128.
Operand scalar_operand(const Encoding& e, uint32_t code, uint8_t count) {
  constexpr uint32_t RDNA_NULL = 124, RDNA_M0 = 125, CDNA_M0 = 124;
  if (e.is_rdna() && code == RDNA_NULL) return register_operand(Kind::null, 0, count);
  if (code == (e.is_rdna() ? RDNA_M0 : CDNA_M0)) return register_operand(Kind::sgpr, M0, count);
  if (code == 125 || code + count > NUM_SGPRS) e.fail("no such scalar register");
  return register_operand(Kind::sgpr, code, count);
}

Operand operand_at(const Encoding& e, uint32_t code, const OperandRow& row) {
  if (code >= VGPR_CODE) {
    const bool is_accumulator = row.place == Place::accumulator;
    const uint32_t index = code - VGPR_CODE;
    if (index + row.registers > AGPR) e.fail("registers beyond the last");
    return register_operand(Kind::vgpr, index + (is_accumulator ? AGPR : 0), row.registers);
  }
  if (code < 128) return scalar_operand(e, code, row.registers);
  if (code <= 192) return constant_operand(code, code - 128);
  if (code <= 208) return constant_operand(code, uint64_t{192} - code);
  if (code >= 240 && code < 240 + NUM_FLOATS) {
    const bool is_word = e.is_scalar() && row.type == Type::b16;  // s_pack takes 32 bits apart
    const Type type = is_word ? Type::b32 : row.type;
    return constant_operand(code, float_constant(static_cast<int>(code) - 240, type));
  }
  if (code == LITERAL_CODE) return constant_operand(code, literal_constant(e, row));
  if (code == 253) return register_operand(Kind::scc, 0, 1);
  if (!e.is_rdna() && code == 251) return register_operand(Kind::vccz, 0, 1);
  if (!e.is_rdna() && code == 252) return register_operand(Kind::execz, 0, 1);
  e.fail("operand " + std::to_string(code) + " is not interpreted");
}

// None where the opcode has no such operand. registers: how many, if not what the tables say.
Operand operand_of(const Encoding& e, Field field, int registers = 0) {
  if (!e.operand(field) || !e.has(field)) return {};
  OperandRow row = *e.operand(field);
  if (registers) row.registers = static_cast<uint8_t>(registers);
  uint32_t code = e.code(field);
  if (row.place == Place::scalar && code >= VGPR_CODE) {
    if (field != Field::dst) e.fail("a vector register stands where a scalar one must");
    code -= VGPR_CODE;  // v_readfirstlane
  }
  return operand_at(e, code, row);
}

void set_accumulator(const Encoding& e, Field field, bool is_accumulator, Operand& operand) {
  const OperandRow* row = e.operand(field);
  if (row && row->place == Place::either && operand.is_vector() && is_accumulator) {
    operand.index += AGPR;
  }
}

Operand vcc(const Encoding& e) { return register_operand(Kind::sgpr, VCC, e.is_rdna() ? 1 : 2); }

Operand none_if_null(const Operand& operand) {
  return operand.kind == Kind::null ? Operand{} : operand;
}

// Vector arithmetic

bool is_vop3(const Encoding& e) { return e.family().starts_with("VOP3"); }

// RDNA names halves of registers in VOP1, VOP2 and VOPC by bit 7 of their numbers.
void take_half(const Encoding& e, Field field, Operand& operand) {
  const OperandRow* row = e.operand(field);
  if (!row || !row->is_16_bits || !operand.is_vector() || operand.index < 128) return;
  operand.index -= 128;
  operand.high = true;
}

void set_opsel(const Encoding& e, Field field, bool is_high, Operand& operand) {
  if (!is_high) return;
  const OperandRow* row = e.operand(field);
  if (!row || !row->is_16_bits || (!operand.is_vector() && operand.kind != Kind::sgpr)) {
    e.fail("op_sel of an operand that has no halves");
  }
  operand.high = true;
}

void apply_vop3(const Encoding& e, Instruction& i) {
  const bool is_bitop3 = i.name.starts_with("v_bitop3_");
  Operand* sources[] = {&i.src0, &i.src1, &i.src2};
  for (int k = 0; k < 3 && !is_bitop3; ++k) {
    sources[k]->neg = e[Field::neg] >> k & 1;
    sources[k]->abs = e[Field::abs] >> k & 1;
    if (sources[k]->kind == Kind::none && (sources[k]->neg || sources[k]->abs)) {
      e.fail("neg or abs of a source that it does not have");
    }
  }
  i.clamp = e[Field::clamp];
  if (is_bitop3) {  // its truth table stands where others have modifiers
    i.simm = static_cast<int32_t>(e[Field::neg] | e[Field::abs] << 3 | e[Field::omod] << 6);
  } else {
    i.omod = static_cast<uint8_t>(e[Field::omod]);
  }
  const uint32_t opsel = e[Field::opsel];
  if (i.name.starts_with("v_permlane")) {
    i.opsel = static_cast<uint8_t>(opsel);
    return;
  }
  set_opsel(e, Field::src0, opsel & 1, i.src0);
  set_opsel(e, Field::src1, opsel & 2, i.src1);
  set_opsel(e, Field::src2, opsel & 4, i.src2);
  set_opsel(e, Field::dst, opsel & 8, i.dst);
}

void apply_dpp(const Encoding& e, Instruction& i) {
  i.dpp.fetch_inactive = e[Field::fi];
  if (e.format->variant == Variant::dpp8) {
    i.dpp.form = Dpp::Form::dpp8;
    i.dpp.fetch_inactive = e.code(Field::marker) == DPP8_CODE + 1;
    i.dpp.control = e.bits(e.find(Field::lane_sel_0)->low, 24);
    return;
  }
  i.dpp.form = Dpp::Form::dpp16;
  i.dpp.control = e[Field::dpp];
  i.dpp.row_mask = static_cast<uint8_t>(e[Field::row_mask]);
  i.dpp.bank_mask = static_cast<uint8_t>(e[Field::bank_mask]);
  i.dpp.bound_ctrl = e[Field::bound_ctrl];
  i.src0.neg |= e[Field::src0_neg];
  i.src0.abs |= e[Field::src0_abs];
  i.src1.neg |= e[Field::src1_neg];
  i.src1.abs |= e[Field::src1_abs];
}

Select select_of(const Encoding& e, Field field) {
  constexpr Select SELECTS[] = {Select::byte0, Select::byte1, Select::byte2, Select::byte3,
                                Select::word0, Select::word1, Select::dword};
  if (e[field] >= std::size(SELECTS)) e.fail("no such part of a register");
  return SELECTS[e[field]];
}

void apply_sdwa(const Encoding& e, Instruction& i) {
  i.is_sdwa = true;
  if (e[Field::s0]) {
    i.src0 = operand_at(e, e.code(Field::src0) - VGPR_CODE, *e.operand(Field::src0));
  }
  i.src0.select = select_of(e, Field::src0_sel);
  i.src0.sext = e[Field::src0_sext];
  i.src0.neg = e[Field::src0_neg];
  i.src0.abs = e[Field::src0_abs];
  if (i.src1.kind != Kind::none) {
    if (e[Field::s1]) {
      i.src1 = operand_at(e, e.code(Field::src1) - VGPR_CODE, *e.operand(Field::src1));
    }
    i.src1.select = select_of(e, Field::src1_sel);
    i.src1.sext = e[Field::src1_sext];
    i.src1.neg = e[Field::src1_neg];
    i.src1.abs = e[Field::src1_abs];
  }
  if (e.has(Field::sd)) {  // comparisons
    if (e[Field::sd]) i.dst = scalar_operand(e, e[Field::sdst], 2);
    return;
  }
  i.dst_select = select_of(e, Field::dst_sel);
  i.dst_unused = static_cast<uint8_t>(e[Field::dst_unused]);
  i.clamp = e[Field::clamp];
  i.omod = static_cast<uint8_t>(e[Field::omod]);
}

// Destinations that are sources as well.
bool adds_to_destination(string_view name) {
  return starts_with_any(name, {"v_fmac_", "v_mac_", "v_dot2c_", "v_dot4c_", "v_dot8c_",
                                "v_pk_fmac_", "v_dot2acc_", "s_fmac_", "v_dual_fmac_",
                                "v_dual_dot2acc_"});
}

bool has_carry_in(string_view name) {
  return contains(name, "_co_ci_") ||
         starts_with_any(name, {"v_addc_co_", "v_subb_co_", "v_subbrev_co_"});
}

// K of fmamk is the middle source, of fmaak the last one.
void add_k(const Encoding& e, const OperandRow& like, Instruction& i) {
  const Operand k = constant_operand(LITERAL_CODE, literal_constant(e, like));
  const bool is_middle = contains(i.name, "mk_");
  i.src2 = is_middle ? i.src1 : k;
  if (is_middle) i.src1 = k;
}

// What an opcode implies in its short encodings.
void add_implied(const Encoding& e, Instruction& i) {
  const string_view name = i.name;
  if (has_k(name)) add_k(e, *e.operand(Field::src0), i);
  if (adds_to_destination(name) && i.src2.kind == Kind::none) i.src2 = i.dst;
  if (contains(name, "_swap_")) i.dst1 = i.src0;
  if (e.family() == "VOPC" && i.dst.kind == Kind::none) {
    const bool sets_exec = e.is_rdna() && name.starts_with("v_cmpx_");
    i.dst = vcc(e);
    if (sets_exec) i.dst.index = EXEC;
  }
  if (e.family() != "VOP2") return;
  if (name.starts_with("v_cndmask_")) i.src2 = vcc(e);
  if (contains(name, "_co_")) i.dst1 = vcc(e);
  if (has_carry_in(name)) i.src2 = vcc(e);
}

void decode_vector(const Encoding& e, Instruction& i) {
  i.dst = operand_of(e, Field::dst);
  i.dst1 = operand_of(e, Field::sdst);
  i.src0 = operand_of(e, Field::src0);
  i.src1 = operand_of(e, Field::src1);
  i.src2 = operand_of(e, Field::src2);
  if (is_vop3(e)) {
    apply_vop3(e, i);
  } else if (e.is_rdna()) {
    take_half(e, Field::dst, i.dst);
    take_half(e, Field::src0, i.src0);
    take_half(e, Field::src1, i.src1);
  }
  const Variant variant = e.format->variant;
  if (variant == Variant::dpp16 || variant == Variant::dpp8) apply_dpp(e, i);
  if (variant == Variant::sdwa) apply_sdwa(e, i);
  add_implied(e, i);
}

// Scalar instructions

// Bits that change ordering or caching only.
uint32_t cache_bits(const Encoding& e) {
  if (e[Field::nv]) e.fail("nv is not interpreted");
  if (e.chip.name == "gfx908" && (e[Field::sc1] || e[Field::acc])) {
    e.fail("a bit is set that gfx908 has for something else");
  }
  if (e.chip.arch == Arch::rdna4) return e[Field::th] | e[Field::scope] << 4;
  const uint32_t first = e[Field::glc] | e[Field::sc0];
  const uint32_t second = e[Field::slc] | e[Field::nt];
  return first | second << 1 | (e[Field::dlc] | e[Field::sc1]) << 2;
}

void decode_scalar(const Encoding& e, Instruction& i) {
  i.dst = operand_of(e, Field::dst);
  i.src0 = operand_of(e, Field::src0);
  i.src1 = operand_of(e, Field::src1);
  i.simm = sign_extended(e[Field::simm16], 16);
  i.literal = e[Field::literal];
  if (i.name == "s_set_gpr_idx_on") {  // the second source is no register: it says which operands
    i.simm = i.bytes[1] & 15;
    i.src1 = {};
  }
  add_implied(e, i);
}

void decode_smem(const Encoding& e, Instruction& i) {
  i.cache_bits = cache_bits(e);
  i.dst = operand_of(e, Field::dst);
  i.base = operand_of(e, Field::sbase);
  if (contains(i.name, "_store") || contains(i.name, "_atomic")) {
    i.src1 = i.dst;
    i.dst = {};
  }
  if (!e.operand(Field::soffset)) return;
  const bool has_imm = e.is_rdna() || e[Field::imm];
  const bool has_register = e.is_rdna() || e[Field::soffset_en];
  const bool is_gfx12 = e.chip.arch == Arch::rdna4;
  if (has_imm) i.offset = sign_extended(e[Field::offset], is_gfx12 ? 24 : 21);
  if (has_register) {
    i.soffset = none_if_null(operand_of(e, Field::soffset));
  } else if (!has_imm) {  // the offset field has the register
    i.soffset = scalar_operand(e, e[Field::offset] & 127, 1);
  }
}

// Packed arithmetic and matrices

// Which of the sources of v_fma_mix are f16 is said by op_sel_hi; so are their constants.
void retype_mixed(const Encoding& e, Field field, bool is_f16, Operand& operand) {
  if (operand.kind != Kind::constant || !is_f16) return;
  OperandRow row = *e.operand(field);
  row.type = Type::f16;
  operand = operand_at(e, operand.code, row);
}

void decode_packed(const Encoding& e, Instruction& i) {
  i.dst = operand_of(e, Field::dst);
  i.src0 = operand_of(e, Field::src0);
  i.src1 = operand_of(e, Field::src1);
  i.src2 = operand_of(e, Field::src2);
  i.opsel = static_cast<uint8_t>(e[Field::opsel]);
  i.opsel_hi = static_cast<uint8_t>(e[Field::opsel_hi] | e[Field::opsel_hi2] << 2);
  i.neg_lo = static_cast<uint8_t>(e[Field::neg]);
  i.neg_hi = static_cast<uint8_t>(e[Field::neg_hi]);
  i.clamp = e[Field::clamp];
  if (contains(i.name, "_mix")) {
    retype_mixed(e, Field::src0, i.opsel_hi & 1, i.src0);
    retype_mixed(e, Field::src1, i.opsel_hi & 2, i.src1);
    retype_mixed(e, Field::src2, i.opsel_hi & 4, i.src2);
  }
  const Variant variant = e.format->variant;
  if (variant == Variant::dpp16 || variant == Variant::dpp8) apply_dpp(e, i);
}

void decode_mfma(const Encoding& e, Instruction& i) {
  i.dst = operand_of(e, Field::dst);
  i.src0 = operand_of(e, Field::src0);
  i.src1 = operand_of(e, Field::src1);
  i.src2 = operand_of(e, Field::src2);
  // gfx908 has no bit for it: sums are always in accumulation registers.
  const bool is_accumulator = e[Field::acc_cd] || e.chip.name == "gfx908";
  set_accumulator(e, Field::dst, is_accumulator, i.dst);
  set_accumulator(e, Field::src2, is_accumulator, i.src2);
  set_accumulator(e, Field::src0, e[Field::acc] & 1, i.src0);
  set_accumulator(e, Field::src1, e[Field::acc] & 2, i.src1);
  i.cbsz = static_cast<uint8_t>(e[Field::cbsz]);
  i.abid = static_cast<uint8_t>(e[Field::abid]);
  i.blgp = static_cast<uint8_t>(e[Field::blgp]);
}

// Pairs: X's fields have names of their own.

void decode_half(const Encoding& e, uint32_t dst, Field src0, Field src1, Instruction& i) {
  const OperandRow *row0 = e.operand(Field::src0), *row1 = e.operand(Field::src1);
  i.dst = register_operand(Kind::vgpr, dst, 1);
  i.src0 = operand_at(e, e.code(src0), *row0);
  i.src1 = row1 ? operand_at(e, e.code(src1), *row1) : Operand{};
  i.src2 = {};
  if (i.name == "v_dual_cndmask_b32") i.src2 = vcc(e);
  if (adds_to_destination(i.name)) i.src2 = i.dst;
  if (has_k(i.name)) add_k(e, *row0, i);
}

void add_registers(const Encoding& e, Instruction& i);
Handler handler_of(const std::string& name);

void decode_pair(const Encoding& e, Instruction& i) {
  const uint32_t x_dst = e[Field::vdstx];
  decode_half(e, x_dst, Field::srcx0, Field::vsrcx1, i);
  Encoding y = e;
  y.opcode = find_opcode(e.chip, *e.format, e[Field::opy]);
  if (!y.opcode) e.fail("no such second instruction");
  i.second = std::make_shared<Instruction>(i);
  Instruction& second = *i.second;
  second.name = y.opcode->name;
  second.second = nullptr;
  const uint32_t y_dst = e[Field::dst] << 1 | (~x_dst & 1);  // the low bit is not X's
  decode_half(y, y_dst, Field::src0, Field::src1, second);
  second.handler = handler_of(second.name);
  add_registers(y, second);
}

// Memory

void decode_ds(const Encoding& e, Instruction& i) {
  if (e[Field::gds]) e.fail("gds is not interpreted");
  i.dst = operand_of(e, Field::dst);
  i.src0 = operand_of(e, Field::addr);
  i.src1 = operand_of(e, Field::data);
  i.src2 = operand_of(e, Field::data1);
  set_accumulator(e, Field::dst, e[Field::acc], i.dst);
  set_accumulator(e, Field::data, e[Field::acc], i.src1);
  set_accumulator(e, Field::data1, e[Field::acc], i.src2);
  i.offset0 = static_cast<uint8_t>(e[Field::offset0]);
  i.offset1 = static_cast<uint8_t>(e[Field::offset1]);
  i.offset = i.offset0 | i.offset1 << 8;
}

// Atomics give the old value back where the first of the cache bits asks for it.
bool returns_value(const Instruction& i) {
  return !contains(i.name, "_atomic") || (i.cache_bits & 1);
}

void decode_flat(const Encoding& e, Instruction& i) {
  const bool is_scratch = contains(e.format->name, "SCRATCH"),
             is_global = contains(e.format->name, "GLOBAL"), is_cdna = !e.is_rdna();
  constexpr uint32_t CDNA_OFF = 127, RDNA_OFF = 124;
  const bool has_saddr = e.operand(Field::saddr) &&
                         e[Field::saddr] != (is_cdna ? CDNA_OFF : RDNA_OFF);
  i.cache_bits = cache_bits(e);
  i.src0 = operand_of(e, Field::addr, is_global && has_saddr ? 1 : 0);  // an offset
  i.src1 = operand_of(e, Field::data);
  if (returns_value(i)) i.dst = operand_of(e, Field::dst);
  set_accumulator(e, Field::dst, e[Field::acc], i.dst);
  set_accumulator(e, Field::data, e[Field::acc], i.src1);
  if (has_saddr) i.base = operand_of(e, Field::saddr);
  if (is_scratch) {
    const bool has_vaddr =
        is_before_gfx940(e.chip) ? !has_saddr : static_cast<bool>(e[Field::sve]);
    if (!has_vaddr) i.src0 = {};
  } else if (is_cdna && e[Field::sve]) {
    e.fail("the lds bit is not interpreted");
  }
  i.to_lds = contains(i.name, "_lds_");
  if (i.to_lds) i.dst = {};
  const int width = e.chip.arch == Arch::rdna4 ? 24 : 13;
  const bool is_signed = is_scratch || is_global || e.chip.arch == Arch::rdna4;
  i.offset = is_signed ? sign_extended(e[Field::offset], width)
                       : static_cast<int32_t>(e[Field::offset]);
}

void decode_buffer(const Encoding& e, Instruction& i) {
  if (e[Field::tfe]) e.fail("tfe is not interpreted");
  i.cache_bits = cache_bits(e);
  i.has_offen = e[Field::offen];
  i.has_idxen = e[Field::idxen];
  const int address_registers = i.has_offen + i.has_idxen;
  if (address_registers) i.src0 = operand_of(e, Field::addr, address_registers);
  i.base = operand_of(e, Field::srsrc);
  i.soffset = none_if_null(operand_of(e, Field::soffset));
  i.to_lds = e[Field::lds] || contains(i.name, "_lds_");
  Operand data = operand_of(e, Field::data);
  set_accumulator(e, Field::data, e[Field::acc], data);
  const bool is_load = contains(i.name, "_load_");
  if (!is_load) i.src1 = data;
  if (is_load ? !i.to_lds : contains(i.name, "_atomic") && returns_value(i)) i.dst = data;
  i.offset = e.chip.arch == Arch::rdna4 ? sign_extended(e[Field::offset], 24)
                                        : static_cast<int32_t>(e[Field::offset]);
}

// Registers that are read and written

void add_range(std::vector<Range>& ranges, const Operand& operand) {
  const bool is_scalar = operand.kind == Kind::sgpr;
  if (!is_scalar && !operand.is_vector()) return;
  if (is_scalar && operand.index >= EXEC) return;
  ranges.push_back({operand.is_vector(), operand.index, operand.count});
}

bool only_reads_destination(const Instruction& i) {
  return starts_with_any(i.name, {"s_cmpk_", "s_setreg_b32"});
}

bool keeps_part_of_destination(const Encoding& e, const Instruction& i) {
  const string_view name = i.name;
  if (i.is_sdwa) return i.dst_unused == 2 && i.dst_select != Select::dword;
  if (contains(name, "_load_") || contains(name, "_read_")) return contains(name, "d16");
  const OperandRow* row = e.operand(Field::dst);
  if (i.dst.high || (e.is_rdna() && row && row->is_16_bits)) return true;
  return contains(name, "_mixlo_") || contains(name, "_mixhi_") || contains(name, "smfmac") ||
         contains(name, "swmmac") ||
         starts_with_any(name, {"v_wmma_f16_", "v_wmma_bf16_", "v_writelane_", "v_swap_",
                                "v_permlane16_swap_", "v_permlane32_swap_", "s_addk_", "s_mulk_",
                                "s_cmov", "s_bitset"});
}

bool reads_vcc(const Instruction& i) {
  return starts_with_any(i.name, {"v_div_fmas_", "s_cbranch_vcc"}) ||
         i.src0.kind == Kind::vccz || i.src1.kind == Kind::vccz;
}

[[noreturn]] void not_interpreted(Wave&, const Instruction& i) {
  throw Fault(i.name + " is not interpreted");
}

Handler handler_of(const std::string& name) {
  static const auto* handlers = [] {
    auto* map = new std::unordered_map<string_view, Handler>;
    for (const auto* part : {&SCALAR, &VECTOR, &MATRIX, &MEMORY, &LDS, &CONTROL}) {
      for (const Entry& entry : *part) map->emplace(entry.name, entry.handler);
    }
    return map;
  }();
  const auto found = handlers->find(name);
  return found == handlers->end() ? not_interpreted : found->second;
}

void add_registers(const Encoding& e, Instruction& i) {
  i.reads.clear();
  i.writes.clear();
  for (const Operand* operand : {&i.src0, &i.src1, &i.src2, &i.base, &i.soffset}) {
    add_range(i.reads, *operand);
  }
  const bool only_reads = only_reads_destination(i);
  if (only_reads || keeps_part_of_destination(e, i)) add_range(i.reads, i.dst);
  if (reads_vcc(i)) add_range(i.reads, vcc(e));
  if (i.to_lds || contains(i.name, "movrel")) i.reads.push_back({false, M0, 1});
  if (!only_reads) add_range(i.writes, i.dst);
  add_range(i.writes, i.dst1);
  if (i.name.starts_with("s_set_gpr_idx_") && i.name != "s_set_gpr_idx_off") {
    i.writes.push_back({false, M0, 1});
  }
}

// Operands by the family of the encoding.
void decode_operands(const Encoding& e, Instruction& i) {
  const string_view family = e.family();
  if (i.format == "VOP3P_MFMA") {
    decode_mfma(e, i);
  } else if (family == "VOP3P") {
    decode_packed(e, i);
  } else if (family == "VOPD") {
    decode_pair(e, i);
  } else if (family.starts_with("VOP")) {
    decode_vector(e, i);
  } else if (family.starts_with("SOP")) {
    decode_scalar(e, i);
  } else if (family == "SMEM") {
    decode_smem(e, i);
  } else if (family == "DS") {
    decode_ds(e, i);
  } else if (family == "MUBUF" || family == "VBUFFER") {
    decode_buffer(e, i);
  } else {
    decode_flat(e, i);
  }
}

}  // namespace

Chip chip_of(const std::string& name) {
  if (starts_with_any(name, {"gfx908", "gfx90a", "gfx942", "gfx950"})) return {name, Arch::cdna};
  if (starts_with_any(name, {"gfx110"})) return {name, Arch::rdna3};
  if (starts_with_any(name, {"gfx120"})) return {name, Arch::rdna4};
  throw Fault("no chip is known as " + name);
}

Instruction decode(const Chip& chip, const uint8_t* bytes, size_t size, uint64_t pc) {
  const Encoding e = find_encoding(chip, bytes, size);
  Instruction i;
  i.name = e.opcode->name;
  i.format = e.format->name;
  i.pc = pc;
  i.size = e.format->size;
  i.bytes.assign(bytes, bytes + i.size);
  decode_operands(e, i);
  i.handler = handler_of(i.name);
  add_registers(e, i);
  if (i.second) {
    i.reads.insert(i.reads.end(), i.second->reads.begin(), i.second->reads.end());
    i.writes.insert(i.writes.end(), i.second->writes.begin(), i.second->writes.end());
  }
  return i;
}

std::vector<Instruction> decode_all(const Chip& chip, const uint8_t* bytes, size_t size,
                                    uint64_t pc) {
  std::vector<Instruction> instructions;
  std::unordered_map<uint64_t, int> index_at;
  for (size_t at = 0; at < size; at += instructions.back().size) {
    index_at[pc + at] = static_cast<int>(instructions.size());
    instructions.push_back(decode(chip, bytes + at, size - at, pc + at));
  }
  for (Instruction& i : instructions) {
    if (i.name != "s_branch" && !i.name.starts_with("s_cbranch_")) continue;
    const auto found = index_at.find(i.pc + 4 + 4 * static_cast<int64_t>(i.simm));
    if (found != index_at.end()) i.target = found->second;
  }
  return instructions;
}

}  // namespace isa
