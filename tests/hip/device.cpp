// Chips, devices, and the device that a thread works with.
#include "device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#include "record.h"

namespace {

constexpr size_t GiB = size_t{1} << 30;
constexpr int MiB = 1 << 20, KiB = 1 << 10;

constexpr Chip CHIPS[] = {
    {"gfx908", "gfx908:sramecc+:xnack-", "AMD Instinct MI100", 0x30, 64, 120, 1502, 1200, 4096,
     8 * MiB, 64 * KiB, 32 * GiB, true},
    {"gfx90a", "gfx90a:sramecc+:xnack-", "AMD Instinct MI210", 0x3f, 64, 104, 1700, 1600, 4096,
     8 * MiB, 64 * KiB, 64 * GiB, true},
    {"gfx942", "gfx942:sramecc+:xnack-", "AMD Instinct MI300X", 0x4c, 64, 304, 2100, 1300, 8192,
     4 * MiB, 64 * KiB, 192 * GiB, true},
    {"gfx950", "gfx950:sramecc+:xnack-", "AMD Instinct MI350X", 0x4f, 64, 256, 2200, 2000, 8192,
     4 * MiB, 160 * KiB, 288 * GiB, true},
    {"gfx1030", "gfx1030", "AMD Radeon RX 6900 XT", 0x36, 32, 40, 2660, 1000, 256, 4 * MiB,
     64 * KiB, 16 * GiB, false},
    {"gfx1100", "gfx1100", "AMD Radeon RX 7900 XTX", 0x41, 32, 48, 2482, 1249, 384, 6 * MiB,
     64 * KiB, 24 * GiB, false},
    {"gfx1101", "gfx1101", "AMD Radeon RX 7800 XT", 0x46, 32, 30, 2430, 1218, 256, 4 * MiB,
     64 * KiB, 16 * GiB, false},
    {"gfx1200", "gfx1200", "AMD Radeon RX 9060 XT", 0x48, 32, 16, 3130, 1258, 128, 4 * MiB,
     64 * KiB, 16 * GiB, false},
    {"gfx1201", "gfx1201", "AMD Radeon RX 9070 XT", 0x4e, 32, 32, 2970, 1258, 256, 8 * MiB,
     64 * KiB, 16 * GiB, false},
};

// "192GiB", "512MiB", or bytes.
size_t parse_size(const std::string& text) {
  char* end = nullptr;
  const size_t number = std::strtoull(text.c_str(), &end, 10);
  const std::string unit = end;
  if (number && unit.empty()) return number;
  if (number && unit == "MiB") return number * MiB;
  if (number && unit == "GiB") return number * GiB;
  die("SF_HIP_DEVICES: \"" + text + "\" is no size; use GiB, MiB or bytes");
}

Device* parse_device(int index, const std::string& text) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const auto* chip = std::find_if(std::begin(CHIPS), std::end(CHIPS),
                                  [&](const Chip& chip) { return name == chip.name; });
  if (chip == std::end(CHIPS)) die("SF_HIP_DEVICES: \"" + name + "\" is no chip");
  const size_t bytes =
      colon == std::string::npos ? chip->memory_bytes : parse_size(text.substr(colon + 1));
  auto* device = new Device{.index = index, .chip = *chip, .memory_bytes = bytes, .uuid = {}};
  char digits[17];  // as AMD's are: sixteen hexadecimal digits
  std::snprintf(digits, sizeof digits, "%08x%08x", chip->machine, 0x5f00 + index);
  std::memcpy(device->uuid.bytes, digits, sizeof device->uuid.bytes);
  return device;
}

std::vector<Device*> parse_devices(const char* text) {
  std::vector<Device*> devices;
  std::istringstream stream(text ? text : "gfx1100");
  for (std::string part; std::getline(stream, part, ',');) {
    devices.push_back(parse_device(static_cast<int>(devices.size()), part));
  }
  return devices;
}

thread_local std::vector<Device*> contexts;

