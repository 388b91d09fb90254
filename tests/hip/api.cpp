// libamdhip64.so without a GPU: the functions that IREE's HIP driver loads, and a few more, which
// tests set it up with (sf_hip_*). Host memory stands in for the devices', CPU code for kernels.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "device.h"
#include "hip.h"
#include "kernel.h"
#include "memory.h"
#include "record.h"
#include "stream.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int VERSION = 60443484;  // ROCm 6.4
constexpr unsigned MAX_BLOCK = 1024;

struct Pool {};  // nothing is ever allocated from it

int version() {
  const char* text = std::getenv("SF_HIP_VERSION");
  return text ? std::atoi(text) : VERSION;
}

template <class Value>
hipError_t give(Value* to, Value value) {
  if (!to) return hipErrorInvalidValue;
  *to = value;
  return hipSuccess;
}

template <class Body>
hipError_t with_device(int index, Body body) {
  if (index < 0 || index >= static_cast<int>(devices().size())) return hipErrorInvalidDevice;
  return body(*devices()[index]);
}

// The body, unless queued work made the device fail: that is what every later call reports.
template <class Body>
hipError_t unless_failed(Device& device, Body body) {
  return device.failure != hipSuccess ? device.failure.load() : body();
}

Stream& stream_of(hipStream_t handle) {
  return handle ? *handle : default_stream(current_device());
}

hipError_t wait_for(Stream& stream) {
  stream.mark().wait();
  return stream.device().failure;
}

const char* place_of(const void* pointer) {
  static constexpr const char* NAMES[] = {"device", "host", "pageable", "nowhere"};
  return NAMES[static_cast<int>(look_up(pointer).place)];
}

char* reach_for_copy(const void* pointer, size_t size) {
  const View view = look_up(pointer);
  return view.size < size ? nullptr : view.data;
}

hipError_t copy(Stream& stream, void* to, const void* from, size_t size) {
  if (!size) return hipSuccess;
  if (!reach_for_copy(to, size) || !reach_for_copy(from, size)) return hipErrorInvalidValue;
  std::shared_ptr<char[]> staged;
  if (look_up(from).place == Place::pageable) {  // the caller may reuse it at once
    staged.reset(new char[size]);
    std::memcpy(staged.get(), from, size);
  }
  stream.push([=] {
    char* target = reach_for_copy(to, size);
    const char* source = staged ? staged.get() : reach_for_copy(from, size);
    if (!target || !source) return hipErrorIllegalAddress;
    std::memmove(target, source, size);
    return hipSuccess;
  });
  return look_up(to).place == Place::pageable ? wait_for(stream) : hipSuccess;
}

hipError_t log_copy(const char* name, Stream& stream, void* to, const void* from, size_t size,
                    bool is_async) {
  const Notes notes = {{"bytes", size}, {"from", place_of(from)}, {"to", place_of(to)}};
  return call(name, notes, [&] {
    return unless_failed(stream.device(), [&] {
      const hipError_t result = copy(stream, to, from, size);
      return result == hipSuccess && !is_async ? wait_for(stream) : result;
    });
  });
}

template <class Item>
hipError_t log_fill(const char* name, Stream& stream, void* to, Item item, size_t count,
                    bool is_async = true) {
  const size_t size = count * sizeof item;
  return call(name, {{"bytes", size}, {"to", place_of(to)}}, [&] {
    return unless_failed(stream.device(), [&]() -> hipError_t {
      if (!reach(stream.device(), to, size)) return hipErrorInvalidValue;
      stream.push([=, &stream] {
        auto* target = reinterpret_cast<Item*>(reach(stream.device(), to, size));
        if (!target) return hipErrorIllegalAddress;
        std::fill_n(target, count, item);
        return hipSuccess;
      });
      return is_async ? hipSuccess : wait_for(stream);
    });
  });
}

// Freeing waits for the device, as AMD's driver does.
hipError_t free_when_done(void* pointer) {
  if (!pointer) return hipSuccess;
  if (Device* device = look_up(pointer).device) wait_for(*device);
  return release(pointer);
}

hipError_t check_grid(unsigned x, unsigned y, unsigned z, unsigned block) {
  return x && y && z && block && block <= MAX_BLOCK ? hipSuccess : hipErrorInvalidConfiguration;
}

}  // namespace

