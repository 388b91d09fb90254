// What tests of single instructions call: code on a wave whose whole state the caller gives.
#include <cstdio>
#include <cstring>

#include "launch.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace isa;

struct State {
  uint32_t* vgprs;  // [512][64]
  uint32_t* sgprs;  // [128]
  uint32_t scc, mode;
  uint32_t lanes;
  uint64_t memory_base;
  uint8_t* memory;
  uint64_t memory_size;
  uint8_t* lds;
  uint32_t lds_size;
  uint8_t* scratch;
  uint32_t scratch_bytes;  // of a lane
  uint32_t check_waits;
};

int report(const Fault& fault, char* text, size_t size) {
  std::snprintf(text, size, "%s", fault.what());
  return 1;
}

void load(Wave& wave, const State& state) {
  std::memcpy(wave.v, state.vgprs, sizeof wave.v);
  std::memcpy(wave.s, state.sgprs, sizeof wave.s);
  wave.scc = state.scc;
  wave.mode.bits = state.mode;
  wave.lanes = static_cast<int>(state.lanes);
  wave.live = wave.exec();
  wave.scratch_bytes = state.scratch_bytes;
  wave.scratch.assign(state.scratch, state.scratch + state.lanes * state.scratch_bytes);
  wave.group->lds.assign(state.lds, state.lds + state.lds_size);
  wave.group->races.reset(state.lds_size);
}

void store(const Wave& wave, State* state) {
  std::memcpy(state->vgprs, wave.v, sizeof wave.v);
  std::memcpy(state->sgprs, wave.s, sizeof wave.s);
  state->scc = wave.scc;
  state->mode = wave.mode.bits;
  std::copy(wave.scratch.begin(), wave.scratch.end(), state->scratch);
  std::copy(wave.group->lds.begin(), wave.group->lds.end(), state->lds);
}

}  // namespace

API int sf_isa_run(const char* name, const uint8_t* code, size_t size, State* state, char* error,
                   size_t error_size) {
  try {
    const Chip chip = chip_of(name);
    const std::vector<Instruction> instructions = decode_all(chip, code, size, 0);
    const Memory memory({{state->memory_base, state->memory_size,
                          reinterpret_cast<char*>(state->memory)}});
    const std::vector<uint8_t> no_arguments;
    Launch launch{.chip = chip, .memory = &memory, .grid = {1, 1, 1},
                  .block = {state->lanes, 1, 1}, .argument_bytes = &no_arguments,
                  .settings = {}};
    launch.settings.check_waits = state->check_waits;
    Workgroup group{.launch = &launch, .id = {}, .lds = {}, .races = {}};
    const auto wave = std::make_unique<Wave>();
    wave->arch = chip.arch;
    wave->group = &group;
    load(*wave, *state);
    while (wave->pc < instructions.size() && !wave->is_done) {
      execute(*wave, instructions[wave->pc++]);
      wave->is_at_barrier = false;
    }
    store(*wave, state);
    return 0;
  } catch (const Fault& fault) {
    return report(fault, error, error_size);
  }
}

API int sf_isa_decode(const char* name, const uint8_t* code, size_t size, uint64_t pc, char* text,
                      size_t text_size) {
  try {
    const Chip chip = chip_of(name);
    std::string lines;
    for (const Instruction& i : decode_all(chip, code, size, pc)) {
      lines += std::to_string(i.pc) + " " + std::to_string(i.size) + " " + i.format + " " + i.name +
               " " + text_of(chip, i) + "\n";
    }
    if (lines.size() >= text_size) throw Fault("the text does not fit");
    std::memcpy(text, lines.c_str(), lines.size() + 1);
    return 0;
  } catch (const Fault& fault) {
    return report(fault, text, text_size);
  }
}
