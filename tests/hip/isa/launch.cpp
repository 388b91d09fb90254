#include "launch.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <random>
#include <thread>

namespace isa {

namespace {

constexpr uint64_t ARGUMENTS = uint64_t{0x5a00} << 32;  // their address; no allocation lies there
constexpr int PRELOAD_PROLOGUE = 256;                   // bytes that load what is preloaded

uint32_t bits_of(uint32_t value, int low, int count) { return value >> low & ((1u << count) - 1); }

int num_lanes(const Program& program) { return program.chip.arch == Arch::cdna ? 64 : 32; }

struct Registers {
  int vector, accumulation;
};

// Allocated registers, as the descriptor counts them. gfx908 has as many accumulation registers as
// vector registers; later CDNA divides one file between both.
Registers allocated_registers(const Program& program) {
  const int granules = static_cast<int>(bits_of(program.kernel.rsrc1, 0, 6)) + 1;
  if (program.chip.name == "gfx908") return {4 * granules, 4 * granules};
  if (program.chip.arch != Arch::cdna) return {8 * granules, 0};
  const int vector = 4 * (static_cast<int>(bits_of(program.kernel.rsrc3, 0, 6)) + 1);
  return {vector, 8 * granules - vector};
}

// Scalar registers before the first instruction: what the launch puts there, in the order of
// LLVM's "AMDGPU usage", then the workgroup's numbers.
class ScalarSetup {
 public:
  ScalarSetup(Wave& wave, const Program& program) : wave_(wave), program_(program) {}

  void fill() {
    const Kernel& kernel = program_.kernel;
    if (kernel.properties & 1) put_scratch_resource();
    skip(kernel.properties & 2, 2);  // dispatch packet
    skip(kernel.properties & 4, 2);  // queue
    if (kernel.properties & 8) put64(ARGUMENTS);
    skip(kernel.properties & 0x10, 2);  // dispatch number
    skip(kernel.properties & 0x20, 2);  // flat scratch
    if (kernel.properties & 0x40) put(kernel.scratch_bytes);
    if (program_.has_preload && settings().preloads) put_arguments();
    next_ = bits_of(kernel.rsrc2, 1, 5);
    put_workgroup();
  }

 private:
  const Settings& settings() const { return wave_.group->launch->settings; }
  void put(uint32_t value) { wave_.s[next_++] = value; }
  void put64(uint64_t value) {
    put(static_cast<uint32_t>(value));
    put(static_cast<uint32_t>(value >> 32));
  }
  void skip(bool is_there, int count) { next_ += is_there ? count : 0; }

  // Base, swizzled by lanes; no bound; what its last word says no chip here is asked.
  void put_scratch_resource() {
    put(static_cast<uint32_t>(SCRATCH_BASE));
    put(static_cast<uint32_t>(SCRATCH_BASE >> 32) | 1u << 31);
    put(0xffffffff);
    put(0x00e00000);
  }

  void put_arguments() {
    const auto& bytes = *wave_.group->launch->argument_bytes;
    const uint32_t count = bits_of(program_.kernel.preload, 0, 7);
    const uint32_t first = bits_of(program_.kernel.preload, 7, 9);
    for (uint32_t k = first; k < first + count; ++k) {
      uint32_t value = 0;
      if (4 * k + 4 <= bytes.size()) std::memcpy(&value, bytes.data() + 4 * k, 4);
      put(value);
    }
  }

  void put_workgroup() {
    const uint32_t* id = wave_.group->id;
    const uint32_t rsrc2 = program_.kernel.rsrc2;
    if (program_.chip.arch == Arch::rdna4) {
      wave_.s[TTMP + 9] = id[0];
      wave_.s[TTMP + 7] = id[1] | id[2] << 16;
      return;
    }
    for (int k = 0; k < 3; ++k) {
      if (bits_of(rsrc2, 7 + k, 1)) put(id[k]);
    }
    const std::string& chip = program_.chip.name;
    const bool has_scratch_offset = chip == "gfx908" || chip == "gfx90a";
    if (has_scratch_offset && bits_of(rsrc2, 0, 1)) put(0);
  }

