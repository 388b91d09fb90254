// Devices as SF_HIP_DEVICES lists them ("gfx942:192GiB,gfx1100"), and what their chips are like.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "hip.h"

struct Chip {
  const char* name;         // of its code objects
  const char* arch;         // with target features, as gcnArchName has them
  const char* product;
  unsigned machine;         // EF_AMDGPU_MACH of its code objects
  int warp_size;
  int num_processors;       // compute units, on gfx10 and later work group processors
  int clock_mhz, memory_clock_mhz, memory_bus_bits;
  int l2_bytes, lds_bytes;
  size_t memory_bytes;
  bool has_managed_memory;

  int major() const;
  int minor() const;
};

struct Device {
  int index;
  const Chip& chip;
  size_t memory_bytes;
  hipUUID uuid;

  std::atomic<size_t> used_bytes = 0;
  // What went wrong while queued work ran. As on a real device it stays, and no work runs any more.
  std::atomic<hipError_t> failure = hipSuccess;

  std::mutex mutex{};  // of what follows
  std::set<int> peers{};
  std::set<Stream*> streams{};
  Stream* default_stream = nullptr;

  bool can_reach(const Device& other);
};

const std::vector<Device*>& devices();
Device& current_device();
void set_current_device(Device& device);
void push_context(Device* device);
Device* pop_context();

void fill(const Device& device, hipDeviceProp_tR0600* properties);
void fill(const Device& device, hipDeviceProp_tR0000* properties);
std::optional<int> attribute(const Device& device, hipDeviceAttribute_t which);
