// Two waves that touch one byte of LDS with no barrier between, one of them writing, race.
//
// An LDS operation that is still unfinished when its wave comes to a barrier counts behind the
// barrier as well (see `remember_late_lds`).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "waits.h"

namespace isa {

class Races {
 public:
  void reset(size_t lds_bytes);
  // Raise Fault on a race. wave: its number in the workgroup, below MANY. All bytes lie in LDS.
  void read(uint32_t address, uint32_t size, int wave);
  void write(uint32_t address, uint32_t size, int wave);
  void touch(const LdsTouch& touch, int wave);  // what all lanes of an instruction do
  void barrier();  // all waves of the workgroup have come to it

 private:
  // Who has touched a byte or four since the last barrier: epoch << 16 | writer << 8 | reader. What
  // an earlier epoch says is void. A reader is a wave, NOBODY, or MANY: two or more waves.
  using Record = uint32_t;
  static constexpr uint32_t NOBODY = 0xff, MANY = 0xfe;
  static constexpr Record UNTOUCHED = NOBODY << 8 | NOBODY;
  static constexpr Record SPLIT = MANY << 8;  // the four bytes have records of their own

  template <bool IS_WRITE>
  static bool has_others(Record record, uint32_t epoch, uint32_t wave);
  template <bool IS_WRITE>
  static Record next(Record record, uint32_t epoch, uint32_t wave);
  template <bool IS_WRITE>
  void touch(uint32_t address, uint32_t size, uint32_t wave);
  template <bool IS_WRITE, uint32_t COUNT>
  void touch_words(uint32_t first, uint32_t wave);
  template <bool IS_WRITE>
  void touch_bytes(uint32_t begin, uint32_t end, uint32_t wave);
  template <bool IS_WRITE, uint32_t SIZE>
  void touch_lanes(const LdsTouch& touch, uint32_t wave);
  template <bool IS_WRITE>
  void touch_all(const LdsTouch& touch, uint32_t wave);
  void split(uint32_t word);

  std::vector<Record> words_, bytes_;
  uint32_t epoch_ = 1;  // 16 bits
};

}  // namespace isa
