// Code objects, and what a launch of one of their kernels runs.
#include "kernel.h"

#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "compare.h"
#include "memory.h"
#include "record.h"

namespace {

enum class Runs { twin, machine, both };

std::string setting(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

const Runs RUNS = [] {
  const std::string text = setting("SF_HIP_RUN");
  if (text == "machine") return Runs::machine;
  if (text == "both") return Runs::both;
  if (!text.empty() && text != "twin") die("SF_HIP_RUN is twin, machine or both");
  return Runs::twin;
}();

// SF_HIP_MACHINE: words between spaces, such as "backward" or "ignore_barriers".
isa::Settings parse_settings(const std::string& text) {
  isa::Settings settings;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    const std::string word = text.substr(at, end - at);
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "forward") settings.order = isa::Order::forward;
    else if (name == "backward") settings.order = isa::Order::backward;
    else if (name == "random") settings.order = isa::Order::random;
    else if (name == "seed") settings.seed = static_cast<uint32_t>(std::stoul(value));
    else if (name == "no_preload") settings.preloads = false;
    else if (name == "keep_denormals") settings.flushes_in_matrices = false;
    else if (name == "no_race_check") settings.check_races = false;
    else if (name == "no_wait_check") settings.check_waits = false;
    else if (name == "ignore_barriers") settings.sabotage.ignore_barriers = true;
    else if (name == "ignore_waits") settings.sabotage.ignore_waits = true;
    else if (name == "swap_lanes") settings.sabotage.swap_lanes = std::stoi(value);
    else if (name == "swap_operands") settings.sabotage.swap_operands_of = value;
    else die("SF_HIP_MACHINE: \"" + word + "\" is not known");
    at = end + 1;
  }
  return settings;
}

const isa::Settings SETTINGS = parse_settings(setting("SF_HIP_MACHINE"));

size_t image_size(const uint8_t* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  size_t end = header.e_shoff + size_t{header.e_shnum} * sizeof(Elf64_Shdr);
  for (int k = 0; k < header.e_shnum; ++k) {
    Elf64_Shdr section;
    std::memcpy(&section, image + header.e_shoff + k * sizeof section, sizeof section);
    if (section.sh_type != SHT_NOBITS) end = std::max(end, section.sh_offset + section.sh_size);
  }
  return end;
}

}  // namespace

Call Kernel::read(void** parameters, const isa::Grid& grid) const {
  Call call{.grid = grid, .twin = {}, .bytes = {}, .bindings = {}};
  if (twin) call.twin = read_arguments(*twin, parameters);
  if (RUNS == Runs::twin) return call;
  call.bytes = isa::argument_segment(code, parameters, grid);
  for (const isa::Argument& argument : code.arguments) {
    if (argument.kind != "global_buffer") continue;
    void* pointer;
    std::memcpy(&pointer, call.bytes.data() + argument.offset, sizeof pointer);
    if (pointer) call.bindings.push_back(pointer);
  }
  return call;
}

hipError_t Kernel::run(Device& device, const Call& call) const {
  if (RUNS == Runs::twin) return run_twin(*twin, device, call.twin);
  if (RUNS == Runs::machine) return run_machine_code(device, call);
  Comparison comparison(call.bindings);
  const hipError_t failure = run_twin(*twin, device, call.twin);
  if (failure != hipSuccess) return failure;
  comparison.keep_and_restore();
  const hipError_t result = run_machine_code(device, call);
  if (result == hipSuccess) comparison.record(name);
  return result;
}

hipError_t Kernel::run_machine_code(Device& device, const Call& call) const {
  std::vector<isa::Region> regions;
  for (void* binding : call.bindings) {
    const View view = allocation_of(binding);
    if (!reach(device, view.address, 1)) return hipErrorIllegalAddress;
    const auto begin = reinterpret_cast<uint64_t>(view.address);
    const bool is_new = std::none_of(regions.begin(), regions.end(),
                                     [&](const isa::Region& r) { return r.begin == begin; });
    if (is_new) regions.push_back({begin, view.size, view.data});
  }
  try {
    const double started_at = seconds_now();
    const uint64_t steps = isa::run(program(), call.grid, call.bytes, regions, SETTINGS);
    write_log("interpret", {{"name", name.c_str()}, {"steps", steps},
                            {"microseconds", 1e6 * (seconds_now() - started_at)}},
              hipSuccess, started_at);
    return hipSuccess;
  } catch (const isa::Fault& fault) {
    std::fprintf(stderr, "stand-in for libamdhip64: %s: %s\n", name.c_str(), fault.what());
    return hipErrorLaunchFailure;
  }
}

const isa::Program& Kernel::program() const {
  std::call_once(is_decoded_, [this] {
    program_ = std::make_unique<isa::Program>(isa::load_program(code, chip));
  });
  return *program_;
}

hipError_t Module::find(const std::string& name, const Kernel** kernel) {
  const auto it = kernels.find(name);
  if (it == kernels.end()) return hipErrorNotFound;
  Kernel& found = it->second;
  found.twin = RUNS == Runs::machine ? nullptr : find_twin(name);
  if (!found.twin && RUNS != Runs::machine) {
    std::fprintf(stderr, "stand-in for libamdhip64: SF_HIP_TWINS has no %s\n", name.c_str());
    return hipErrorNotFound;
  }
  if (found.twin && !fits(*found.twin, found.code.argument_bytes)) {
    std::fprintf(stderr, "stand-in for libamdhip64: %s and its twin differ\n", name.c_str());
    return hipErrorInvalidDeviceFunction;
  }
  *kernel = &found;
  return hipSuccess;
}

hipError_t load(const Device& device, const void* image, Module** module) {
  if (!image || !module) return hipErrorInvalidValue;
  const auto* bytes = static_cast<const uint8_t*>(image);
  Elf64_Ehdr header;
  std::memcpy(&header, bytes, sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_machine != EM_AMDGPU) {
    return hipErrorInvalidImage;
  }
  if ((header.e_flags & 0xff) != device.chip.machine) return hipErrorNoBinaryForGpu;
  auto loaded = std::make_unique<Module>();
  loaded->image.assign(bytes, bytes + image_size(bytes));
  for (const auto& [name, code] : isa::read_code_object(loaded->image.data())) {
    Kernel& kernel = loaded->kernels[name];
    kernel.name = name;
    kernel.code = code;
    kernel.chip.name = device.chip.name;
    if (RUNS != Runs::twin) kernel.chip = isa::chip_of(device.chip.name);
  }
  *module = loaded.release();
  return hipSuccess;
}
