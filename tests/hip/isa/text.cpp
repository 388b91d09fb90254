// Instructions as LLVM's assembler writes them.
#include <algorithm>
#include <array>
#include <cstdio>

#include "instruction.h"

namespace isa {

namespace {

using std::string;

bool contains(const string& text, const char* part) { return text.find(part) != text.npos; }

string hex(uint64_t value) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(value));
  return digits;
}

// "v5", "s[4:7]"
string range(const char* letter, int index, int count) {
  if (count == 1) return letter + std::to_string(index);
  return string(letter) + "[" + std::to_string(index) + ":" + std::to_string(index + count - 1) +
         "]";
}

// One of a pair of registers that has a name: "vcc", "vcc_lo", "vcc_hi".
string special_pair(const char* name, int part, int count) {
  return count == 2 ? name : string(name) + (part ? "_hi" : "_lo");
}

string scalar_text(const Chip& chip, int index, int count) {
  if (index == M0) return "m0";
  if (index >= EXEC) return special_pair("exec", index - EXEC, count);
  if (index >= TTMP) return range("ttmp", index - TTMP, count);
  if (index >= VCC) return special_pair("vcc", index - VCC, count);
  if (chip.arch == Arch::cdna) {
    if (index >= 104) return special_pair("xnack_mask", index - 104, count);
    if (index >= 102) return special_pair("flat_scratch", index - 102, count);
  }
  return range("s", index, count);
}

string constant_text(const Operand& operand) {
  constexpr const char* FLOATS[] = {"0.5",  "-0.5", "1.0",  "-1.0",      "2.0",
                                    "-2.0", "4.0",  "-4.0", "0.15915494"};
  const int code = operand.code;
  if (code >= 240 && code < 249) return FLOATS[code - 240];
  if (code != 255) return std::to_string(static_cast<int64_t>(operand.value));
  const auto low = static_cast<uint32_t>(operand.value);
  return hex(low ? low : operand.value >> 32);  // f64 has its literal above
}

string plain_text(const Chip& chip, const Operand& operand) {
  switch (operand.kind) {
    case Kind::sgpr:
      return scalar_text(chip, operand.index, operand.count);
    case Kind::vgpr:
      return operand.index >= AGPR ? range("a", operand.index - AGPR, operand.count)
                                   : range("v", operand.index, operand.count);
    case Kind::constant:
      return constant_text(operand);
    case Kind::null:
      return "null";
    case Kind::scc:
      return "src_scc";
    case Kind::vccz:
      return "src_vccz";
    case Kind::execz:
      return "src_execz";
    default:
      return "off";
  }
}

string operand_text(const Chip& chip, Operand operand, bool abs = false, bool neg = false) {
  operand.abs |= abs;
  operand.neg |= neg;
  string text = plain_text(chip, operand);
  if (operand.high && chip.arch != Arch::cdna) text += ".h";
  if (operand.sext) text = "sext(" + text + ")";
  if (operand.abs) text = "|" + text + "|";
  if (operand.neg) text = "-" + text;
  return text;
}

// Operands behind the name.
class Line {
 public:
  Line(const Chip& chip, string name) : chip_(chip), text_(std::move(name)) {}
  Line& operand(const Operand& operand, bool abs = false, bool neg = false) {
    return operand.kind == Kind::none ? *this : word(operand_text(chip_, operand, abs, neg));
  }
  // "off" where there is none.
  Line& address(const Operand& operand) { return word(operand_text(chip_, operand)); }
  Line& word(const string& word) {
    text_ += (has_operands_ ? ", " : " ") + word;
    has_operands_ = true;
    return *this;
  }
  Line& modifier(const string& modifier) {
    text_ += " " + modifier;
    return *this;
  }
  Line& flag(bool is_set, const char* name) { return is_set ? modifier(name) : *this; }
  const string& text() const { return text_; }

 private:
  const Chip& chip_;
  string text_;
  bool has_operands_ = false;
};

// Modifiers

string bits_text(const char* name, uint32_t bits, int count, int width = 1) {
  string text = string(name) + ":[";
  for (int k = 0; k < count; ++k) {
    text += (k ? "," : "") + std::to_string(bits >> (k * width) & ((1u << width) - 1));
  }
  return text + "]";
}

