// CPU twins of kernels: the same dispatch, compiled for llvm-cpu without distribution, so that one
// workgroup does all of it. The folder SF_HIP_TWINS holds the libraries that iree-compile dumped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device.h"
#include "hip.h"

// Arguments as they were at the launch: pointers, then 32-bit constants.
struct TwinArguments {
  std::vector<void*> bindings;
  std::vector<uint32_t> constants;
};

struct Twin;

const Twin* find_twin(const std::string& name);  // nullptr where the folder has none

// Whether a kernel's arguments have room for the twin's.
bool fits(const Twin& twin, size_t argument_bytes);
TwinArguments read_arguments(const Twin& twin, void** parameters);
hipError_t run_twin(const Twin& twin, Device& device, const TwinArguments& arguments);
