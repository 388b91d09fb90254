// Kernels: what a code object says of them, and the CPU twins that run in their place.
//
// A twin is the same dispatch, compiled for llvm-cpu without distribution, so that one workgroup
// does all of it. The folder SF_HIP_TWINS holds the libraries that iree-compile dumped.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "hip.h"

struct Twin;

// Arguments as they were at the launch: pointers, then 32-bit constants.
struct Arguments {
  std::vector<void*> bindings;
  std::vector<uint32_t> constants;
};

struct Kernel {
  std::string name;
  int lds_bytes = 0;
  size_t argument_bytes = 0;
  const Twin* twin = nullptr;  // set when somebody asks for the kernel

  Arguments read(void** parameters) const;
  hipError_t run(Device& device, const Arguments& arguments) const;
};

struct Module {
  std::map<std::string, Kernel> kernels;

  hipError_t find(const std::string& name, const Kernel** kernel);
};

hipError_t load(const Device& device, const void* image, Module** module);