// Set up by tests, at any time.

API int sf_hip_fail(const char* faults) { return set_faults(faults) ? 0 : 1; }
API void sf_hip_mark(const char* name) { log_mark(name); }
API void sf_hip_delay(int microseconds) { delay_us = microseconds; }

// Driver, devices, contexts

API hipError_t hipInit(unsigned) {
  return call("hipInit", {}, [] { return hipSuccess; });
}

API hipError_t hipDriverGetVersion(int* result) {
  return call("hipDriverGetVersion", {}, [&] { return give(result, version()); });
}

API hipError_t hipRuntimeGetVersion(int* result) {
  return call("hipRuntimeGetVersion", {}, [&] { return give(result, version()); });
}

API hipError_t hipGetDeviceCount(int* count) {
  return call("hipGetDeviceCount", {}, [&] {
    *count = static_cast<int>(devices().size());
    return *count ? hipSuccess : hipErrorNoDevice;
  });
}

API hipError_t hipDeviceGet(hipDevice_t* device, int index) {
  return call("hipDeviceGet", {}, [&] {
    return with_device(index, [&](Device&) { return give(device, index); });
  });
}

API hipError_t hipGetDevice(int* index) {
  return call("hipGetDevice", {}, [&] { return give(index, current_device().index); });
}

API hipError_t hipSetDevice(unsigned index) {
  return call("hipSetDevice", {{"device", index}}, [&] {
    return with_device(static_cast<int>(index), [](Device& device) {
      set_current_device(device);
      return hipSuccess;
    });
  });
}

API hipError_t hipDeviceGetName(char* name, int size, hipDevice_t index) {
  return call("hipDeviceGetName", {}, [&] {
    return with_device(index, [&](Device& device) {
      std::snprintf(name, size, "%s", device.chip.product);
      return hipSuccess;
    });
  });
}

API hipError_t hipDeviceGetUuid(hipUUID* uuid, hipDevice_t index) {
  return call("hipDeviceGetUuid", {}, [&] {
    return with_device(index, [&](Device& device) { return give(uuid, device.uuid); });
  });
}

API hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t which, int index) {
  return call("hipDeviceGetAttribute", {{"attribute", which}}, [&] {
    return with_device(index, [&](Device& device) {
      const auto known = attribute(device, which);
      return known ? give(value, *known) : hipErrorInvalidValue;
    });
  });
}

API hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600* properties, int index) {
  return call("hipGetDevicePropertiesR0600", {}, [&] {
    return with_device(index, [&](Device& device) { return fill(device, properties), hipSuccess; });
  });
}

API hipError_t hipGetDeviceProperties(hipDeviceProp_tR0000* properties, int index) {
  return call("hipGetDeviceProperties", {}, [&] {
    return with_device(index, [&](Device& device) { return fill(device, properties), hipSuccess; });
  });
}

API hipError_t hipDeviceCanAccessPeer(int* can, int index, int peer) {
  return call("hipDeviceCanAccessPeer", {}, [&] {
    return with_device(index, [&](Device& device) {
      return with_device(peer, [&](Device& other) {
        *can = &device != &other && &device.chip == &other.chip;
        return hipSuccess;
      });
    });
  });
}

API hipError_t hipDeviceEnablePeerAccess(int peer, unsigned) {
  return call("hipDeviceEnablePeerAccess", {{"peer", peer}}, [&] {
    return with_device(peer, [&](Device&) {
      Device& device = current_device();
      const std::lock_guard lock(device.mutex);
      return device.peers.insert(peer).second ? hipSuccess : hipErrorPeerAccessAlreadyEnabled;
    });
  });
}

API hipError_t hipDevicePrimaryCtxRetain(hipCtx_t* context, hipDevice_t index) {
  return call("hipDevicePrimaryCtxRetain", {}, [&] {
    return with_device(index, [&](Device& device) { return give(context, &device); });
  });
}

API hipError_t hipDevicePrimaryCtxRelease(hipDevice_t) {
  return call("hipDevicePrimaryCtxRelease", {}, [] { return hipSuccess; });
}

