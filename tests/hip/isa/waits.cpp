#include "waits.h"

#include <algorithm>
#include <string_view>

#include "wave.h"

namespace isa {

namespace {

constexpr unsigned bit(Counter counter) { return 1u << static_cast<int>(counter); }

constexpr unsigned VECTOR_MEMORY = bit(Counter::load) | bit(Counter::store);
// Counters hold six bits: where more are under way, hardware waits before it starts another.
constexpr int MOST_IN_COUNTER = 63;
constexpr size_t MANY = 4 * MOST_IN_COUNTER;

// Calls body(word, mask) for the bits [range.index, range.index + range.count).
template <class Body>
void each_word(const Range& range, Body body) {
  for (int index = range.index, end = range.index + range.count; index < end;) {
    const int low = index & 63, count = std::min(64 - low, end - index);
    body(index >> 6, (~uint64_t{0} >> (64 - count)) << low);
    index += count;
  }
}

bool do_overlap(const Range& a, const Range& b) {
  return a.is_vector == b.is_vector && a.index < b.index + b.count && b.index < a.index + a.count;
}

// The kinds among which this load comes in order.
unsigned order_of(const Instruction& i) {
  const std::string_view format = i.format;
  if (format == "DS") return bit(Counter::lds);
  if (format == "SMEM" || format == "FLAT" || format == "VFLAT") return 0;
  const bool is_vector_memory = format == "MUBUF" || format == "VBUFFER" ||
                                format.find("GLOBAL") != format.npos ||
                                format.find("SCRATCH") != format.npos;
  return is_vector_memory ? VECTOR_MEMORY : 0;
}

std::string text_of(const Range& range) {
  const bool is_accumulator = range.is_vector && range.index >= AGPR;
  const int index = range.index - (is_accumulator ? AGPR : 0);
  const std::string name = is_accumulator ? "a" : range.is_vector ? "v" : "s";
  if (range.count == 1) return name + std::to_string(index);
  return name + "[" + std::to_string(index) + ":" + std::to_string(index + range.count - 1) + "]";
}

[[noreturn]] void fail(const char* what, const Range& range, const Pending& pending) {
  const bool is_lds = pending.counters == bit(Counter::lds);
  const char* from = is_lds ? "LDS" : pending.counters & bit(Counter::scalar) ? "a scalar load"
                                                                               : "memory";
  throw Fault(text_of(range) + " is " + what + " while " + text_of(pending.writes) +
              " is pending from " + from + ", by the instruction at " +
              std::to_string(pending.pc));
}

}  // namespace

void Waits::Marks::add(const Range& range) {
  each_word(range, [&](int word, uint64_t mask) {
    (range.is_vector ? vector[word] : scalar[word]) |= mask;
  });
}

bool Waits::Marks::has(const Range& range) const {
  bool is_any = false;
  each_word(range, [&](int word, uint64_t mask) {
    is_any |= ((range.is_vector ? vector[word] : scalar[word]) & mask) != 0;
  });
  return is_any;
}

void Waits::add(Pending pending, const Instruction& instruction) {
  pending.pc = instruction.pc;
  pending.started = started_;
  pending.writes = instruction.writes.empty() ? Range{} : instruction.writes.front();
  if (!pending.writes.count && !pending.num_touches) return;
  if (pending_.size() >= MANY) {
    for (const Counter counter : {Counter::load, Counter::store, Counter::lds, Counter::scalar}) {
      wait({counter}, MOST_IN_COUNTER);
    }
  }
  marks_.add(pending.writes);
  pending_.push_back(pending);
}

void Waits::start(Counter counter, const Instruction& instruction) {
  count(counter);
  add({.writes = {}, .counters = static_cast<uint8_t>(bit(counter)),
       .is_ordered = counter != Counter::scalar, .num_touches = 0, .pc = 0, .started = {}},
      instruction);
}

// As it may finish at any time, it says nothing about earlier ones: it is not counted.
void Waits::start_flat(Counter counter, const Instruction& instruction) {
  add({.writes = {}, .counters = static_cast<uint8_t>(bit(counter) | bit(Counter::lds)),
       .is_ordered = false, .num_touches = 0, .pc = 0, .started = {}},
      instruction);
}

void Waits::start_lds(const Instruction& instruction, const LdsTouch* touches, int num_touches) {
  count(Counter::lds);
  add({.writes = {}, .counters = static_cast<uint8_t>(bit(Counter::lds)), .is_ordered = true,
       .num_touches = static_cast<uint8_t>(num_touches), .pc = 0, .started = {}},
      instruction);
  touches_.insert(touches_.end(), touches, touches + num_touches);
}

void Waits::check(const Instruction& instruction, const Wave&) const {
  for (const Range& range : instruction.reads) {
    if (marks_.has(range)) check_read(range);
  }
  for (const Range& range : instruction.writes) {
    if (marks_.has(range)) check_write(range, instruction);
  }
}

void Waits::check_read(const Range& range) const {
  for (const Pending& pending : pending_) {
    if (do_overlap(pending.writes, range)) fail("read", range, pending);
  }
}

void Waits::check_write(const Range& range, const Instruction& instruction) const {
  const unsigned order = order_of(instruction);
  for (const Pending& pending : pending_) {
    if (!do_overlap(pending.writes, range)) continue;
    const bool comes_before = pending.is_ordered && (pending.counters & ~order) == 0;
    if (!comes_before) fail("overwritten", range, pending);
  }
}

bool Waits::has_finished(const Pending& pending, unsigned counters, uint64_t n) const {
  if (!pending.is_ordered) return n == 0;
  const unsigned kind = pending.counters & VECTOR_MEMORY ? VECTOR_MEMORY : pending.counters;
  uint64_t later = 0;
  for (int k = 0; k < NUM_COUNTERS; ++k) {
    if (counters & kind & (1u << k)) later += started_[k] - pending.started[k];
  }
  return later >= n;
}

void Waits::wait(const std::vector<Counter>& counters, int n) {
  if (pending_.empty()) return;
  unsigned mask = 0;
  for (const Counter counter : counters) mask |= bit(counter);
  size_t num_touches = 0;
  const auto is_done = [&](Pending& pending) {
    if (!(pending.counters & mask)) return false;
    if (!has_finished(pending, mask, static_cast<uint64_t>(n))) return false;
    pending.counters &= static_cast<uint8_t>(~mask);
    if (!pending.counters) num_touches += pending.num_touches;
    return !pending.counters;
  };
  if (std::erase_if(pending_, is_done) == 0) return;
  // LDS operations finish in order, so theirs are the first.
  touches_.erase(touches_.begin(), touches_.begin() + static_cast<ptrdiff_t>(num_touches));
  update_marks();
}

void Waits::update_marks() {
  marks_ = {};
  for (const Pending& pending : pending_) marks_.add(pending.writes);
}

void Waits::clear() {
  pending_.clear();
  touches_.clear();
  marks_ = {};
}

void remember_late_lds(Wave& wave) {
  if (wave.group->launch->settings.check_races) wave.late_touches = wave.waits.pending_touches();
}

void touch_late_lds(Wave& wave) {
  for (const LdsTouch& touch : wave.late_touches) wave.group->races.touch(touch, wave.id);
  wave.late_touches.clear();
}

}  // namespace isa
