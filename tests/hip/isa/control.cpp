// What steers a wave: branches, waits, barriers, modes, the end.
#include "operands.h"

namespace isa {

namespace {

void nothing(Wave&, const Instruction&) {}

void endpgm(Wave& wave, const Instruction&) { wave.is_done = true; }

// Branches

void jump(Wave& wave, const Instruction& i) {
  if (i.target < 0) fail("a branch to where no instruction begins");
  wave.pc = static_cast<size_t>(i.target);
}

template <auto TEST>
void branch_if(Wave& wave, const Instruction& i) {
  if (TEST(wave)) jump(wave, i);
}

// Waits

void wait_for(Wave& wave, const std::vector<Counter>& counters, int n) {
  if (!wave.group->launch->settings.sabotage.ignore_waits) wave.waits.wait(counters, n);
}

const std::vector<Counter> VM_GFX9 = {Counter::load, Counter::store};
const std::vector<Counter> LGKM = {Counter::lds, Counter::scalar};
const std::vector<Counter> LOADS = {Counter::load}, STORES = {Counter::store};
const std::vector<Counter> DS = {Counter::lds}, KM = {Counter::scalar};

int bits_of(int32_t value, int low, int count) {
  return value >> low & ((1 << count) - 1);
}

// gfx9: vmcnt in bits [15:14] and [3:0], lgkmcnt in [11:8]. gfx11: vmcnt in [15:10], lgkmcnt in
// [9:4]. Exports, which expcnt counts, do not occur.
void waitcnt(Wave& wave, const Instruction& i) {
  if (wave.arch == Arch::cdna) {
    wait_for(wave, VM_GFX9, bits_of(i.simm, 0, 4) | bits_of(i.simm, 14, 2) << 4);
    wait_for(wave, LGKM, bits_of(i.simm, 8, 4));
  } else {
    wait_for(wave, LOADS, bits_of(i.simm, 10, 6));
    wait_for(wave, LGKM, bits_of(i.simm, 4, 6));
  }
}

// One counter each: gfx11's have a register that is NULL, gfx12's the constant alone.
template <const std::vector<Counter>& COUNTERS>
void wait_one(Wave& wave, const Instruction& i) {
  if (i.dst.kind == Kind::sgpr) fail("a wait for a number in a register is not interpreted");
  wait_for(wave, COUNTERS, bits_of(i.simm, 0, 6));
}

// gfx12: LDS in bits [5:0], the other in [13:8].
template <const std::vector<Counter>& COUNTERS>
void wait_with_ds(Wave& wave, const Instruction& i) {
  wait_for(wave, DS, bits_of(i.simm, 0, 6));
  wait_for(wave, COUNTERS, bits_of(i.simm, 8, 6));
}

void wait_idle(Wave& wave, const Instruction&) {
  for (const auto* counters : {&LOADS, &STORES, &DS, &KM}) wait_for(wave, *counters, 0);
}

// Barriers. The wave stops; whoever runs the workgroup lets all of it go on.

// A wave that comes with some of its threads only has split before the barrier, or will come again
// with the others, while other waves count its coming once.
void expect_all_threads(const Wave& wave) {
  if (wave.exec() != wave.live) fail("a barrier to which not all threads of the wave have come");
}

bool has_barriers(const Wave& wave) {
  return !wave.group->launch->settings.sabotage.ignore_barriers;
}

void barrier(Wave& wave, const Instruction&) {
  expect_all_threads(wave);
  remember_late_lds(wave);
  wave.is_at_barrier = has_barriers(wave);
}

void expect_whole_workgroup(const Instruction& i, int32_t which) {
  if (which != -1) fail("barrier " + std::to_string(which) + " is not interpreted: " + i.name);
}

void barrier_signal(Wave& wave, const Instruction& i) {
  expect_whole_workgroup(i, static_cast<int32_t>(read_scalar(wave, i.src0)));
  expect_all_threads(wave);
  if (wave.has_signalled) fail("a second signal before the wait");
  wave.has_signalled = true;
  remember_late_lds(wave);
}

void barrier_wait(Wave& wave, const Instruction& i) {
  expect_whole_workgroup(i, i.simm);
  if (!wave.has_signalled) fail("a wait for a barrier that was not signalled");
  wave.has_signalled = false;
  wave.is_at_barrier = has_barriers(wave);
}

// Modes

// The constant's bits go into [offset, offset + size) of a hardware register.
void setreg_imm32(Wave& wave, const Instruction& i) {
  constexpr int MODE = 1;
  const int id = bits_of(i.simm, 0, 6), offset = bits_of(i.simm, 6, 5);
  const int size = bits_of(i.simm, 11, 5) + 1;
  if (id != MODE) fail("hardware register " + std::to_string(id) + " is not interpreted");
  const uint32_t mask = static_cast<uint32_t>(((uint64_t{1} << size) - 1) << offset);
  wave.mode.bits = (wave.mode.bits & ~mask) | (i.literal << offset & mask);
}

void denorm_mode(Wave& wave, const Instruction& i) {
  wave.mode.bits = (wave.mode.bits & ~0xf0u) | static_cast<uint32_t>(bits_of(i.simm, 0, 4)) << 4;
}

void round_mode(Wave& wave, const Instruction& i) {
  wave.mode.bits = (wave.mode.bits & ~0xfu) | static_cast<uint32_t>(bits_of(i.simm, 0, 4));
}

// M0 says which operands' registers are indexed, and by how much (gfx9).
void set_bits_of_m0(Wave& wave, int low, int count, uint32_t value) {
  const uint32_t mask = ((1u << count) - 1) << low;
  wave.s[M0] = (wave.s[M0] & ~mask) | (value << low & mask);
}

void set_index(Wave& wave, const Instruction& i) {
  set_bits_of_m0(wave, 0, 8, read_scalar(wave, i.src0));
}

void set_indexed_operands(Wave& wave, const Instruction& i) {
  set_bits_of_m0(wave, 12, 4, static_cast<uint32_t>(i.simm));
}

void start_indexing(Wave& wave, const Instruction& i) {
  set_index(wave, i);
  set_indexed_operands(wave, i);
  wave.mode.bits |= Mode::INDEXES;
}

void end_indexing(Wave& wave, const Instruction&) { wave.mode.bits &= ~Mode::INDEXES; }

}  // namespace

extern const std::vector<Entry> CONTROL = {
    {"s_endpgm", endpgm},
    {"s_branch", jump},
    {"s_cbranch_scc0", branch_if<[](const Wave& wave) { return !wave.scc; }>},
    {"s_cbranch_scc1", branch_if<[](const Wave& wave) { return wave.scc; }>},
    {"s_cbranch_vccz", branch_if<[](const Wave& wave) { return wave.mask(VCC) == 0; }>},
    {"s_cbranch_vccnz", branch_if<[](const Wave& wave) { return wave.mask(VCC) != 0; }>},
    {"s_cbranch_execz", branch_if<[](const Wave& wave) { return wave.exec() == 0; }>},
    {"s_cbranch_execnz", branch_if<[](const Wave& wave) { return wave.exec() != 0; }>},
    {"s_waitcnt", waitcnt},
    {"s_waitcnt_vmcnt", wait_one<LOADS>},
    {"s_waitcnt_vscnt", wait_one<STORES>},
    {"s_waitcnt_lgkmcnt", wait_one<LGKM>},
    {"s_waitcnt_expcnt", nothing},
    {"s_wait_loadcnt", wait_one<LOADS>},
    {"s_wait_storecnt", wait_one<STORES>},
    {"s_wait_dscnt", wait_one<DS>},
    {"s_wait_kmcnt", wait_one<KM>},
    {"s_wait_loadcnt_dscnt", wait_with_ds<LOADS>},
    {"s_wait_storecnt_dscnt", wait_with_ds<STORES>},
    {"s_wait_samplecnt", nothing},  // of textures, as the next one: there are none
    {"s_wait_bvhcnt", nothing},
    {"s_wait_expcnt", nothing},
    {"s_wait_idle", wait_idle},
    {"s_barrier", barrier},
    {"s_barrier_signal", barrier_signal},
    {"s_barrier_wait", barrier_wait},
    {"s_setreg_imm32_b32", setreg_imm32},
    {"s_denorm_mode", denorm_mode},
    {"s_round_mode", round_mode},
    {"s_set_gpr_idx_on", start_indexing},
    {"s_set_gpr_idx_off", end_indexing},
    {"s_set_gpr_idx_idx", set_index},
    {"s_set_gpr_idx_mode", set_indexed_operands},
    // Speed and hazards between arithmetic units, which an interpreter does not have.
    {"s_nop", nothing},
    {"s_clause", nothing},
    {"s_delay_alu", nothing},
    {"s_wait_alu", nothing},
    {"s_waitcnt_depctr", nothing},
    {"s_setprio", nothing},
    {"s_sleep", nothing},
    {"s_set_inst_prefetch_distance", nothing},
    {"s_inst_prefetch", nothing},
    {"s_icache_inv", nothing},
    {"s_sendmsg", nothing},  // registers are given back
};

}  // namespace isa
