// What memory instructions have not finished, until a wait says that they have.
//
// A chip counts the unfinished ones in a few counters. Those of one kind finish in the order in
// which they began, scalar loads and FLAT in any. So after a wait for at most n, an operation is
// sure to have finished if n or more of its own kind that count in the same counter began after
// it; scalar loads and FLAT only at n = 0. Everything else counts as unfinished: who reads or
// overwrites its destination ends the launch. Values are there at once, as nobody may look at them
// earlier.
//
// The data of a store is no hazard: on all chips here, hardware has read it before the wave can
// overwrite it (LLVM's `vmemWriteNeedsExpWaitcnt` is false since Sea Islands).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "instruction.h"

namespace isa {

// gfx9: vm has loads and stores, in one order; lgkm LDS and scalar loads. gfx11: stores are in vs.
// gfx12: load, store, ds, km.
enum class Counter : uint8_t { load, store, lds, scalar };
constexpr int NUM_COUNTERS = 4;

// What an LDS operation touches.
struct LdsTouch {
  uint64_t lanes;
  uint32_t size;
  bool is_write;
  std::array<uint32_t, 64> addresses;
};

struct Pending {
  Range writes;       // its destination; count 0 where there is none
  uint8_t counters;   // a bit for each that has not said yet that it has finished
  bool is_ordered;
  uint8_t num_touches;  // of LDS
  uint64_t pc;
  std::array<uint64_t, NUM_COUNTERS> started;  // how many of each kind had, itself included
};

class Waits {
 public:
  // An operation begins whose destination is what the instruction writes.
  void start(Counter counter, const Instruction& instruction);
  void start_flat(Counter counter, const Instruction& instruction);  // counts as LDS too
  void start_lds(const Instruction& instruction, const LdsTouch* touches, int num_touches);
  // One that counts, but has no result: cache control.
  void count(Counter counter) { ++started_[static_cast<int>(counter)]; }
  // Raises Fault where the instruction reads or writes what is pending. A load may overwrite what
  // an earlier one of its kind has yet to bring: they come in order.
  void check(const Instruction& instruction, const Wave& wave) const;
  // At most n of those counters together may be left.
  void wait(const std::vector<Counter>& counters, int n);
  bool empty() const { return pending_.empty(); }
  const std::vector<Pending>& pending() const { return pending_; }
  const std::vector<LdsTouch>& pending_touches() const { return touches_; }
  void clear();

 private:
  // Registers, a bit each.
  struct Marks {
    std::array<uint64_t, 8> vector = {};
    std::array<uint64_t, 2> scalar = {};
    void add(const Range& range);
    bool has(const Range& range) const;
  };

  void add(Pending pending, const Instruction& instruction);
  bool has_finished(const Pending& pending, unsigned counters, uint64_t n) const;
  void update_marks();
  void check_read(const Range& range) const;
  void check_write(const Range& range, const Instruction& instruction) const;

  std::vector<Pending> pending_;   // oldest first
  std::vector<LdsTouch> touches_;  // of the pending LDS operations, oldest first
  Marks marks_;                    // all destinations
  std::array<uint64_t, NUM_COUNTERS> started_ = {};
};

// LDS operations that are unfinished when their wave comes to a barrier may take place behind it:
// this remembers them, for when all have come.
void remember_late_lds(Wave& wave);
void touch_late_lds(Wave& wave);

}  // namespace isa