API hipError_t hipCtxSetCurrent(hipCtx_t context) {
  return call("hipCtxSetCurrent", {}, [&] {
    if (!context) return hipErrorInvalidContext;
    set_current_device(*context);
    return hipSuccess;
  });
}

API hipError_t hipCtxGetCurrent(hipCtx_t* context) {
  return call("hipCtxGetCurrent", {}, [&] { return give(context, &current_device()); });
}

API hipError_t hipCtxPushCurrent(hipCtx_t context) {
  return call("hipCtxPushCurrent", {}, [&] {
    if (!context) return hipErrorInvalidContext;
    push_context(context);
    return hipSuccess;
  });
}

API hipError_t hipCtxPopCurrent(hipCtx_t* context) {
  return call("hipCtxPopCurrent", {}, [&] {
    Device* device = pop_context();
    if (context) *context = device;
    return device ? hipSuccess : hipErrorInvalidContext;
  });
}

API hipError_t hipDeviceSynchronize() {
  return call("hipDeviceSynchronize", {}, [] {
    wait_for(current_device());
    return current_device().failure.load();
  });
}

API hipError_t hipGetLastError() { return std::exchange(last_error, hipSuccess); }
API const char* hipGetErrorName(hipError_t error) { return error_name(error); }
API const char* hipGetErrorString(hipError_t error) { return error_name(error); }

// Memory

API hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  return call("hipMemGetInfo", {}, [&] {
    const Device& device = current_device();
    *free = device.memory_bytes - device.used_bytes;
    *total = device.memory_bytes;
    return hipSuccess;
  });
}

API hipError_t hipMalloc(void** pointer, size_t size) {
  return call("hipMalloc", {{"bytes", size}}, [&] {
    Device& device = current_device();
    return unless_failed(device, [&] { return allocate(device, size, pointer); });
  });
}

// Where the chip has none, it is host memory; where it has, the host may touch it as well.
API hipError_t hipMallocManaged(void** pointer, size_t size, unsigned) {
  return call("hipMallocManaged", {{"bytes", size}}, [&] {
    Device& device = current_device();
    return unless_failed(device, [&] { return allocate_host(&device, size, pointer); });
  });
}

API hipError_t hipHostMalloc(void** pointer, size_t size, unsigned) {
  return call("hipHostMalloc", {{"bytes", size}}, [&] {
    return unless_failed(current_device(), [&] { return allocate_host(nullptr, size, pointer); });
  });
}

API hipError_t hipFree(void* pointer) {
  return call("hipFree", {}, [&] { return free_when_done(pointer); });
}

API hipError_t hipHostFree(void* pointer) {
  return call("hipHostFree", {}, [&] {
    for (Device* device : devices()) wait_for(*device);
    return pointer ? release(pointer) : hipSuccess;
  });
}

API hipError_t hipHostRegister(void* pointer, size_t size, unsigned) {
  return call("hipHostRegister", {{"bytes", size}}, [&] { return register_host(pointer, size); });
}

API hipError_t hipHostUnregister(void* pointer) {
  return call("hipHostUnregister", {}, [&] { return unregister_host(pointer); });
}

API hipError_t hipHostGetDevicePointer(void** device_pointer, void* pointer, unsigned) {
  return call("hipHostGetDevicePointer", {}, [&] {
    if (look_up(pointer).place != Place::host) return hipErrorInvalidValue;
    *device_pointer = pointer;
    return hipSuccess;
  });
}

API hipError_t hipMemPrefetchAsync(const void* pointer, size_t size, int, hipStream_t) {
  return call("hipMemPrefetchAsync", {{"bytes", size}}, [&] {
    return look_up(pointer).place == Place::host ? hipSuccess : hipErrorInvalidValue;
  });
}

API hipError_t hipMemcpy(void* to, const void* from, size_t size, int) {
  return log_copy("hipMemcpy", stream_of(nullptr), to, from, size, false);
}

API hipError_t hipMemcpyAsync(void* to, const void* from, size_t size, int, hipStream_t stream) {
  return log_copy("hipMemcpyAsync", stream_of(stream), to, from, size, true);
}

