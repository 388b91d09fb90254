// Twins are called as IREE's own CPU device calls them (its executable_library.h, version 0.6, fixes
// the layouts below).
#include "twin.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <map>

#include "memory.h"
#include "record.h"

namespace fs = std::filesystem;

namespace {

constexpr uint32_t LIBRARY_VERSION = 6;
constexpr size_t LOCAL_MEMORY_PAGE = 4096;

struct Environment {
  const uint32_t* constants;
  void* import_thunk;
  void* import_functions;
  void* import_contexts;
  uint64_t processor[8];
};

struct DispatchState {
  uint32_t workgroup_size_x, workgroup_size_y;
  uint16_t workgroup_size_z, constant_count;
  uint32_t workgroup_count_x, workgroup_count_y;
  uint16_t workgroup_count_z;
  uint8_t max_concurrency, binding_count;
  const uint32_t* constants;
  void* const* bindings;
  const size_t* binding_lengths;
};

struct WorkgroupState {
  uint32_t id_x, id_y;
  uint16_t id_z, reserved;
  uint32_t processor_id;
  void* local_memory;
  uint32_t local_memory_size;
};

using Function = int (*)(const Environment*, const DispatchState*, const WorkgroupState*);

struct Attributes {
  uint64_t flags;
  uint16_t local_memory_pages;
  uint8_t constant_count, binding_count;
  uint32_t workgroup_size_x, workgroup_size_y;
  uint16_t workgroup_size_z, parameter_count;
  uint64_t reserved[5];
};
static_assert(sizeof(Attributes) == 64);

struct Library {
  const uint32_t* version;  // the first field of its header
  uint32_t import_count;
  const char* const* import_names;
  uint32_t export_count;
  const Function* functions;
  const Attributes* attributes;
  const void* parameters;
  const void* occupancy;
  const char* const* names;
};

using Query = const Library* (*)(uint32_t max_version, const Environment*);

constexpr Environment ENVIRONMENT{};

}  // namespace

struct Twin {
  Function function;
  const Attributes* attributes;
};

namespace {

using Twins = std::map<std::string, Twin, std::less<>>;

void add_library(const fs::path& path, Twins* twins) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) die(dlerror());
  const auto query = reinterpret_cast<Query>(dlsym(handle, "iree_hal_executable_library_query"));
  const Library* library = query ? query(LIBRARY_VERSION, &ENVIRONMENT) : nullptr;
  if (!library || library->import_count) die(path.string() + ": no library that can be called");
  for (uint32_t i = 0; i < library->export_count; ++i) {
    (*twins)[library->names[i]] = {library->functions[i], &library->attributes[i]};
  }
}

Twins load_twins(const char* folder) {
  Twins twins;
  if (!folder || !*folder) return twins;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".so") add_library(entry.path(), &twins);
  }
  return twins;
}

}  // namespace

const Twin* find_twin(const std::string& name) {
  static const auto& twins = *new Twins(load_twins(std::getenv("SF_HIP_TWINS")));
  const auto twin = twins.find(name);
  return twin == twins.end() ? nullptr : &twin->second;
}

bool fits(const Twin& twin, size_t argument_bytes) {
  const Attributes& needs = *twin.attributes;
  return 8u * needs.binding_count + 4u * needs.constant_count <= argument_bytes;
}

TwinArguments read_arguments(const Twin& twin, void** parameters) {
  TwinArguments arguments;
  for (int i = 0; i < twin.attributes->binding_count; ++i) {
    arguments.bindings.push_back(*static_cast<void**>(*parameters++));
  }
  for (int i = 0; i < twin.attributes->constant_count; ++i) {
    arguments.constants.push_back(*static_cast<uint32_t*>(*parameters++));
  }
  return arguments;
}

hipError_t run_twin(const Twin& twin, Device& device, const TwinArguments& arguments) {
  std::vector<void*> bindings;
  std::vector<size_t> lengths;
  for (void* binding : arguments.bindings) {
    bindings.push_back(binding ? reach(device, binding, 1) : nullptr);
    if (binding && !bindings.back()) return hipErrorIllegalAddress;
    lengths.push_back(binding ? look_up(binding).size : 0);
  }
  std::vector<char> local_memory(twin.attributes->local_memory_pages * LOCAL_MEMORY_PAGE);
  const DispatchState dispatch{
      .workgroup_size_x = 1,
      .workgroup_size_y = 1,
      .workgroup_size_z = 1,
      .constant_count = twin.attributes->constant_count,
      .workgroup_count_x = 1,
      .workgroup_count_y = 1,
      .workgroup_count_z = 1,
      .max_concurrency = 1,
      .binding_count = twin.attributes->binding_count,
      .constants = arguments.constants.data(),
      .bindings = bindings.data(),
      .binding_lengths = lengths.data(),
  };
  WorkgroupState workgroup{};
  workgroup.local_memory = local_memory.data();
  workgroup.local_memory_size = static_cast<uint32_t>(local_memory.size());
  return twin.function(&ENVIRONMENT, &dispatch, &workgroup) ? hipErrorLaunchFailure : hipSuccess;
}
