// All memory that the driver knows, by address.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <utility>

namespace {

struct Allocation {
  char* data;
  size_t size;
  Place place;
  Device* device;  // whose memory it takes up, if any
  bool is_ours;    // and not registered
};

constexpr size_t SPACE = size_t{1} << 40;  // of addresses, of a device
const size_t PAGE = static_cast<size_t>(sysconf(_SC_PAGESIZE));

std::mutex mutex;
auto& allocations = *new std::map<char*, Allocation>;  // by the address that is given out

// Addresses of a device: given out once, so that freed memory is found out.
struct Space {
  char* begin = static_cast<char*>(
      mmap(nullptr, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  char* next = begin;

  char* take(size_t size) { return std::exchange(next, next + size); }
  bool contains(const char* p) const { return begin <= p && p < begin + SPACE; }
};

auto& spaces = *new std::map<int, Space>;  // by device

size_t rounded(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

bool take_room(Device& device, size_t size) {
  if (size > device.memory_bytes - device.used_bytes) return false;
  device.used_bytes += size;
  return true;
}

// Memory with a page behind it that faults; nullptr if the machine has none left.
char* map_guarded(size_t size) {
  void* data =
      mmap(nullptr, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  mprotect(static_cast<char*>(data) + size, PAGE, PROT_NONE);
  return static_cast<char*>(data);
}

hipError_t allocate_any(Device* device, size_t size, Place place, void** pointer) {
  if (!pointer) return hipErrorInvalidValue;
  *pointer = nullptr;
  if (!size) return hipSuccess;
  const std::lock_guard lock(mutex);
  if (device && !take_room(*device, rounded(size))) return hipErrorOutOfMemory;
  char* data = map_guarded(rounded(size));
  if (!data) {
    if (device) device->used_bytes -= rounded(size);
    return hipErrorOutOfMemory;
  }
  char* address = data;
  if (place == Place::device) {
    std::memset(data, 0xff, rounded(size));  // NaN in every float type, -1 as a number
    address = spaces[device->index].take(rounded(size) + PAGE);
  }
  allocations[address] = {data, size, place, device, true};
  *pointer = address;
  return hipSuccess;
}

// The allocation that an address lies in.
auto find(char* p) {
  auto it = allocations.upper_bound(p);
  if (it == allocations.begin()) return allocations.end();
  --it;
  return static_cast<size_t>(p - it->first) < it->second.size ? it : allocations.end();
}

bool is_device_address(const char* p) {
  for (const auto& [index, space] : spaces) {
    if (space.contains(p)) return true;
  }
  return false;
}

}  // namespace

hipError_t allocate(Device& device, size_t size, void** pointer) {
  return allocate_any(&device, size, Place::device, pointer);
}

hipError_t allocate_host(Device* counted_on, size_t size, void** pointer) {
  return allocate_any(counted_on, size, Place::host, pointer);
}

hipError_t release(void* pointer) {
  const std::lock_guard lock(mutex);
  const auto it = allocations.find(static_cast<char*>(pointer));
  if (it == allocations.end() || !it->second.is_ours) return hipErrorInvalidValue;
  const Allocation& allocation = it->second;
  if (allocation.device) allocation.device->used_bytes -= rounded(allocation.size);
  munmap(allocation.data, rounded(allocation.size) + PAGE);
  allocations.erase(it);
  return hipSuccess;
}

hipError_t register_host(void* pointer, size_t size) {
  if (!pointer || !size) return hipErrorInvalidValue;
  const std::lock_guard lock(mutex);
  auto* data = static_cast<char*>(pointer);
  const bool is_new = allocations.try_emplace(data, data, size, Place::host, nullptr, false).second;
  return is_new ? hipSuccess : hipErrorHostMemoryAlreadyRegistered;
}

hipError_t unregister_host(void* pointer) {
  const std::lock_guard lock(mutex);
  const auto it = allocations.find(static_cast<char*>(pointer));
  if (it == allocations.end() || it->second.is_ours) return hipErrorHostMemoryNotRegistered;
  allocations.erase(it);
  return hipSuccess;
}

View look_up(const void* pointer) {
  auto* p = const_cast<char*>(static_cast<const char*>(pointer));
  const std::lock_guard lock(mutex);
  if (const auto it = find(p); it != allocations.end()) {
    const auto& [address, found] = *it;
    const size_t offset = p - address;
    return {found.place, found.data + offset, found.size - offset, found.device, p};
  }
  if (is_device_address(p)) return {Place::nowhere, nullptr, 0, nullptr, p};
  return {Place::pageable, p, SIZE_MAX, nullptr, p};
}

View allocation_of(const void* pointer) {
  auto* p = const_cast<char*>(static_cast<const char*>(pointer));
  const std::lock_guard lock(mutex);
  const auto it = find(p);
  if (it == allocations.end()) return {Place::nowhere, nullptr, 0, nullptr, p};
  const auto& [address, found] = *it;
  return {found.place, found.data, found.size, found.device, address};
}

char* reach(Device& device, const void* pointer, size_t size) {
  const View view = look_up(pointer);
  if (view.size < size || view.place == Place::pageable) return nullptr;
  if (view.place == Place::device && !device.can_reach(*view.device)) return nullptr;
  return view.data;
}