string dpp_control_text(const Chip& chip, uint32_t control) {
  const string amount = std::to_string(control & 15);
  if (control < 0x100) return bits_text("quad_perm", control, 4, 2);
  switch (control >> 4) {
    case 0x10:
      return "row_shl:" + amount;
    case 0x11:
      return "row_shr:" + amount;
    case 0x12:
      return "row_ror:" + amount;
    case 0x15:
      return (chip.arch == Arch::cdna ? "row_newbcast:" : "row_share:") + amount;
    case 0x16:
      return "row_xmask:" + amount;
  }
  switch (control) {
    case 0x130:
      return "wave_shl:1";
    case 0x134:
      return "wave_rol:1";
    case 0x138:
      return "wave_shr:1";
    case 0x13c:
      return "wave_ror:1";
    case 0x140:
      return "row_mirror";
    case 0x141:
      return "row_half_mirror";
    case 0x142:
      return "row_bcast:15";
    case 0x143:
      return "row_bcast:31";
  }
  return "dpp_ctrl:" + hex(control);
}

void add_dpp(const Chip& chip, const Dpp& dpp, Line& line) {
  if (dpp.form == Dpp::Form::none) return;
  if (dpp.form == Dpp::Form::dpp8) {
    line.modifier(bits_text("dpp8", dpp.control, 8, 3));
  } else {
    line.modifier(dpp_control_text(chip, dpp.control));
    line.modifier("row_mask:" + hex(dpp.row_mask)).modifier("bank_mask:" + hex(dpp.bank_mask));
    line.flag(dpp.bound_ctrl, "bound_ctrl:1");
  }
  line.flag(dpp.fetch_inactive, "fi:1");
}

void add_sdwa(const Instruction& i, Line& line) {
  constexpr const char* PARTS[] = {"BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3",
                                   "WORD_0", "WORD_1", "DWORD"};
  constexpr const char* UNUSED[] = {"UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE", "?"};
  const auto part = [&](const char* name, Select select) {
    line.modifier(name + string(PARTS[static_cast<int>(select)]));
  };
  if (!i.name.starts_with("v_cmp")) {
    part("dst_sel:", i.dst_select);
    line.modifier("dst_unused:" + string(UNUSED[i.dst_unused & 3]));
  }
  part("src0_sel:", i.src0.select);
  if (i.src1.kind != Kind::none) part("src1_sel:", i.src1.select);
}

// Halves of 16-bit operands in VOP3; RDNA's are part of the register's name.
void add_halves(const Chip& chip, const Instruction& i, Line& line) {
  uint32_t bits = 0;
  int count = 0;
  for (const Operand* operand : {&i.src0, &i.src1, &i.src2, &i.dst}) {
    if (operand->kind == Kind::none) continue;
    const bool is_shown = chip.arch == Arch::cdna || operand->kind == Kind::sgpr;
    bits |= static_cast<uint32_t>(operand->high && is_shown) << count++;
  }
  if (i.name.starts_with("v_permlane")) bits = i.opsel;
  if (bits) line.modifier(bits_text("op_sel", bits, i.opsel ? 2 : count));
}

void add_vector_modifiers(const Chip& chip, const Instruction& i, Line& line) {
  constexpr const char* OMODS[] = {"", "mul:2", "mul:4", "div:2"};
  add_halves(chip, i, line);
  if (i.name.starts_with("v_bitop3_")) {
    line.modifier("bitop3:" + hex(static_cast<uint32_t>(i.simm)));
  }
  line.flag(i.clamp, "clamp").flag(i.omod, OMODS[i.omod & 3]);
  add_dpp(chip, i.dpp, line);
  if (i.is_sdwa) add_sdwa(i, line);
}