API hipError_t hipMemcpyHtoDAsync(void* to, void* from, size_t size, hipStream_t stream) {
  return log_copy("hipMemcpyHtoDAsync", stream_of(stream), to, from, size, true);
}

API hipError_t hipMemset(void* to, int value, size_t size) {
  return log_fill("hipMemset", stream_of(nullptr), to, static_cast<uint8_t>(value), size, false);
}

API hipError_t hipMemsetAsync(void* to, int value, size_t size, hipStream_t stream) {
  return log_fill("hipMemsetAsync", stream_of(stream), to, static_cast<uint8_t>(value), size);
}

API hipError_t hipMemsetD8Async(void* to, uint8_t value, size_t count, hipStream_t stream) {
  return log_fill("hipMemsetD8Async", stream_of(stream), to, value, count);
}

API hipError_t hipMemsetD16Async(void* to, uint16_t value, size_t count, hipStream_t stream) {
  return log_fill("hipMemsetD16Async", stream_of(stream), to, value, count);
}

API hipError_t hipMemsetD32Async(void* to, uint32_t value, size_t count, hipStream_t stream) {
  return log_fill("hipMemsetD32Async", stream_of(stream), to, value, count);
}

// IREE 3.9 makes pools and allocates nothing from them.

API hipError_t hipMemPoolCreate(Pool** pool, const void*) {
  return call("hipMemPoolCreate", {}, [&] { return give(pool, new Pool); });
}

API hipError_t hipMemPoolDestroy(Pool* pool) {
  return call("hipMemPoolDestroy", {}, [&] {
    delete pool;
    return hipSuccess;
  });
}

API hipError_t hipMemPoolSetAttribute(Pool*, int, void*) {
  return call("hipMemPoolSetAttribute", {}, [] { return hipSuccess; });
}

API hipError_t hipMemPoolTrimTo(Pool*, size_t) {
  return call("hipMemPoolTrimTo", {}, [] { return hipSuccess; });
}

// Streams and events

API hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned) {
  return call("hipStreamCreateWithFlags", {}, [&] {
    return unless_failed(current_device(), [&] {
      *stream = new Stream(current_device());
      return hipSuccess;
    });
  });
}

API hipError_t hipStreamDestroy(hipStream_t stream) {
  return call("hipStreamDestroy", {}, [&] {
    delete stream;
    return hipSuccess;
  });
}

API hipError_t hipStreamSynchronize(hipStream_t stream) {
  return call("hipStreamSynchronize", {}, [&] { return wait_for(stream_of(stream)); });
}

API hipError_t hipStreamQuery(hipStream_t handle) {
  return call("hipStreamQuery", {}, [&] {
    Stream& stream = stream_of(handle);
    if (!stream.is_idle()) return hipErrorNotReady;
    return stream.device().failure.load();
  });
}

API hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned) {
  return call("hipStreamWaitEvent", {}, [&] {
    const auto done = event->done();
    if (done.valid()) stream_of(stream).push_marker([done] { done.wait(); });
    return hipSuccess;
  });
}

API hipError_t hipLaunchHostFunc(hipStream_t stream, hipHostFn_t function, void* data) {
  return call("hipLaunchHostFunc", {}, [&] {
    stream_of(stream).push([=] { return function(data), hipSuccess; });
    return hipSuccess;
  });
}

API hipError_t hipEventCreate(hipEvent_t* event) {
  return call("hipEventCreate", {}, [&] { return give(event, new Event); });
}

API hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned) {
  return call("hipEventCreateWithFlags", {}, [&] { return give(event, new Event); });
}

API hipError_t hipEventDestroy(hipEvent_t event) {
  return call("hipEventDestroy", {}, [&] {
    delete event;
    return hipSuccess;
  });
}

API hipError_t hipEventRecord(hipEvent_t event, hipStream_t handle) {
  return call("hipEventRecord", {}, [&] {
    Stream& stream = stream_of(handle);
    return unless_failed(stream.device(), [&] { return event->record(stream), hipSuccess; });
  });
}

API hipError_t hipEventQuery(hipEvent_t event) {
  return call("hipEventQuery", {}, [&] {
    const auto done = event->done();
    const bool is_done =
        !done.valid() || done.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    return is_done ? event->failure() : hipErrorNotReady;
  });
}

