// One decoded instruction of an AMD code object: what to do, on which operands, how modified.
//
// `decode` makes it from bytes, by tables that tables.py generates from AMD's machine-readable ISA
// (as tinygrad carries it). Formats differ between chips; here operands have one form.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace isa {

// The families of encodings: gfx9 (CDNA), gfx11 (RDNA3), gfx12 (RDNA4).
enum class Arch : uint8_t { cdna, rdna3, rdna4 };

struct Chip {
  std::string name;  // "gfx942"
  Arch arch;
};
Chip chip_of(const std::string& name);  // raises Fault for one that is not known

// What ends a launch: its text says which instruction, which lane, and why.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Wave;
struct Instruction;
using Handler = void (*)(Wave&, const Instruction&);

// Numbers of special scalar registers, the same for all chips (RDNA encodes M0 as 125, its NULL as
// 124; decoding translates).
constexpr int VCC = 106, TTMP = 108, M0 = 124, EXEC = 126, NUM_SGPRS = 128;
constexpr int AGPR = 256, NUM_VGPRS = 512;  // accumulation registers lie behind the others

enum class Kind : uint8_t {
  none,      // the instruction has no such operand ("off" and NULL addresses too)
  sgpr,      // [index, index + count)
  vgpr,      // the same
  constant,  // value
  null,      // reads 0, ignores what is written
  scc,
  vccz,
  execz,
};

// Parts of a 32-bit register, as SDWA selects them.
enum class Select : uint8_t { byte0, byte1, byte2, byte3, word0, word1, dword };

struct Operand {
  Kind kind = Kind::none;
  Select select = Select::dword;
  bool neg = false, abs = false;  // of floats; abs first. Not set in VOP3P (see neg_lo, neg_hi)
  bool sext = false;              // SDWA: extends the selected part by its sign
  bool high = false;              // a 16-bit operand is the upper half of its register
  uint8_t count = 1;              // of 32-bit registers
  uint16_t index = 0;
  // A constant in the form that the operand's type wants: f16 and bf16 in 16 bits, f64 in 64,
  // integers sign-extended to 64 bits. In packed operands a float constant fills the low half only.
  uint64_t value = 0;
  uint16_t code = 0;  // of a constant: integers 128 to 208, floats 240 to 248, a literal 255

  bool is_vector() const { return kind == Kind::vgpr; }
};

// Registers [index, index + count) that an instruction reads or writes.
struct Range {
  bool is_vector;
  uint16_t index;
  uint8_t count;
};

// How lanes of the first source are exchanged.
struct Dpp {
  enum class Form : uint8_t { none, dpp16, dpp8 } form = Form::none;
  uint32_t control = 0;  // dpp16: the 9 bits of dpp_ctrl; dpp8: eight times 3 bits
  uint8_t row_mask = 15, bank_mask = 15;
  bool bound_ctrl = false, fetch_inactive = false;
};

struct Instruction {
  std::string name;           // as AMD's documents name it, small, without _e32, _e64, _dpp, _sdwa
  std::string format;         // "VOP3", "DS", ...: the name of its encoding, with variant
  Handler handler = nullptr;  // never null after decoding: an unknown one raises Fault when it runs
  uint64_t pc = 0;            // address in the code object
  uint32_t size = 0;          // bytes
  std::vector<uint8_t> bytes;

  // Vector and scalar arithmetic: destinations and sources in the order of the documents. What is
  // implied is here as well: VCC as dst1 or src2 (carries, v_cndmask_b32_e32), the old destination
  // as src2 of fmac, the constant K of fmamk (src1) and fmaak (src2). v_cmp: dst is the mask
  // (VCC in VOPC; EXEC for v_cmpx on RDNA).
  // Memory: dst is where a load goes; src0 the vector address (none where "off"), src1 the data that
  // is stored, src2 the second datum of ds_write2; base is saddr, sbase, or the buffer resource.
  // SOPK: dst is sdst (also read where the operation says so), simm is the 16-bit constant.
  Operand dst, dst1, src0, src1, src2, base, soffset;

  bool clamp = false;
  uint8_t omod = 0;                      // 1: times 2, 2: times 4, 3: half
  // VOP3P, raw: bit k is of source k. v_permlane16: bit 0 reads inactive lanes, bit 1 is bound_ctrl.
  uint8_t opsel = 0, opsel_hi = 0;
  uint8_t neg_lo = 0, neg_hi = 0;        // VOP3P, raw
  uint8_t cbsz = 0, abid = 0, blgp = 0;  // MFMA
  Dpp dpp;
  bool is_sdwa = false;
  Select dst_select = Select::dword;
  uint8_t dst_unused = 0;  // SDWA: 0 zeros, 1 sign extension, 2 the old value around the selected part

  int32_t offset = 0;                 // of memory, sign-extended
  uint8_t offset0 = 0, offset1 = 0;   // DS, where offset is both as 16 bits
  bool has_offen = false, has_idxen = false;  // MUBUF: src0 holds an offset; an index
  bool to_lds = false;                // MUBUF with lds
  // Bits that change ordering or caching only (glc, sc0, nt, th, scope), kept for text.
  uint32_t cache_bits = 0;

  int32_t simm = 0;  // SOPP and SOPK: the 16 bits, sign-extended. v_bitop3: its truth table.
  uint32_t literal = 0;                 // s_setreg_imm32_b32
  int target = -1;                      // branches: index of the instruction, -1 if there is none
  std::shared_ptr<Instruction> second;  // VOPD: this is X, the other is Y; both read, then write

  std::vector<Range> reads, writes;  // all registers, those implied too (not EXEC)
};

// Decodes the instruction at the start of [bytes, bytes + size). Raises Fault where the bytes are
// none that the chip has.
Instruction decode(const Chip& chip, const uint8_t* bytes, size_t size, uint64_t pc);

// All of a kernel's code, with branch targets found.
std::vector<Instruction> decode_all(const Chip& chip, const uint8_t* bytes, size_t size,
                                    uint64_t pc);

// As an assembler would write it: "v_add_f32_e32 v1, s2, v3".
std::string text_of(const Chip& chip, const Instruction& instruction);

}  // namespace isa
