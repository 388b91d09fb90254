// One step of a wave.
#include <utility>

#include "operands.h"

namespace isa {

namespace {

bool reads_register(const Instruction& i, const Operand& operand) {
  for (const Range& range : i.reads) {
    if (range.is_vector && range.index <= operand.index &&
        operand.index < range.index + range.count) {
      return true;
    }
  }
  return false;
}

// Both halves of a VOPD read before either writes.
void run_pair(Wave& wave, const Instruction& x) {
  const Instruction& y = *x.second;
  Lanes& target = wave.v[x.dst.index];
  if (!reads_register(y, x.dst)) {
    x.handler(wave, x);
    y.handler(wave, y);
    return;
  }
  const Lanes old = target;
  x.handler(wave, x);
  const Lanes result = std::exchange(target, old);
  y.handler(wave, y);
  target = result;
}

void run(Wave& wave, const Instruction& i) {
  const Settings& settings = wave.group->launch->settings;
  if (settings.check_waits && !wave.waits.empty()) wave.waits.check(i, wave);
  if (wave.has_signalled && i.format == "DS") {
    fail("LDS is touched between a barrier's signal and its wait");
  }
  if (wave.mode.indexes_registers() && i.name[0] == 'v' && i.name != "v_mov_b32") [[unlikely]] {
    fail("only v_mov_b32 is interpreted with indexed registers");
  }
  if (i.second) return run_pair(wave, i);
  if (settings.sabotage.swap_operands_of == i.name) [[unlikely]] {
    Instruction swapped = i;
    std::swap(swapped.src0, swapped.src1);
    return i.handler(wave, swapped);
  }
  i.handler(wave, i);
}

}  // namespace

void execute(Wave& wave, const Instruction& i) {
  const Launch& launch = *wave.group->launch;
  try {
    if (++wave.num_steps > launch.settings.max_steps) fail("the wave does not end");
    run(wave, i);
  } catch (const Fault& fault) {
    const auto& id = wave.group->id;
    throw Fault(std::string(fault.what()) + "; in \"" + text_of(launch.chip, i) + "\" at " +
                std::to_string(i.pc) + ", workgroup " + std::to_string(id[0]) + "," +
                std::to_string(id[1]) + "," + std::to_string(id[2]) + " wave " +
                std::to_string(wave.id));
  }
}

}  // namespace isa