API hipError_t hipEventSynchronize(hipEvent_t event) {
  return call("hipEventSynchronize", {}, [&] {
    const auto done = event->done();
    if (done.valid()) done.wait();
    return event->failure();
  });
}

API hipError_t hipEventElapsedTime(float* milliseconds, hipEvent_t start, hipEvent_t stop) {
  return call("hipEventElapsedTime", {}, [&] {
    const auto from = start->done(), to = stop->done();
    if (!from.valid() || !to.valid()) return hipErrorInvalidHandle;
    *milliseconds = static_cast<float>(1000 * (to.get() - from.get()));
    return hipSuccess;
  });
}

// Kernels

API hipError_t hipModuleLoadDataEx(hipModule_t* module, const void* image, unsigned, int*, void**) {
  return call("hipModuleLoadDataEx", {}, [&] {
    Device& device = current_device();
    return unless_failed(device, [&] { return load(device, image, module); });
  });
}

API hipError_t hipModuleLoadData(hipModule_t* module, const void* image) {
  return hipModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}

API hipError_t hipModuleUnload(hipModule_t module) {
  return call("hipModuleUnload", {}, [&] {
    for (Device* device : devices()) wait_for(*device);
    delete module;
    return hipSuccess;
  });
}

API hipError_t hipModuleGetFunction(hipFunction_t* kernel, hipModule_t module, const char* name) {
  return call("hipModuleGetFunction", {{"name", name}}, [&] { return module->find(name, kernel); });
}

API hipError_t hipFuncGetAttribute(int* value, int which, hipFunction_t kernel) {
  return call("hipFuncGetAttribute", {}, [&] {
    if (which != 0 && which != 1) return hipErrorInvalidValue;
    *value = which ? kernel->lds_bytes() : static_cast<int>(MAX_BLOCK);
    return hipSuccess;
  });
}

API hipError_t hipModuleLaunchKernel(hipFunction_t kernel, unsigned grid_x, unsigned grid_y,
                                     unsigned grid_z, unsigned block_x, unsigned block_y,
                                     unsigned block_z, unsigned, hipStream_t handle,
                                     void** parameters, void** packed) {
  const unsigned block = block_x * block_y * block_z;
  const Notes notes = {{"name", kernel->name.c_str()}, {"grid_x", grid_x}, {"grid_y", grid_y},
                       {"grid_z", grid_z},             {"block", block}};
  return call("hipModuleLaunchKernel", notes, [&] {
    Stream& stream = stream_of(handle);
    return unless_failed(stream.device(), [&]() -> hipError_t {
      if (packed) return hipErrorNotSupported;
      const hipError_t wrong = check_grid(grid_x, grid_y, grid_z, block);
      if (wrong != hipSuccess) return wrong;
      const isa::Grid grid{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}};
      stream.push([kernel, &stream, call = kernel->read(parameters, grid)] {
        return kernel->run(stream.device(), call);
      });
      return hipSuccess;
    });
  });
}

// IREE looks these up as well, and calls them only in modes that shortfin does not use.

#define NOT_SUPPORTED(name) \
  API hipError_t name() {   \
    return call(#name, {}, [] { return hipErrorNotSupported; }); \
  }

NOT_SUPPORTED(hipDrvGraphAddMemcpyNode)
NOT_SUPPORTED(hipFreeAsync)
NOT_SUPPORTED(hipFuncSetAttribute)
NOT_SUPPORTED(hipGraphAddEmptyNode)
NOT_SUPPORTED(hipGraphAddEventRecordNode)
NOT_SUPPORTED(hipGraphAddKernelNode)
NOT_SUPPORTED(hipGraphAddMemsetNode)
NOT_SUPPORTED(hipGraphCreate)
NOT_SUPPORTED(hipGraphDestroy)
NOT_SUPPORTED(hipGraphExecDestroy)
NOT_SUPPORTED(hipGraphInstantiate)
NOT_SUPPORTED(hipGraphLaunch)
NOT_SUPPORTED(hipLaunchKernel)
NOT_SUPPORTED(hipMallocAsync)
NOT_SUPPORTED(hipMallocFromPoolAsync)
NOT_SUPPORTED(hipMemPoolGetAttribute)
