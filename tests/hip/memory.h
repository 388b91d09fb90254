// Memory: a device address is never readable. What it stands for lies elsewhere in host memory, and
// only this driver knows where. New device memory holds NaN; freed device memory is no memory.
#pragma once

#include "device.h"
#include "hip.h"

enum class Place {
  device,
  host,      // allocated or registered by the driver: a device reaches it at its own address
  pageable,  // other host memory: copies may touch it, kernels may not
  nowhere,   // a device address without memory
};

// Where an address leads, and how many bytes there are from there on.
struct View {
  Place place;
  char* data;
  size_t size;
  Device* device;
  const void* address;
};

hipError_t allocate(Device& device, size_t size, void** pointer);
hipError_t allocate_host(Device* counted_on, size_t size, void** pointer);
hipError_t release(void* pointer);
hipError_t register_host(void* pointer, size_t size);
hipError_t unregister_host(void* pointer);

View look_up(const void* pointer);
View allocation_of(const void* pointer);  // the same from its allocation's beginning on
// What a device reads or writes at an address; nullptr if it cannot.
char* reach(Device& device, const void* pointer, size_t size);
