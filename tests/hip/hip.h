// The part of HIP's binary interface that this driver speaks, in its own words: handles, errors,
// and the two layouts of device properties. Numbers and offsets are those of ROCm 6.
#pragma once

#include <cstddef>
#include <cstdint>

#define HIP_ERRORS(X)                \
  X(Success, 0)                      \
  X(ErrorInvalidValue, 1)            \
  X(ErrorOutOfMemory, 2)             \
  X(ErrorNotInitialized, 3)          \
  X(ErrorInvalidConfiguration, 9)    \
  X(ErrorInvalidDevicePointer, 17)   \
  X(ErrorInsufficientDriver, 35)     \
  X(ErrorInvalidDeviceFunction, 98)  \
  X(ErrorNoDevice, 100)              \
  X(ErrorInvalidDevice, 101)         \
  X(ErrorInvalidImage, 200)          \
  X(ErrorInvalidContext, 201)        \
  X(ErrorNoBinaryForGpu, 209)        \
  X(ErrorECCNotCorrectable, 214)     \
  X(ErrorPeerAccessUnsupported, 217) \
  X(ErrorInvalidHandle, 400)         \
  X(ErrorNotFound, 500)              \
  X(ErrorNotReady, 600)              \
  X(ErrorIllegalAddress, 700)        \
  X(ErrorLaunchOutOfResources, 701)  \
  X(ErrorLaunchTimeOut, 702)         \
  X(ErrorPeerAccessAlreadyEnabled, 704) \
  X(ErrorHostMemoryAlreadyRegistered, 712) \
  X(ErrorHostMemoryNotRegistered, 713) \
  X(ErrorLaunchFailure, 719)         \
  X(ErrorNotSupported, 801)          \
  X(ErrorUnknown, 999)

enum hipError_t : int {
#define X(name, value) hip##name = value,
  HIP_ERRORS(X)
#undef X
};

struct Device;
class Event;
class Stream;
struct Kernel;
struct Module;

using hipCtx_t = Device*;
using hipDevice_t = int;
using hipEvent_t = Event*;
using hipFunction_t = const Kernel*;
using hipHostFn_t = void (*)(void*);
using hipModule_t = Module*;
using hipStream_t = Stream*;

struct hipUUID {
  char bytes[16];
};

enum hipDeviceAttribute_t : int {
  hipDeviceAttributeClockRate = 5,
  hipDeviceAttributeConcurrentManagedAccess = 9,
  hipDeviceAttributeIntegrated = 16,
  hipDeviceAttributeL2CacheSize = 19,
  hipDeviceAttributeComputeCapabilityMajor = 23,
  hipDeviceAttributeManagedMemory = 24,
  hipDeviceAttributeMaxBlockDimX = 26,
  hipDeviceAttributeMaxBlockDimY = 27,
  hipDeviceAttributeMaxBlockDimZ = 28,
  hipDeviceAttributeMaxGridDimX = 29,
  hipDeviceAttributeMaxGridDimY = 30,
  hipDeviceAttributeMaxGridDimZ = 31,
  hipDeviceAttributeMaxThreadsPerBlock = 56,
  hipDeviceAttributeMemoryBusWidth = 59,
  hipDeviceAttributeMemoryClockRate = 60,
  hipDeviceAttributeComputeCapabilityMinor = 61,
  hipDeviceAttributeMultiprocessorCount = 63,
  hipDeviceAttributeMaxSharedMemoryPerBlock = 74,
  hipDeviceAttributeWarpSize = 87,
  hipDeviceAttributeMemoryPoolsSupported = 88,
};

struct hipDeviceProp_tR0600 {
  char name[256];
  hipUUID uuid;
  char gap0[16];
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  size_t memPitch;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int clockRate;
  size_t totalConstMem;
  int major;
  int minor;
  char gap1[20];
  int multiProcessorCount;
  char gap2[216];
  int memoryClockRate;
  int memoryBusWidth;
  int l2CacheSize;
  char gap3[540];
  char gcnArchName[256];
  char gap4[56];
};
static_assert(offsetof(hipDeviceProp_tR0600, multiProcessorCount) == 388);
static_assert(offsetof(hipDeviceProp_tR0600, memoryClockRate) == 608);
static_assert(offsetof(hipDeviceProp_tR0600, gcnArchName) == 1160);
static_assert(sizeof(hipDeviceProp_tR0600) == 1472);

struct hipDeviceProp_tR0000 {
  char name[256];
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int clockRate;
  int memoryClockRate;
  int memoryBusWidth;
  size_t totalConstMem;
  int major;
  int minor;
  int multiProcessorCount;
  int l2CacheSize;
  char gap0[52];
  char gcnArchName[256];
  char gap1[140];
};
static_assert(offsetof(hipDeviceProp_tR0000, totalConstMem) == 320);
static_assert(offsetof(hipDeviceProp_tR0000, gcnArchName) == 396);
static_assert(sizeof(hipDeviceProp_tR0000) == 792);
