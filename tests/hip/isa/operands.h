// Reading and writing operands, modifiers included: of scalars, and of all lanes at once.
//
// Sources of all lanes come as pointers to 64 values. A plain register is not copied; the rest is
// put into a buffer. Results are written where EXEC (and DPP's masks) allow.
#pragma once

#include <algorithm>

#include "floats.h"
#include "wave.h"

namespace isa {

[[noreturn]] void fail(const std::string& why);  // raises Fault; `execute` adds the instruction

// Scalars

uint32_t read_scalar(const Wave& wave, const Operand& operand, int part = 0);
uint64_t read_scalar64(const Wave& wave, const Operand& operand);
void write_scalar(Wave& wave, const Operand& operand, uint32_t value, int part = 0);
void write_scalar64(Wave& wave, const Operand& operand, uint64_t value);
// As a mask of lanes: 32 bits in wave32, 64 in wave64.
uint64_t read_mask(const Wave& wave, const Operand& operand);
void write_mask(Wave& wave, const Operand& operand, uint64_t mask);

// All lanes

// 32 bits of each lane: register `part` of the operand. `source` is its number (0 is DPP's).
const uint32_t* read_bits(const Wave& wave, const Instruction& instruction, const Operand& operand,
                          int source, Lanes& buffer, int part = 0);
// With neg, abs and, where the mode asks for it, without denormals.
const uint32_t* read_f32(const Wave& wave, const Instruction& instruction, const Operand& operand,
                         int source, Lanes& buffer);
// 16 bits of each lane, in the low half of 32; `is_float` says what neg, abs and modes mean.
void read_16(const Wave& wave, const Instruction& instruction, const Operand& operand, int source,
             bool is_float, Lanes& values);
void read_64(const Wave& wave, const Instruction& instruction, const Operand& operand, int source,
             uint64_t* values);

// Lanes that the instruction writes.
uint64_t written_lanes(const Wave& wave, const Instruction& instruction);
void write_bits(Wave& wave, const Instruction& instruction, const Operand& operand,
                const uint32_t* values, int part = 0);
// Rounded results: omod, clamp, denormals.
void write_f32(Wave& wave, const Instruction& instruction, Lanes& values);
// 16 bits, into the half that the operand names. gfx9 clears the upper half, others keep it.
void write_16(Wave& wave, const Instruction& instruction, const uint32_t* values);
void write_64(Wave& wave, const Instruction& instruction, const uint64_t* values);

// Raises Fault where modifiers are set that an instruction of integers does not have.
void expect_no_float_modifiers(const Instruction& instruction);

}  // namespace isa