  Wave& wave_;
  const Program& program_;
  int next_ = 0;
};

// Threads' numbers in their workgroup: packed in v0, or in v0 to v2 on gfx908.
void put_threads(Wave& wave, const Program& program, const uint32_t block[3]) {
  uint64_t live = 0;
  const uint32_t count = block[0] * block[1] * block[2];
  for (int lane = 0; lane < wave.lanes; ++lane) {
    const uint32_t thread = wave.id * wave.lanes + lane;
    if (thread >= count) break;
    live |= uint64_t{1} << lane;
    const uint32_t x = thread % block[0], y = thread / block[0] % block[1],
                   z = thread / block[0] / block[1];
    if (program.chip.name == "gfx908") {
      const uint32_t dimensions = bits_of(program.kernel.rsrc2, 11, 2);
      wave.v[0].lane[lane] = x;
      if (dimensions > 0) wave.v[1].lane[lane] = y;
      if (dimensions > 1) wave.v[2].lane[lane] = z;
    } else {
      wave.v[0].lane[lane] = x | y << 10 | z << 20;
    }
  }
  wave.live = live;
  wave.set_exec(live);
}

// One workgroup's waves, in the order that the settings ask for.
class Schedule {
 public:
  Schedule(const Program& program, std::vector<Wave>& waves, const Settings& settings, uint32_t seed)
      : program_(program), waves_(waves), settings_(settings), random_(seed) {}

  uint64_t run() {
    do {
      if (settings_.order == Order::random) {
        run_interleaved();
      } else {
        for (size_t k = 0; k < waves_.size(); ++k) {
          Wave& wave = waves_[settings_.order == Order::backward ? waves_.size() - 1 - k : k];
          while (is_running(wave)) step(wave);
        }
      }
    } while (pass_barrier());
    uint64_t steps = 0;
    for (const Wave& wave : waves_) steps += wave.num_steps;
    return steps;
  }

 private:
  static bool is_running(const Wave& wave) { return !wave.is_done && !wave.is_at_barrier; }

  void step(Wave& wave) {
    if (wave.pc >= program_.code.size()) throw Fault("a wave ran beyond the kernel's code");
    execute(wave, program_.code[wave.pc++]);
  }

  // A few instructions of one wave, then of another, until all wait or have ended.
  void run_interleaved() {
    std::vector<Wave*> running;
    for (Wave& wave : waves_) {
      if (is_running(wave)) running.push_back(&wave);
    }
    while (!running.empty()) {
      const size_t which = random_() % running.size();
      for (unsigned count = 1 + random_() % 8; count && is_running(*running[which]); --count) {
        step(*running[which]);
      }
      if (!is_running(*running[which])) running.erase(running.begin() + which);
    }
  }

  // False if all waves have ended.
  bool pass_barrier() {
    bool is_any = false;
    for (Wave& wave : waves_) is_any = is_any || !wave.is_done;
    if (!is_any) return false;
    waves_.front().group->races.barrier();
    for (Wave& wave : waves_) {
      wave.is_at_barrier = false;
      touch_late_lds(wave);
    }
    return true;
  }

