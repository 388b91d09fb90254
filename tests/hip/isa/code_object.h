// Kernels as a code object (an ELF file for AMD's ABI, code object version 5) holds them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "instruction.h"

namespace isa {

// An argument of a kernel: "global_buffer" and "by_value" are given at a launch, those that begin
// with "hidden_" are the launch's own numbers.
struct Argument {
  size_t offset, size;
  std::string kind;
};

struct Kernel {
  std::string name;
  // From its descriptor.
  uint32_t lds_bytes = 0;
  uint32_t scratch_bytes = 0;  // a thread
  uint32_t argument_bytes = 0;
  uint32_t rsrc1 = 0, rsrc2 = 0, rsrc3 = 0;
  uint16_t properties = 0;
  uint16_t preload = 0;  // [6:0] how many dwords of arguments, [15:7] from which one on
  // From its metadata.
  std::vector<Argument> arguments;
  // Its code, where it starts, and where it starts with arguments in registers.
  const uint8_t* code = nullptr;
  size_t code_bytes = 0;
  uint64_t address = 0;
};

// Of an ELF image whose length its headers tell. Pointers lead into the image.
std::map<std::string, Kernel> read_code_object(const uint8_t* image);

}  // namespace isa
