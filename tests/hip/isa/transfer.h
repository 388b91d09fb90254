// Data on its way between memory and the registers of a wave's lanes, whatever the memory is.
#pragma once

#include <bit>
#include <utility>

#include "lanes.h"

namespace isa {

// Which half of its register a datum of at most 16 bits is in; none: it fills the register.
enum class Half : uint8_t { none, low, high };

// What one lane transfers.
struct Datum {
  uint8_t bytes;
  bool is_signed = false;
  Half half = Half::none;
  constexpr int registers() const { return bytes < 4 ? 1 : bytes / 4; }
};

// Where the lanes' data are; of active lanes only.
struct Pointers {
  char* lane[MAX_LANES];
};

template <class Body>
void each_active(uint64_t lanes, Body body) {
  for (; lanes; lanes &= lanes - 1) body(std::countr_zero(lanes));
}

inline uint64_t all_lanes(const Wave& wave) { return ~uint64_t{0} >> (MAX_LANES - wave.lanes); }

// All lanes' terms together, by OR. LANES is a constant so that the loop is vectorized.
template <int LANES, class Term>
auto or_of_all(Term term) {
  decltype(term(0)) bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= term(lane);
  return bits;
}

// The terms of active lanes together.
template <class Term>
auto or_of(const Wave& wave, uint64_t lanes, Term term) {
  if (lanes == all_lanes(wave)) {
    return wave.lanes == 32 ? or_of_all<32>(term) : or_of_all<64>(term);
  }
  decltype(term(0)) bits = 0;
  each_active(lanes, [&](int lane) { bits |= term(lane); });
  return bits;
}

// Whether the data of all lanes follow each other without gaps.
template <uintptr_t BYTES>
bool is_block(const Wave& wave, const Pointers& at, uint64_t lanes) {
  if (lanes != all_lanes(wave)) return false;
  const auto first = reinterpret_cast<uintptr_t>(at.lane[0]);
  return !or_of(wave, lanes, [&](int lane) {
    return reinterpret_cast<uintptr_t>(at.lane[lane]) - first - lane * BYTES;
  });
}

template <Datum DATUM>
uint32_t narrow_value(const char* from, uint32_t old) {
  uint32_t value;
  if constexpr (DATUM.bytes == 1) {
    const auto byte = static_cast<uint8_t>(*from);
    value = DATUM.is_signed ? static_cast<uint32_t>(static_cast<int8_t>(byte)) : byte;
  } else {
    uint16_t half;
    std::memcpy(&half, from, 2);
    value = DATUM.is_signed ? static_cast<uint32_t>(static_cast<int16_t>(half)) : half;
  }
  if constexpr (DATUM.half == Half::low) return (old & 0xffff0000) | (value & 0xffff);
  if constexpr (DATUM.half == Half::high) return (old & 0xffff) | value << 16;
  return value;
}

// A loop that is unrolled.
template <Datum DATUM, class Body>
void each_register(Body body) {
  [&]<int... K>(std::integer_sequence<int, K...>) {
    (body(K), ...);
  }(std::make_integer_sequence<int, DATUM.registers()>());
}

// to: the first register.
template <Datum DATUM>
void load_lane(Lanes* to, int lane, const char* from) {
  if constexpr (DATUM.bytes < 4) {
    to->lane[lane] = narrow_value<DATUM>(from, to->lane[lane]);
  } else {
    each_register<DATUM>([&](int k) { std::memcpy(&to[k].lane[lane], from + 4 * k, 4); });
  }
}

template <Datum DATUM>
void store_lane(const Lanes* from, int lane, char* to) {
  if constexpr (DATUM.bytes < 4) {
    const uint32_t value = from->lane[lane] >> (DATUM.half == Half::high ? 16 : 0);
    std::memcpy(to, &value, DATUM.bytes);
  } else {
    each_register<DATUM>([&](int k) { std::memcpy(to + 4 * k, &from[k].lane[lane], 4); });
  }
}

template <Datum DATUM>
void load_lanes(const Wave& wave, Lanes* to, const Pointers& from, uint64_t lanes) {
  if (DATUM.bytes == 4 && is_block<4>(wave, from, lanes)) {
    std::memcpy(to, from.lane[0], 4 * static_cast<size_t>(wave.lanes));
    return;
  }
  each_active(lanes, [&](int lane) { load_lane<DATUM>(to, lane, from.lane[lane]); });
}

// Where lanes store to the same place, the last of them stays.
template <Datum DATUM>
void store_lanes(const Wave& wave, const Lanes* from, const Pointers& to, uint64_t lanes) {
  if (DATUM.bytes == 4 && is_block<4>(wave, to, lanes)) {
    std::memcpy(to.lane[0], from, 4 * static_cast<size_t>(wave.lanes));
    return;
  }
  each_active(lanes, [&](int lane) { store_lane<DATUM>(from, lane, to.lane[lane]); });
}

inline Lanes* registers_of(Wave& wave, const Operand& operand) {
  if (!operand.is_vector()) fail("the register of the data is missing");
  return wave.v + operand.index;
}

}  // namespace isa