  const Program& program_;
  std::vector<Wave>& waves_;
  const Settings& settings_;
  std::minstd_rand random_;
};

uint64_t run_workgroup(const Program& program, Workgroup& group, std::vector<Wave>& waves,
                       uint32_t number) {
  const Launch& launch = *group.launch;
  group.id[0] = number % launch.grid[0];
  group.id[1] = number / launch.grid[0] % launch.grid[1];
  group.id[2] = number / launch.grid[0] / launch.grid[1];
  group.lds.assign(program.kernel.lds_bytes, 0xff);
  group.races.reset(group.lds.size());
  for (size_t k = 0; k < waves.size(); ++k) reset(waves[k], program, group, static_cast<int>(k));
  return Schedule(program, waves, launch.settings, launch.settings.seed + number).run();
}

size_t index_of(const std::vector<Instruction>& code, uint64_t address) {
  const auto at = std::lower_bound(
      code.begin(), code.end(), address,
      [](const Instruction& instruction, uint64_t pc) { return instruction.pc < pc; });
  if (at == code.end() || at->pc != address) throw Fault("no instruction begins at the entry");
  return static_cast<size_t>(at - code.begin());
}

void check_registers(const Program& program) {
  const Registers allocated = allocated_registers(program);
  for (const Instruction& instruction : program.code) {
    for (const auto* ranges : {&instruction.reads, &instruction.writes}) {
      for (const Range& range : *ranges) {
        if (!range.is_vector) continue;
        const bool is_accumulation = range.index >= AGPR;
        const int number = range.index - (is_accumulation ? AGPR : 0);
        const int end = is_accumulation ? allocated.accumulation : allocated.vector;
        if (number + range.count > end) {
          throw Fault((is_accumulation ? "a" : "v") + std::to_string(number) +
                      " is not allocated: \"" + text_of(program.chip, instruction) + "\"");
        }
      }
    }
  }
}

}  // namespace

Program load_program(const Kernel& kernel, const Chip& chip) {
  Program program{kernel, chip, decode_all(chip, kernel.code, kernel.code_bytes, kernel.address)};
  program.entry = program.preloaded_entry = index_of(program.code, kernel.address);
  program.has_preload = bits_of(kernel.preload, 0, 7) > 0;
  if (program.has_preload) {
    program.preloaded_entry = index_of(program.code, kernel.address + PRELOAD_PROLOGUE);
  }
  check_registers(program);
  return program;
}

std::vector<uint8_t> argument_segment(const Kernel& kernel, void* const* parameters,
                                      const Grid& grid) {
  std::vector<uint8_t> bytes(kernel.argument_bytes);
  const auto put = [&](const Argument& argument, const void* from) {
    if (argument.offset + argument.size > bytes.size()) throw Fault("an argument lies outside");
    std::memcpy(bytes.data() + argument.offset, from, argument.size);
  };
  for (const Argument& argument : kernel.arguments) {
    if (!argument.kind.starts_with("hidden_")) {
      put(argument, *parameters++);
      continue;
    }
    for (int k = 0; k < 3; ++k) {
      const std::string axis(1, "xyz"[k]);
      if (argument.kind == "hidden_block_count_" + axis) put(argument, &grid.grid[k]);
      if (argument.kind == "hidden_group_size_" + axis) put(argument, &grid.block[k]);
    }
    const uint32_t dimensions = grid.grid[2] > 1 ? 3 : grid.grid[1] > 1 ? 2 : 1;
    if (argument.kind == "hidden_grid_dims") put(argument, &dimensions);
  }
  return bytes;
}

void reset(Wave& wave, const Program& program, Workgroup& group, int id) {
  std::memset(wave.v, 0xff, allocated_registers(program).vector * sizeof(Lanes));
  if (program.chip.arch == Arch::cdna) std::memset(wave.v + AGPR, 0xff, AGPR * sizeof(Lanes));
  std::memset(wave.s, 0xff, sizeof wave.s);
  wave.scc = true;
  wave.mode.bits = bits_of(program.kernel.rsrc1, 12, 8) |
                   (program.chip.arch == Arch::rdna4 ? 0 : bits_of(program.kernel.rsrc1, 23, 1) << 9);
  wave.arch = program.chip.arch;
  wave.lanes = num_lanes(program);
  wave.is_done = wave.is_at_barrier = wave.has_signalled = false;
  wave.num_steps = 0;
  wave.num_vector_loads = 0;
  wave.id = id;
  wave.group = &group;
  wave.scratch_bytes = program.kernel.scratch_bytes;
  wave.scratch.assign(static_cast<size_t>(wave.lanes) * wave.scratch_bytes, 0xff);
  wave.waits.clear();
  wave.late_touches.clear();
  const bool preloads = group.launch->settings.preloads;
  wave.pc = preloads ? program.preloaded_entry : program.entry;
  ScalarSetup(wave, program).fill();
  put_threads(wave, program, group.launch->block);
}

uint64_t run(const Program& program, const Grid& grid, const std::vector<uint8_t>& arguments,
             std::vector<Region> regions, const Settings& settings) {
  // The compiler loads arguments in wide pieces, which may end behind the last one: drivers place
  // them in whole units of 64 bytes, of which the rest is poison here.
  std::vector<uint8_t> placed = arguments;
  placed.resize((arguments.size() + 63) / 64 * 64, 0xff);
  regions.push_back({ARGUMENTS, placed.size(), reinterpret_cast<char*>(placed.data())});
  const Memory memory(std::move(regions));
  Launch launch{.chip = program.chip, .memory = &memory,
                .grid = {grid.grid[0], grid.grid[1], grid.grid[2]},
                .block = {grid.block[0], grid.block[1], grid.block[2]},
                .argument_bytes = &arguments, .settings = settings};
  const uint32_t total = grid.grid[0] * grid.grid[1] * grid.grid[2];
  const uint32_t threads_of_group = grid.block[0] * grid.block[1] * grid.block[2];
  const size_t num_waves = (threads_of_group + num_lanes(program) - 1) / num_lanes(program);
  std::atomic<uint32_t> next = 0;
  std::atomic<uint64_t> steps = 0;
  std::exception_ptr first;
  std::mutex mutex;
  const auto work = [&] {
    // As an array: registers need no first value, `reset` gives them one.
    std::vector<Wave> waves(num_waves);
    Workgroup group{.launch = &launch, .id = {}, .lds = {}, .races = {}};
    try {
      for (uint32_t k; (k = next++) < total;) {
        const uint32_t number = settings.order == Order::backward ? total - 1 - k : k;
        steps += run_workgroup(program, group, waves, number);
      }
    } catch (...) {
      next = total;
      const std::lock_guard lock(mutex);
      if (!first) first = std::current_exception();
    }
  };
  const unsigned count = std::min(std::max(1u, std::thread::hardware_concurrency()), total);
  std::vector<std::thread> others;
  for (unsigned k = 1; k < count; ++k) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (first) std::rethrow_exception(first);
  return steps;
}

}  // namespace isa