void add_packed_modifiers(const Instruction& i, Line& line) {
  if (contains(i.name, "accvgpr")) return;
  if (i.format == "VOP3P_MFMA") {
    if (i.cbsz) line.modifier("cbsz:" + std::to_string(i.cbsz));
    if (i.abid) line.modifier("abid:" + std::to_string(i.abid));
    if (i.blgp) line.modifier("blgp:" + std::to_string(i.blgp));
    return;
  }
  const int count = i.src2.kind == Kind::none ? 2 : 3;
  const bool is_mixed = contains(i.name, "_mix");
  const uint32_t all = (1u << count) - 1;
  const uint32_t default_hi = is_mixed ? 0 : all;
  if (i.opsel & all) line.modifier(bits_text("op_sel", i.opsel, count));
  if ((i.opsel_hi & all) != default_hi) line.modifier(bits_text("op_sel_hi", i.opsel_hi, count));
  if (i.neg_lo && !is_mixed) line.modifier(bits_text("neg_lo", i.neg_lo, count));
  if (i.neg_hi && !is_mixed) line.modifier(bits_text("neg_hi", i.neg_hi, count));
  line.flag(i.clamp, "clamp");
}

void add_cache_bits(const Chip& chip, const Instruction& i, Line& line) {
  const uint32_t bits = i.cache_bits;
  if (chip.arch == Arch::rdna4) {
    constexpr const char* SCOPES[] = {"", "scope:SCOPE_SE", "scope:SCOPE_DEV", "scope:SCOPE_SYS"};
    if (bits & 7) line.modifier("th:" + std::to_string(bits & 7));
    line.flag(bits >> 4, SCOPES[bits >> 4 & 3]);
    return;
  }
  const bool is_gfx940 = chip.name == "gfx942" || chip.name == "gfx950";
  line.flag(bits & 1, is_gfx940 ? "sc0" : "glc").flag(bits & 2, is_gfx940 ? "nt" : "slc");
  line.flag(bits & 4, is_gfx940 ? "sc1" : chip.arch == Arch::cdna ? "scc" : "dlc");
}

// Scalar instructions

// "vmcnt(0) lgkmcnt(1)": counters that are not at their maximum; all where all are.
string wait_text(const Chip& chip, uint32_t bits) {
  struct Part {
    const char* name;
    uint32_t count, most;
  };
  const bool is_cdna = chip.arch == Arch::cdna;
  const std::array<Part, 3> parts = {{
      {"vmcnt", is_cdna ? (bits & 15) | (bits >> 14 & 3) << 4 : bits >> 10 & 63, 63},
      {"expcnt", is_cdna ? bits >> 4 & 7 : bits & 7, 7},
      {"lgkmcnt", is_cdna ? bits >> 8 & 15 : bits >> 4 & 63, is_cdna ? 15u : 63u},
  }};
  const bool has_none = std::ranges::all_of(parts, [](auto& p) { return p.count == p.most; });
  string text;
  for (const Part& part : parts) {
    if (part.count == part.most && !has_none) continue;
    text += (text.empty() ? "" : " ") + string(part.name) + "(" + std::to_string(part.count) + ")";
  }
  return text;
}

string scalar_line(const Chip& chip, const Instruction& i) {
  Line line(chip, i.name);
  const bool has_register_last = i.name == "s_setreg_b32";
  if (!has_register_last) line.operand(i.dst);
  line.operand(i.src0).operand(i.src1);
  if (i.name.starts_with("s_fma") && !contains(i.name, "fmac")) line.operand(i.src2);
  const uint32_t bits = static_cast<uint16_t>(i.simm);
  if (i.name == "s_waitcnt") {
    line.word(wait_text(chip, bits));
  } else if (i.name == "s_branch" || i.name.starts_with("s_cbranch_")) {
    line.word(std::to_string(i.pc + 4 + 4 * static_cast<int64_t>(i.simm)));
  } else if (i.format.starts_with("SOPK") || (i.format == "SOPP" && i.name != "s_endpgm" &&
                                              i.name != "s_barrier" && i.name != "s_code_end")) {
    line.word(hex(bits));
  }
  if (i.name == "s_set_gpr_idx_on") line.word(hex(bits));
  if (has_register_last) line.operand(i.dst);
  if (i.name == "s_setreg_imm32_b32") line.word(hex(i.literal));
  return line.text();
}

string smem_line(const Chip& chip, const Instruction& i) {
  Line line(chip, i.name);
  line.operand(i.dst).operand(i.src1).operand(i.base);
  if (i.base.kind == Kind::none) return line.text();
  const string offset = hex(static_cast<uint32_t>(i.offset));
  if (i.soffset.kind == Kind::none) {
    line.word(offset);
  } else {
    line.operand(i.soffset);
    if (i.offset) line.modifier("offset:" + offset);
  }
  add_cache_bits(chip, i, line);
  return line.text();
}

