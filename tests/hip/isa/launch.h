// Running a kernel: all workgroups of a grid, on as many threads as there are processors.
#pragma once

#include "code_object.h"
#include "wave.h"

namespace isa {

// A kernel's code, decoded once.
struct Program {
  Kernel kernel;
  Chip chip;
  std::vector<Instruction> code;
  size_t entry = 0, preloaded_entry = 0;  // indices of instructions
  bool has_preload = false;
};

Program load_program(const Kernel& kernel, const Chip& chip);

struct Grid {
  uint32_t grid[3];   // workgroups
  uint32_t block[3];  // threads of one
};

// The bytes that a kernel finds its arguments in: explicit ones come from `parameters`, in order, as
// hipModuleLaunchKernel gives them; hidden ones are the grid's numbers.
std::vector<uint8_t> argument_segment(const Kernel& kernel, void* const* parameters,
                                      const Grid& grid);

// Raises Fault, with the text of what went wrong first. Returns how many instructions waves ran.
uint64_t run(const Program& program, const Grid& grid, const std::vector<uint8_t>& arguments,
             std::vector<Region> regions, const Settings& settings);

// A wave as it is before its first instruction: everything but what the ABI puts there is poison.
void reset(Wave& wave, const Program& program, Workgroup& group, int id);

}  // namespace isa
