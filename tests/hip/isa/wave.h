// The state that instructions work on: a wave's registers, its workgroup's LDS, the launch's memory.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "instruction.h"
#include "races.h"
#include "waits.h"

namespace isa {

constexpr int MAX_LANES = 64;
constexpr uint32_t POISON = 0xffffffff;  // NaN in every float type, -1 as a number
// Where the buffer resource for scratch memory points on chips that have one (gfx908, gfx90a). What
// is read or written through it lies in Wave::scratch, each lane's apart.
constexpr uint64_t SCRATCH_BASE = uint64_t{0x5c00} << 32;

struct alignas(64) Lanes {
  uint32_t lane[MAX_LANES];
};

// Memory that a launch may touch: what its bindings point to, and its arguments.
struct Region {
  uint64_t begin;
  size_t size;
  char* data;
};

class Memory {
 public:
  explicit Memory(std::vector<Region> regions);
  // [address, address + size) in host memory; nullptr unless one region holds all of it.
  char* find(uint64_t address, size_t size) const;
  const Region* region_of(uint64_t address) const;
  // "0x1000, 4 bytes behind the end of [0x800, 0xffc)": what an access outside missed.
  std::string text_of_miss(uint64_t address, size_t size) const;

 private:
  std::vector<Region> regions_;  // by address
};

// Rounding and denormals, as the MODE register and the kernel's descriptor hold them.
struct Mode {
  static constexpr uint32_t INDEXES = 1u << 27;
  // [3:0] round modes, [7:4] denormal modes, [9] IEEE, [27] gfx9: M0 is added to registers' numbers
  uint32_t bits = 0;
  bool indexes_registers() const { return bits & INDEXES; }
  bool is_ieee() const { return bits >> 9 & 1; }  // gfx9 and 11: signalling NaNs come out quiet
  bool keeps_f32_denormals() const { return (bits >> 4 & 3) == 3; }
  bool keeps_f16_f64_denormals() const { return (bits >> 6 & 3) == 3; }
};

// What tests switch off, to see that they would notice.
struct Sabotage {
  bool ignore_barriers = false;
  bool ignore_waits = false;       // s_waitcnt and its relatives do nothing: results stay pending
  int swap_lanes = 0;              // n: the n-th vector load of each wave gives lanes 0 and 1 each other's
  std::string swap_operands_of;    // this instruction's first two sources change places
};

enum class Order : uint8_t { forward, backward, random };  // of a workgroup's waves

struct Settings {
  Order order = Order::forward;
  uint32_t seed = 1;
  bool check_races = true, check_waits = true;
  bool preloads = true;               // where the kernel asks for it, arguments lie in registers
  // gfx90a's matrix instructions take denormal 16-bit numbers for zeros, which its twins do not: a
  // comparison with them keeps denormals.
  bool flushes_in_matrices = true;
  uint64_t max_steps = 200'000'000;  // of a wave
  Sabotage sabotage;
};

struct Launch {
  Chip chip;
  const Memory* memory;
  uint32_t grid[3], block[3];  // workgroups; threads of one
  const std::vector<uint8_t>* argument_bytes;
  Settings settings;
};

struct Workgroup {
  const Launch* launch;
  uint32_t id[3];
  std::vector<uint8_t> lds;
  Races races;
};

struct Wave {
  Lanes v[NUM_VGPRS];
  uint32_t s[NUM_SGPRS];
  bool scc = false;
  Mode mode;
  Arch arch;
  int lanes = 64;  // 32 on RDNA
  size_t pc = 0;   // index of the next instruction
  bool is_done = false, is_at_barrier = false;
  uint64_t live = 0;  // lanes that have a thread: EXEC's first value
  bool has_signalled = false;  // gfx12: between s_barrier_signal and s_barrier_wait
  uint64_t num_steps = 0;
  int num_vector_loads = 0;  // of memory; for Sabotage::swap_lanes
  int id = 0;  // in its workgroup
  Workgroup* group = nullptr;
  std::vector<uint8_t> scratch;  // [lanes, bytes a thread]
  uint32_t scratch_bytes = 0;    // a thread
  Waits waits;
  std::vector<LdsTouch> late_touches;  // unfinished when the wave came to its last barrier

  uint64_t exec() const { return mask(EXEC); }
  void set_exec(uint64_t value) { set_mask(EXEC, value); }
  // A lane mask in scalar registers: one in wave32, two in wave64.
  uint64_t mask(int index) const {
    return lanes == 32 ? s[index] : s[index] | static_cast<uint64_t>(s[index + 1]) << 32;
  }
  void set_mask(int index, uint64_t value) {
    s[index] = static_cast<uint32_t>(value);
    if (lanes == 64) s[index + 1] = static_cast<uint32_t>(value >> 32);
  }
  bool is_active(int lane) const { return exec() >> lane & 1; }
};

// Runs one instruction, checks included.
void execute(Wave& wave, const Instruction& instruction);

// All instructions of one kind: each file has its own list.
struct Entry {
  const char* name;
  Handler handler;
};
extern const std::vector<Entry> SCALAR, VECTOR, MATRIX, MEMORY, LDS, CONTROL;

}  // namespace isa
