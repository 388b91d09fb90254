// Kernels of loaded code objects. A launch runs the kernel's CPU twin, or its machine code in the
// interpreter, or both, as SF_HIP_RUN says: "twin" (the default), "machine" or "both".
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device.h"
#include "hip.h"
#include "isa/launch.h"
#include "twin.h"

// What a launch needs, read while its caller waits.
struct Call {
  isa::Grid grid;
  TwinArguments twin;
  std::vector<uint8_t> bytes;    // of arguments, as the kernel finds them
  std::vector<void*> bindings;   // the pointers among them
};

struct Kernel {
  std::string name;
  isa::Kernel code;
  isa::Chip chip;
  const Twin* twin = nullptr;  // set when somebody asks for the kernel

  int lds_bytes() const { return static_cast<int>(code.lds_bytes); }
  Call read(void** parameters, const isa::Grid& grid) const;
  hipError_t run(Device& device, const Call& call) const;

 private:
  hipError_t run_machine_code(Device& device, const Call& call) const;
  const isa::Program& program() const;  // decoded at the first launch

  mutable std::once_flag is_decoded_;
  mutable std::unique_ptr<isa::Program> program_;
};

struct Module {
  std::vector<uint8_t> image;
  std::map<std::string, Kernel> kernels;

  hipError_t find(const std::string& name, const Kernel** kernel);
};

hipError_t load(const Device& device, const void* image, Module** module);