// Vector arithmetic

string vector_name(const Instruction& i) {
  const bool is_short = i.format.starts_with("VOP1") || i.format.starts_with("VOP2") ||
                        i.format.starts_with("VOPC");
  if (contains(i.format, "DPP")) return i.name + "_dpp";
  if (contains(i.format, "SDWA")) return i.name + "_sdwa";
  return is_short ? i.name + "_e32" : i.name;
}

// The old destination of fmac is not written out, nor VCC in pairs.
bool shows_source2(const Instruction& i) {
  if (i.name == "v_dual_cndmask_b32") return false;
  for (const char* name : {"fmac_", "v_mac_", "dot2c_", "dot4c_", "dot8c_", "dot2acc_"}) {
    if (contains(i.name, name)) return false;
  }
  return true;
}

string vector_line(const Chip& chip, const Instruction& i, const string& name) {
  Line line(chip, name);
  const bool hides_mask = i.name.starts_with("v_cmpx_") && chip.arch != Arch::cdna;
  if (!hides_mask) line.operand(i.dst);
  if (!contains(i.name, "_swap_")) line.operand(i.dst1);
  // v_fma_mix has neg and abs where packed operations have neg of the two halves.
  const bool is_mixed = contains(i.name, "_mix");
  const uint32_t neg = is_mixed ? i.neg_lo : 0, abs = is_mixed ? i.neg_hi : 0;
  line.operand(i.src0, abs & 1, neg & 1).operand(i.src1, abs & 2, neg & 2);
  if (shows_source2(i)) line.operand(i.src2, abs & 4, neg & 4);
  if (i.format.starts_with("VOP3P")) {
    add_packed_modifiers(i, line);
    add_dpp(chip, i.dpp, line);
  } else {
    add_vector_modifiers(chip, i, line);
  }
  return line.text();
}

// Memory

string ds_line(const Chip& chip, const Instruction& i) {
  Line line(chip, i.name);
  line.operand(i.dst).operand(i.src0).operand(i.src1).operand(i.src2);
  const bool has_two = contains(i.name, "read2") || contains(i.name, "write2") ||
                       contains(i.name, "2addr") || contains(i.name, "xchg2");
  if (!has_two && i.offset) line.modifier("offset:" + std::to_string(i.offset));
  if (has_two && i.offset0) line.modifier("offset0:" + std::to_string(i.offset0));
  if (has_two && i.offset1) line.modifier("offset1:" + std::to_string(i.offset1));
  return line.text();
}

string flat_line(const Chip& chip, const Instruction& i) {
  Line line(chip, i.name);
  line.operand(i.dst).address(i.src0).operand(i.src1);
  if (!i.name.starts_with("flat_")) line.address(i.base);
  if (i.offset) line.modifier("offset:" + std::to_string(i.offset));
  add_cache_bits(chip, i, line);
  return line.text();
}

string buffer_line(const Chip& chip, const Instruction& i) {
  if (i.base.kind == Kind::none) return i.name;  // buffer_inv and its like
  Line line(chip, i.name);
  const Operand& data = i.src1.kind == Kind::none ? i.dst : i.src1;
  line.operand(data).address(i.src0).operand(i.base);
  line.word(i.soffset.kind == Kind::none ? "null" : operand_text(chip, i.soffset));
  line.flag(i.has_idxen, "idxen").flag(i.has_offen, "offen");
  if (i.offset) line.modifier("offset:" + std::to_string(i.offset));
  add_cache_bits(chip, i, line);
  return line.flag(i.to_lds, "lds").text();
}

}  // namespace

string text_of(const Chip& chip, const Instruction& i) {
  const string& format = i.format;
  if (i.second) {
    return vector_line(chip, i, i.name) + " :: " + vector_line(chip, *i.second, i.second->name);
  }
  if (format.starts_with("VOP")) return vector_line(chip, i, vector_name(i));
  if (format.starts_with("SOP")) return scalar_line(chip, i);
  if (format == "SMEM") return smem_line(chip, i);
  if (format == "DS") return ds_line(chip, i);
  if (format == "MUBUF" || format == "VBUFFER") return buffer_line(chip, i);
  return flat_line(chip, i);
}

}  // namespace isa
