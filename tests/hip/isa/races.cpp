#include "races.h"

#include <algorithm>
#include <bit>

#include "instruction.h"

namespace isa {

namespace {

std::string wave_text(uint32_t wave, uint32_t many) {
  return wave == many ? "several waves" : "wave " + std::to_string(wave);
}

}  // namespace

void Races::reset(size_t lds_bytes) {
  epoch_ = 1;
  words_.assign((lds_bytes + 3) / 4, 0);
  bytes_.resize(4 * words_.size());
}

void Races::barrier() {
  if (++epoch_ <= 0xffff) return;
  epoch_ = 1;
  std::fill(words_.begin(), words_.end(), 0);
}

// Gives each of the four bytes what their word's record says, unless they have their own already.
void Races::split(uint32_t word) {
  Record& record = words_[word];
  const bool is_current = record >> 16 == epoch_;
  if (is_current && (record & 0xff00) == SPLIT) return;
  std::fill_n(bytes_.begin() + 4 * word, 4, is_current ? record : epoch_ << 16 | UNTOUCHED);
  record = epoch_ << 16 | SPLIT | NOBODY;
}

// Where the record cannot say that all is well: somebody else has touched it, or it is split.
template <bool IS_WRITE>
bool Races::has_others(Record record, uint32_t epoch, uint32_t wave) {
  const uint32_t writer = record >> 8 & 0xff, reader = record & 0xff;
  const bool is_written = (writer != NOBODY) & (writer != wave);
  const bool is_read = IS_WRITE & (reader != NOBODY) & (reader != wave);
  return (record >> 16 == epoch) & (is_written | is_read);
}

// The record after a touch.
template <bool IS_WRITE>
Races::Record Races::next(Record record, uint32_t epoch, uint32_t wave) {
  const Record now = record >> 16 == epoch ? record : epoch << 16 | UNTOUCHED;
  if constexpr (IS_WRITE) return (now & ~0xff00u) | wave << 8;
  // One choice after the other: a loop with both in one condition is not vectorized.
  const uint32_t reader = (now & 0xff) == NOBODY ? wave : now & 0xff;
  return (now & ~0xffu) | (reader == wave ? wave : MANY);
}

template <bool IS_WRITE>
void Races::touch_bytes(uint32_t begin, uint32_t end, uint32_t wave) {
  for (uint32_t byte = begin; byte < end; ++byte) {
    split(byte / 4);
    Record& record = bytes_[byte];
    if (!has_others<IS_WRITE>(record, epoch_, wave)) {
      record = next<IS_WRITE>(record, epoch_, wave);
      continue;
    }
    const uint32_t writer = record >> 8 & 0xff, reader = record & 0xff;
    const bool is_after_write = writer != NOBODY && writer != wave;
    throw Fault("byte " + std::to_string(byte) + " of LDS is " +
                (IS_WRITE ? "written" : "read") + " by wave " + std::to_string(wave) + " and " +
                (is_after_write ? "written" : "read") + " by " +
                wave_text(is_after_write ? writer : reader, MANY) + ", with no barrier between");
  }
}

// COUNT words; a constant, so that the loops are vectorized.
template <bool IS_WRITE, uint32_t COUNT>
void Races::touch_words(uint32_t first, uint32_t wave) {
  const uint32_t epoch = epoch_;
  Record* records = words_.data() + first;
  uint32_t is_any = 0;
  for (uint32_t k = 0; k < COUNT; ++k) is_any |= has_others<IS_WRITE>(records[k], epoch, wave);
  if (is_any) return touch_bytes<IS_WRITE>(4 * first, 4 * (first + COUNT), wave);
  for (uint32_t k = 0; k < COUNT; ++k) records[k] = next<IS_WRITE>(records[k], epoch, wave);
}

template <bool IS_WRITE>
void Races::touch(uint32_t address, uint32_t size, uint32_t wave) {
  if ((address | size) & 3) {
    touch_bytes<IS_WRITE>(address, address + size, wave);
    return;
  }
  const uint32_t last = (address + size) / 4;
  uint32_t word = address / 4;
  for (; last - word >= 32; word += 32) touch_words<IS_WRITE, 32>(word, wave);
  for (; word < last; ++word) touch_words<IS_WRITE, 1>(word, wave);
}

void Races::read(uint32_t address, uint32_t size, int wave) {
  touch<false>(address, size, static_cast<uint32_t>(wave));
}

void Races::write(uint32_t address, uint32_t size, int wave) {
  touch<true>(address, size, static_cast<uint32_t>(wave));
}

template <bool IS_WRITE, uint32_t SIZE>
void Races::touch_lanes(const LdsTouch& touch, uint32_t wave) {
  for (uint64_t lanes = touch.lanes; lanes; lanes &= lanes - 1) {
    const uint32_t address = touch.addresses[std::countr_zero(lanes)];
    if (SIZE % 4 || address % 4) {
      touch_bytes<IS_WRITE>(address, address + SIZE, wave);
    } else {
      touch_words<IS_WRITE, SIZE / 4>(address / 4, wave);
    }
  }
}

template <bool IS_WRITE>
void Races::touch_all(const LdsTouch& touch, uint32_t wave) {
  switch (touch.size) {
    case 1:
      return touch_lanes<IS_WRITE, 1>(touch, wave);
    case 2:
      return touch_lanes<IS_WRITE, 2>(touch, wave);
    case 4:
      return touch_lanes<IS_WRITE, 4>(touch, wave);
    case 8:
      return touch_lanes<IS_WRITE, 8>(touch, wave);
    case 12:
      return touch_lanes<IS_WRITE, 12>(touch, wave);
    default:
      return touch_lanes<IS_WRITE, 16>(touch, wave);
  }
}

namespace {

// Whether the lanes touch one block without gaps, from the first one's address on.
bool is_block(const LdsTouch& touch) {
  if (touch.lanes != ~uint64_t{0} && touch.lanes != 0xffffffff) return false;
  uint32_t difference[2] = {touch.addresses[0] & 3, 0};
  for (int half = 0; half < 2; ++half) {
    for (int lane = 32 * half; lane < 32 * half + 32; ++lane) {
      difference[half] |= touch.addresses[lane] - touch.addresses[0] - touch.size * lane;
    }
  }
  return difference[0] == 0 && (touch.lanes == 0xffffffff || difference[1] == 0);
}

}  // namespace

void Races::touch(const LdsTouch& touch, int wave) {
  const auto number = static_cast<uint32_t>(wave);
  if (is_block(touch)) {
    const uint32_t size = touch.size * std::popcount(touch.lanes);
    return touch.is_write ? write(touch.addresses[0], size, wave)
                          : read(touch.addresses[0], size, wave);
  }
  return touch.is_write ? touch_all<true>(touch, number) : touch_all<false>(touch, number);
}

}  // namespace isa

// What tests call, for 1024 bytes of LDS. ops: rows (kind, address, size, wave); kinds are 0 read,
// 1 write, 2 barrier. The first that races; -1 if none does.
extern "C" __attribute__((visibility("default"))) int sf_isa_races(const int* ops, int n) {
  isa::Races races;
  races.reset(1 << 10);
  for (int k = 0; k < n; ++k) {
    const int* op = ops + 4 * k;
    try {
      if (op[0] == 2) {
        races.barrier();
      } else if (op[0] == 1) {
        races.write(static_cast<uint32_t>(op[1]), static_cast<uint32_t>(op[2]), op[3]);
      } else {
        races.read(static_cast<uint32_t>(op[1]), static_cast<uint32_t>(op[2]), op[3]);
      }
    } catch (const isa::Fault&) {
      return k;
    }
  }
  return -1;
}
