// LDS: loads, stores, and exchanges of data between lanes that go through its crossbar.
#include <algorithm>
#include <deque>
#include <utility>

#include "transfer.h"

namespace isa {

namespace {

const Settings& settings_of(const Wave& wave) { return wave.group->launch->settings; }

// Adds up in 32 bits, as hardware does.
void add_addresses(const Wave& wave, const Instruction& i, uint32_t offset, LdsTouch& touch) {
  if (!i.src0.is_vector()) fail("an LDS address without a vector register");
  const uint32_t* addresses = wave.v[i.src0.index].lane;
  each_lane(wave, [&](int lane) { touch.addresses[lane] = addresses[lane] + offset; });
}

[[noreturn]] void fail_outside(const LdsTouch& touch, size_t lds_bytes) {
  each_active(touch.lanes, [&](int lane) {
    const uint64_t address = touch.addresses[lane];
    if (address + touch.size <= lds_bytes) return;
    fail("lane " + std::to_string(lane) + " reaches " + std::to_string(touch.size) +
         " bytes of LDS at " + std::to_string(address) + ", of " + std::to_string(lds_bytes));
  });
  fail("LDS is reached outside");
}

void check_bounds(const Wave& wave, const LdsTouch& touch) {
  const size_t lds_bytes = wave.group->lds.size();
  const int64_t last = static_cast<int64_t>(lds_bytes) - touch.size;
  // Negative where a lane reaches further.
  const int64_t left = or_of(wave, touch.lanes, [&touch, last](int lane) {
    return last - static_cast<int64_t>(touch.addresses[lane]);
  });
  if (left < 0) fail_outside(touch, lds_bytes);
}

// One part of an LDS instruction: where its lanes' data are, after all checks.
void locate(Wave& wave, const Instruction& i, uint32_t offset, uint32_t size, bool is_write,
            LdsTouch& touch, Pointers& pointers) {
  touch.lanes = wave.exec();
  touch.size = size;
  touch.is_write = is_write;
  add_addresses(wave, i, offset, touch);
  check_bounds(wave, touch);
  if (settings_of(wave).check_races) wave.group->races.touch(touch, wave.id);
  char* lds = reinterpret_cast<char*>(wave.group->lds.data());
  each_lane(wave, [&](int lane) { pointers.lane[lane] = lds + touch.addresses[lane]; });
}

void start(Wave& wave, const Instruction& i, const LdsTouch* touches, int num_touches) {
  const Settings& settings = settings_of(wave);
  if (!settings.check_waits) return;
  wave.waits.start_lds(i, touches, settings.check_races ? num_touches : 0);
}

template <Datum DATUM>
void load(Wave& wave, const Instruction& i) {
  LdsTouch touch;
  Pointers from;
  locate(wave, i, static_cast<uint32_t>(i.offset), DATUM.bytes, false, touch, from);
  load_lanes<DATUM>(wave, registers_of(wave, i.dst), from, wave.exec());
  start(wave, i, &touch, 1);
}

template <Datum DATUM>
void store(Wave& wave, const Instruction& i) {
  LdsTouch touch;
  Pointers to;
  locate(wave, i, static_cast<uint32_t>(i.offset), DATUM.bytes, true, touch, to);
  store_lanes<DATUM>(wave, registers_of(wave, i.src1), to, wave.exec());
  start(wave, i, &touch, 1);
}

// Two data, each with an offset in units of STRIDE times its size.
template <Datum DATUM, int STRIDE>
void load2(Wave& wave, const Instruction& i) {
  LdsTouch touches[2];
  Pointers from[2];
  constexpr uint32_t UNIT = DATUM.bytes * STRIDE;
  locate(wave, i, i.offset0 * UNIT, DATUM.bytes, false, touches[0], from[0]);
  locate(wave, i, i.offset1 * UNIT, DATUM.bytes, false, touches[1], from[1]);
  Lanes* to = registers_of(wave, i.dst);
  load_lanes<DATUM>(wave, to, from[0], wave.exec());
  load_lanes<DATUM>(wave, to + DATUM.registers(), from[1], wave.exec());
  start(wave, i, touches, 2);
}

template <Datum DATUM, int STRIDE>
void store2(Wave& wave, const Instruction& i) {
  LdsTouch touches[2];
  Pointers to[2];
  constexpr uint32_t UNIT = DATUM.bytes * STRIDE;
  locate(wave, i, i.offset0 * UNIT, DATUM.bytes, true, touches[0], to[0]);
  locate(wave, i, i.offset1 * UNIT, DATUM.bytes, true, touches[1], to[1]);
  store_lanes<DATUM>(wave, registers_of(wave, i.src1), to[0], wave.exec());
  store_lanes<DATUM>(wave, registers_of(wave, i.src2), to[1], wave.exec());
  start(wave, i, touches, 2);
}

// Exchanges between lanes. They touch no LDS, but count as it.

void finish_exchange(Wave& wave, const Instruction& i, const Lanes& values) {
  Lanes* to = registers_of(wave, i.dst);
  each_active(wave.exec(), [&](int lane) { to->lane[lane] = values.lane[lane]; });
  start(wave, i, nullptr, 0);
}

int addressed_lane(const Wave& wave, const Instruction& i, int lane) {
  const uint32_t address = wave.v[i.src0.index].lane[lane] + static_cast<uint32_t>(i.offset);
  return static_cast<int>(address >> 2) & (wave.lanes - 1);
}

// Each lane reads from another. Inactive ones give 0.
template <bool READS_INACTIVE>
void bpermute(Wave& wave, const Instruction& i) {
  const Lanes& from = *registers_of(wave, i.src1);
  Lanes values = {};
  each_lane(wave, [&](int lane) {
    const int source = addressed_lane(wave, i, lane);
    if (READS_INACTIVE || wave.is_active(source)) values.lane[lane] = from.lane[source];
  });
  finish_exchange(wave, i, values);
}

// Each lane writes to another; the highest stays. Lanes that nobody writes to get 0.
void permute(Wave& wave, const Instruction& i) {
  const Lanes& from = *registers_of(wave, i.src1);
  Lanes values = {};
  each_active(wave.exec(),
              [&](int lane) { values.lane[addressed_lane(wave, i, lane)] = from.lane[lane]; });
  finish_exchange(wave, i, values);
}

uint32_t reversed_5_bits(uint32_t value) {
  uint32_t result = 0;
  for (int k = 0; k < 5; ++k) result |= (value >> k & 1) << (4 - k);
  return result;
}

// The lane of 32 that ds_swizzle gives `lane`, by the 16 bits of its offset.
uint32_t swizzled(uint32_t offset, uint32_t lane) {
  if (offset >= 0xe000) {  // FFT
    const uint32_t mask = offset & 31;
    return reversed_5_bits(lane) >> std::popcount(mask) | (lane & mask);
  }
  if (offset >= 0xc000) {  // rotation: within groups, to the left or right
    const uint32_t mask = offset & 31;
    const uint32_t amount = offset >> 5 & 31, keep = lane & mask;
    const bool is_right = offset >> 10 & 1;
    return keep | ((is_right ? lane - amount : lane + amount) & 31 & ~mask);
  }
  if (offset & 0x8000) return (lane & ~3u) | (offset >> (2 * (lane & 3)) & 3);  // in fours
  return ((lane & (offset & 31)) | (offset >> 5 & 31)) ^ (offset >> 10 & 31);
}

void swizzle(Wave& wave, const Instruction& i) {
  const Lanes& from = *registers_of(wave, i.src0);
  Lanes values = {};
  each_lane(wave, [&](int lane) {
    const uint32_t in_half = swizzled(static_cast<uint32_t>(i.offset), lane & 31);
    const int source = (lane & 32) | static_cast<int>(in_half);
    if (wave.is_active(source)) values.lane[lane] = from.lane[source];
  });
  finish_exchange(wave, i, values);
}

// The table: names of data, the same on all chips

struct Named {
  const char* name;
  Datum datum;
};

constexpr Named LOADS[] = {
    {"b32", {4}},
    {"b64", {8}},
    {"b96", {12}},
    {"b128", {16}},
    {"u8", {1}},
    {"i8", {1, true}},
    {"u16", {2}},
    {"i16", {2, true}},
    {"u8_d16", {1, false, Half::low}},
    {"u8_d16_hi", {1, false, Half::high}},
    {"i8_d16", {1, true, Half::low}},
    {"i8_d16_hi", {1, true, Half::high}},
    {"u16_d16", {2, false, Half::low}},
    {"u16_d16_hi", {2, false, Half::high}},
};

constexpr Named STORES[] = {
    {"b8", {1}},
    {"b16", {2}},
    {"b8_d16_hi", {1, false, Half::high}},
    {"b16_d16_hi", {2, false, Half::high}},
    {"b32", {4}},
    {"b64", {8}},
    {"b96", {12}},
    {"b128", {16}},
};

class Table {
 public:
  Table() {
    add_all(std::make_index_sequence<std::size(LOADS)>(),
            std::make_index_sequence<std::size(STORES)>());
    add_pairs<Datum{4}>("b32");
    add_pairs<Datum{8}>("b64");
    entries_.push_back({"ds_bpermute_b32", bpermute<false>});
    entries_.push_back({"ds_bpermute_fi_b32", bpermute<true>});
    entries_.push_back({"ds_permute_b32", permute});
    entries_.push_back({"ds_swizzle_b32", swizzle});
  }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  // CDNA's name, RDNA's.
  void add(std::string cdna, std::string rdna, const char* datum, Handler handler) {
    static auto* names = new std::deque<std::string>;
    for (const std::string& prefix : {std::move(cdna), std::move(rdna)}) {
      entries_.push_back({names->emplace_back(prefix + datum).c_str(), handler});
    }
  }

  template <Datum DATUM>
  void add_pairs(const char* datum) {
    add("ds_read2_", "ds_load_2addr_", datum, load2<DATUM, 1>);
    add("ds_read2st64_", "ds_load_2addr_stride64_", datum, load2<DATUM, 64>);
    add("ds_write2_", "ds_store_2addr_", datum, store2<DATUM, 1>);
    add("ds_write2st64_", "ds_store_2addr_stride64_", datum, store2<DATUM, 64>);
  }

  template <size_t... LOAD, size_t... STORE>
  void add_all(std::index_sequence<LOAD...>, std::index_sequence<STORE...>) {
    (add("ds_read_", "ds_load_", LOADS[LOAD].name, load<LOADS[LOAD].datum>), ...);
    (add("ds_write_", "ds_store_", STORES[STORE].name, store<STORES[STORE].datum>), ...);
  }

  std::vector<Entry> entries_;
};

}  // namespace

extern const std::vector<Entry> LDS = Table().entries();

}  // namespace isa