template <class Properties>
void fill_any(const Device& device, Properties* p) {
  const Chip& chip = device.chip;
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "%s", chip.product);
  std::snprintf(p->gcnArchName, sizeof p->gcnArchName, "%s", chip.arch);
  p->totalGlobalMem = device.memory_bytes;
  p->totalConstMem = 2147483647;
  p->sharedMemPerBlock = chip.lds_bytes;
  p->regsPerBlock = 65536;
  p->warpSize = chip.warp_size;
  p->maxThreadsPerBlock = 1024;
  std::fill_n(p->maxThreadsDim, 3, 1024);
  p->maxGridSize[0] = 2147483647;
  std::fill_n(p->maxGridSize + 1, 2, 65536);
  p->clockRate = 1000 * chip.clock_mhz;
  p->memoryClockRate = 1000 * chip.memory_clock_mhz;
  p->memoryBusWidth = chip.memory_bus_bits;
  p->major = chip.major();
  p->minor = chip.minor();
  p->multiProcessorCount = chip.num_processors;
  p->l2CacheSize = chip.l2_bytes;
}

}  // namespace

// gfx1100 is 11.0 and gfx90a is 9.0: the last digit is the stepping.
int Chip::major() const { return std::atoi(std::string(name + 3, std::strlen(name) - 5).c_str()); }
int Chip::minor() const { return name[std::strlen(name) - 2] - '0'; }

bool Device::can_reach(const Device& other) {
  const std::lock_guard lock(mutex);
  return &other == this || peers.count(other.index);
}

const std::vector<Device*>& devices() {
  static const auto& all = *new std::vector(parse_devices(std::getenv("SF_HIP_DEVICES")));
  return all;
}

Device& current_device() {
  if (devices().empty()) die("there is no device");
  return contexts.empty() ? *devices().front() : *contexts.back();
}

void set_current_device(Device& device) {
  if (contexts.empty()) contexts.push_back(nullptr);
  contexts.back() = &device;
}

void push_context(Device* device) { contexts.push_back(device); }

Device* pop_context() {
  if (contexts.empty()) return nullptr;
  Device* device = contexts.back();
  contexts.pop_back();
  return device;
}

void fill(const Device& device, hipDeviceProp_tR0600* properties) {
  fill_any(device, properties);
  properties->uuid = device.uuid;
}

void fill(const Device& device, hipDeviceProp_tR0000* properties) { fill_any(device, properties); }

std::optional<int> attribute(const Device& device, hipDeviceAttribute_t which) {
  hipDeviceProp_tR0600 p;
  fill(device, &p);
  switch (which) {
    case hipDeviceAttributeClockRate:
      return p.clockRate;
    case hipDeviceAttributeConcurrentManagedAccess:
    case hipDeviceAttributeManagedMemory:
      return device.chip.has_managed_memory;
    case hipDeviceAttributeIntegrated:
      return 0;
    case hipDeviceAttributeL2CacheSize:
      return p.l2CacheSize;
    case hipDeviceAttributeComputeCapabilityMajor:
      return p.major;
    case hipDeviceAttributeComputeCapabilityMinor:
      return p.minor;
    case hipDeviceAttributeMaxBlockDimX:
    case hipDeviceAttributeMaxBlockDimY:
    case hipDeviceAttributeMaxBlockDimZ:
      return p.maxThreadsDim[which - hipDeviceAttributeMaxBlockDimX];
    case hipDeviceAttributeMaxGridDimX:
    case hipDeviceAttributeMaxGridDimY:
    case hipDeviceAttributeMaxGridDimZ:
      return p.maxGridSize[which - hipDeviceAttributeMaxGridDimX];
    case hipDeviceAttributeMaxThreadsPerBlock:
      return p.maxThreadsPerBlock;
    case hipDeviceAttributeMemoryBusWidth:
      return p.memoryBusWidth;
    case hipDeviceAttributeMemoryClockRate:
      return p.memoryClockRate;
    case hipDeviceAttributeMultiprocessorCount:
      return p.multiProcessorCount;
    case hipDeviceAttributeMaxSharedMemoryPerBlock:
      return static_cast<int>(p.sharedMemPerBlock);
    case hipDeviceAttributeWarpSize:
      return p.warpSize;
    case hipDeviceAttributeMemoryPoolsSupported:
      return 1;
  }
  return std::nullopt;
}
