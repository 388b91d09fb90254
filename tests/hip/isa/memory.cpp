// Loads and stores of global memory, scratch and constants.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <utility>

#include "transfer.h"

namespace isa {

// Regions

namespace {

std::string hex(uint64_t value) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(value));
  return digits;
}

bool holds(const Region& region, uint64_t address, size_t size) {
  return address >= region.begin && size <= region.size &&
         address - region.begin <= region.size - size;
}

// How many bytes lie between the access and the region; 0 if they overlap.
uint64_t distance(const Region& region, uint64_t address, size_t size) {
  const uint64_t end = region.begin + region.size;
  if (address >= end) return address - end;
  return address + size <= region.begin ? region.begin - address - size : 0;
}

std::string miss_of(const Region& region, uint64_t address, size_t size) {
  const uint64_t end = region.begin + region.size;
  std::string how;
  if (address >= end) {
    how = std::to_string(address - end) + " bytes behind the end of";
  } else if (address < region.begin) {
    how = std::to_string(region.begin - address) + " bytes before the start of";
  } else {
    how = std::to_string(address + size - end) + " bytes over the end of";
  }
  return hex(address) + ", " + how + " [" + hex(region.begin) + ", " + hex(end) + ")";
}

}  // namespace

// Bindings may lie in the same allocation: then they are one region.
Memory::Memory(std::vector<Region> regions) {
  std::sort(regions.begin(), regions.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  for (const Region& region : regions) {
    if (region.size == 0) continue;
    if (regions_.empty() || regions_.back().begin + regions_.back().size <= region.begin) {
      regions_.push_back(region);
      continue;
    }
    Region& last = regions_.back();
    last.size = std::max<size_t>(last.size, region.begin + region.size - last.begin);
  }
}

const Region* Memory::region_of(uint64_t address) const {
  auto next = std::upper_bound(
      regions_.begin(), regions_.end(), address,
      [](uint64_t value, const Region& region) { return value < region.begin; });
  if (next == regions_.begin()) return nullptr;
  --next;
  return holds(*next, address, 1) ? &*next : nullptr;
}

char* Memory::find(uint64_t address, size_t size) const {
  const Region* region = region_of(address);
  if (!region || !holds(*region, address, size)) return nullptr;
  return region->data + (address - region->begin);
}

std::string Memory::text_of_miss(uint64_t address, size_t size) const {
  const auto nearest = std::min_element(
      regions_.begin(), regions_.end(), [&](const Region& a, const Region& b) {
        return distance(a, address, size) < distance(b, address, size);
      });
  if (nearest == regions_.end()) return hex(address) + ", and there is no memory";
  return miss_of(*nearest, address, size);
}

namespace {

const Memory& memory_of(const Wave& wave) { return *wave.group->launch->memory; }

bool checks_waits(const Wave& wave) { return wave.group->launch->settings.check_waits; }

void start(Wave& wave, Counter counter, const Instruction& i) {
  if (checks_waits(wave)) wave.waits.start(counter, i);
}

void start_flat(Wave& wave, Counter counter, const Instruction& i) {
  if (checks_waits(wave)) wave.waits.start_flat(counter, i);
}

// Addresses of all lanes

struct Addresses {
  uint64_t lane[MAX_LANES];
};

[[noreturn]] void fail_miss(int lane, size_t size, const std::string& where) {
  fail("lane " + std::to_string(lane) + " reaches " + std::to_string(size) + " bytes at " + where);
}

// False unless all active lanes' bytes lie in the region: then no difference is negative.
bool locate_in(const Wave& wave, const Region& region, const Addresses& addresses, size_t size,
               uint64_t lanes, Pointers& pointers) {
  if (region.size < size) return false;
  const uint64_t begin = region.begin, last = region.size - size;
  char* const data = region.data;
  each_lane(wave, [&pointers, &addresses, data, begin](int lane) {
    pointers.lane[lane] = data + (addresses.lane[lane] - begin);
  });
  const uint64_t outside = or_of(wave, lanes, [&addresses, begin, last](int lane) {
    const uint64_t offset = addresses.lane[lane] - begin;
    return offset | (last - offset);
  });
  return !(outside >> 63);
}

// Where the lanes' bytes are on the host. home: the region that they must lie in; nullptr for any.
void locate(const Wave& wave, const Addresses& addresses, size_t size, uint64_t lanes,
            const Region* home, Pointers& pointers) {
  if (!lanes) return;
  const Memory& memory = memory_of(wave);
  const Region* region =
      home ? home : memory.region_of(addresses.lane[std::countr_zero(lanes)]);
  if (region && locate_in(wave, *region, addresses, size, lanes, pointers)) return;
  each_active(lanes, [&](int lane) {
    const uint64_t address = addresses.lane[lane];
    if (!home && (!region || !holds(*region, address, size))) region = memory.region_of(address);
    if (!region || !holds(*region, address, size)) {
      fail_miss(lane, size,
                home ? miss_of(*home, address, size) : memory.text_of_miss(address, size));
    }
    pointers.lane[lane] = region->data + (address - region->begin);
  });
}

void add_offset(const Wave& wave, const Instruction& i, uint64_t base, Addresses& addresses) {
  const uint32_t* offsets = wave.v[i.src0.index].lane;
  base += static_cast<uint64_t>(static_cast<int64_t>(i.offset));
  each_lane(wave, [&](int lane) { addresses.lane[lane] = base + offsets[lane]; });
}

void add_address(const Wave& wave, const Instruction& i, Addresses& addresses) {
  const uint32_t *low = wave.v[i.src0.index].lane, *high = wave.v[i.src0.index + 1].lane;
  const auto offset = static_cast<uint64_t>(static_cast<int64_t>(i.offset));
  each_lane(wave, [&](int lane) {
    addresses.lane[lane] = (low[lane] | static_cast<uint64_t>(high[lane]) << 32) + offset;
  });
}

void expect_supported(const Instruction& i) {
  if (i.to_lds) fail("loads from memory to LDS are not interpreted");
}

// global_ and flat_: 64 bits in vector registers, or a scalar base and an offset of 32 bits.
void locate_global(const Wave& wave, const Instruction& i, size_t size, Pointers& pointers) {
  expect_supported(i);
  if (!i.src0.is_vector()) fail("an address without a vector register is not interpreted");
  Addresses addresses;
  const Region* home = nullptr;
  if (i.base.kind == Kind::none) {
    if (i.src0.count != 2) fail("an address of 32 bits without a base");
    add_address(wave, i, addresses);
  } else {
    if (i.src0.count != 1) fail("an address of 64 bits with a base is not interpreted");
    const uint64_t base = read_scalar64(wave, i.base);
    home = memory_of(wave).region_of(base);
    add_offset(wave, i, base, addresses);
  }
  locate(wave, addresses, size, wave.exec(), home, pointers);
}

// Scratch

// [offset, offset + size) of each lane's own bytes. offset is signed.
template <class Offset>
void locate_in_scratch(Wave& wave, size_t size, Offset offset_of, Pointers& pointers) {
  each_active(wave.exec(), [&](int lane) {
    const int64_t offset = offset_of(lane);
    if (offset < 0 || offset + static_cast<int64_t>(size) > wave.scratch_bytes) {
      fail("lane " + std::to_string(lane) + " reaches " + std::to_string(size) +
           " bytes of scratch at " + std::to_string(offset) + ", of " +
           std::to_string(wave.scratch_bytes));
    }
    pointers.lane[lane] = reinterpret_cast<char*>(wave.scratch.data()) +
                          static_cast<size_t>(lane) * wave.scratch_bytes + offset;
  });
}

void locate_scratch(Wave& wave, const Instruction& i, size_t size, Pointers& pointers) {
  expect_supported(i);
  const int32_t base =
      i.base.kind == Kind::none ? 0 : static_cast<int32_t>(read_scalar(wave, i.base));
  const uint32_t* offsets = i.src0.is_vector() ? wave.v[i.src0.index].lane : nullptr;
  locate_in_scratch(
      wave, size,
      [&](int lane) {
        const int64_t own = offsets ? static_cast<int32_t>(offsets[lane]) : 0;
        return own + base + i.offset;
      },
      pointers);
}

// Loads and stores

// Lanes 0 and 1 get each other's values, if a test asks for it.
void swap_lanes(Wave& wave, Lanes* registers, int count) {
  const int which = wave.group->launch->settings.sabotage.swap_lanes;
  if (!which || ++wave.num_vector_loads != which || (wave.exec() & 3) != 3) return;
  for (int k = 0; k < count; ++k) std::swap(registers[k].lane[0], registers[k].lane[1]);
}

template <Datum DATUM>
void finish_load(Wave& wave, const Instruction& i, const Pointers& from) {
  Lanes* to = registers_of(wave, i.dst);
  load_lanes<DATUM>(wave, to, from, wave.exec());
  swap_lanes(wave, to, DATUM.registers());
}

template <Datum DATUM>
void finish_store(Wave& wave, const Instruction& i, const Pointers& to) {
  store_lanes<DATUM>(wave, registers_of(wave, i.src1), to, wave.exec());
}

// What is the same in memories that have no bounds of their own. LOCATE finds the lanes' data.
template <Datum DATUM, auto LOCATE, auto START>
struct Plain {
  static void load(Wave& wave, const Instruction& i) {
    Pointers from;
    LOCATE(wave, i, DATUM.bytes, from);
    finish_load<DATUM>(wave, i, from);
    START(wave, Counter::load, i);
  }
  static void store(Wave& wave, const Instruction& i) {
    Pointers to;
    LOCATE(wave, i, DATUM.bytes, to);
    finish_store<DATUM>(wave, i, to);
    START(wave, Counter::store, i);
  }
};

template <Datum DATUM>
struct Global : Plain<DATUM, locate_global, start> {
  static constexpr const char* NAME = "global_";
};

// Addresses of LDS and scratch do not occur: they are in no region.
template <Datum DATUM>
struct Flat : Plain<DATUM, locate_global, start_flat> {
  static constexpr const char* NAME = "flat_";
};

template <Datum DATUM>
struct Scratch : Plain<DATUM, locate_scratch, start> {
  static constexpr const char* NAME = "scratch_";
};

// Buffers

// The four scalar registers that describe a buffer.
struct Resource {
  uint64_t base;
  uint32_t num_records;  // bytes, as there is no stride
  bool is_bounded;
  bool is_scratch;
};

uint32_t bits_of(uint32_t value, int low, int count) { return value >> low & ((1u << count) - 1); }

Resource resource_of(const Wave& wave, const Operand& operand) {
  uint32_t words[4];
  for (int k = 0; k < 4; ++k) words[k] = read_scalar(wave, operand, k);
  Resource resource = {.base = words[0] | static_cast<uint64_t>(words[1] & 0xffff) << 32,
                       .num_records = words[2],
                       .is_bounded = true,
                       .is_scratch = false};
  if (resource.base == SCRATCH_BASE) {
    resource.is_scratch = true;
    return resource;
  }
  if (words[1] >> 16) fail("a buffer with a stride or swizzles is not interpreted");
  if (bits_of(words[3], 23, 1)) fail("a buffer with add_tid is not interpreted");
  if (bits_of(words[3], 30, 2)) fail("no resource of a buffer");
  if (wave.arch == Arch::cdna) return resource;
  constexpr uint32_t UNLESS_EMPTY = 2, RAW = 3;
  const uint32_t oob_select = bits_of(words[3], 28, 2);
  if (oob_select != UNLESS_EMPTY && oob_select != RAW) {
    fail("oob_select " + std::to_string(oob_select) + " of a buffer is not interpreted");
  }
  resource.is_bounded = oob_select == RAW || resource.num_records == 0;
  return resource;
}

// An access to a buffer: lane's address is base + soffset + offset.
struct BufferAccess {
  Resource resource;
  uint32_t soffset = 0;
  Addresses offsets;  // in bytes; of 33 bits, a sum that wraps around is out of range
  Addresses addresses;
};

BufferAccess access_of(const Wave& wave, const Instruction& i) {
  expect_supported(i);
  if (i.has_idxen) fail("idxen is not interpreted");
  if (i.offset < 0) fail("a negative offset in a buffer is not interpreted");
  BufferAccess access;
  access.resource = resource_of(wave, i.base);
  if (i.soffset.kind != Kind::none) access.soffset = read_scalar(wave, i.soffset);
  const auto offset = static_cast<uint64_t>(i.offset);
  const uint64_t base = access.resource.base + access.soffset;
  const uint32_t* own = i.has_offen ? wave.v[i.src0.index].lane : nullptr;
  each_lane(wave, [&](int lane) {
    access.offsets.lane[lane] = offset + (own ? own[lane] : 0);
    access.addresses.lane[lane] = base + access.offsets.lane[lane];
  });
  return access;
}

// Whether the first bytes of `size` bytes at the offset lie in the buffer. What documents do not
// agree on ends the launch: whether soffset counts (LLVM's intrinsics say it does not, AMD's
// documents take it from num_records), and what is in range where only a part is.
bool is_in_range(const BufferAccess& access, uint64_t offset, size_t size, int lane) {
  const uint64_t end = access.resource.num_records;
  const bool is_in = offset + size <= end;
  if (is_in != (offset + access.soffset + size <= end)) {
    fail("lane " + std::to_string(lane) + ": soffset decides whether offset " +
         std::to_string(offset) + " is in the buffer of " + std::to_string(end) + " bytes");
  }
  if (!is_in && offset < end) {
    fail("lane " + std::to_string(lane) + ": " + std::to_string(size) + " bytes at offset " +
         std::to_string(offset) + " lie across the end of the buffer of " + std::to_string(end) +
         " bytes");
  }
  return is_in;
}

bool is_all_in_range(const Wave& wave, const BufferAccess& access, size_t size) {
  if (!access.resource.is_bounded || !wave.exec()) return true;
  const uint64_t last = uint64_t{access.resource.num_records} - size - access.soffset;
  const uint64_t outside = or_of(
      wave, wave.exec(), [&access, last](int lane) { return last - access.offsets.lane[lane]; });
  return !((last | outside) >> 63);
}

// Lanes whose part [offset, offset + size) is in range.
uint64_t lanes_in_range(const Wave& wave, const BufferAccess& access, uint64_t offset,
                        size_t size) {
  uint64_t lanes = 0;
  each_active(wave.exec(), [&](int lane) {
    const bool is_in = is_in_range(access, access.offsets.lane[lane] + offset, size, lane);
    lanes |= static_cast<uint64_t>(is_in) << lane;
  });
  return lanes;
}

void locate_buffer(const Wave& wave, const BufferAccess& access, size_t size, uint64_t lanes,
                   Pointers& pointers) {
  const Region* home = memory_of(wave).region_of(access.resource.base);
  locate(wave, access.addresses, size, lanes, home, pointers);
}

// Registers of their own are checked one by one on gfx9. On RDNA documents speak of the offset and
// all of its payload: what lies there across the end is left undecided.
template <Datum DATUM>
constexpr Datum part_of() {
  return DATUM.bytes > 4 ? Datum{4} : DATUM;
}

// Calls body(part, lanes in range, pointers to them) for each register of the data.
template <Datum DATUM, class Body>
void each_part(const Wave& wave, BufferAccess& access, Body body) {
  constexpr Datum PART = part_of<DATUM>();
  if (wave.arch != Arch::cdna) lanes_in_range(wave, access, 0, DATUM.bytes);
  for (int part = 0; part < DATUM.registers(); ++part) {
    const uint64_t lanes = lanes_in_range(wave, access, 4 * part, PART.bytes);
    Pointers pointers;
    locate_buffer(wave, access, PART.bytes, lanes, pointers);
    body(part, lanes, pointers);
    for (uint64_t& address : access.addresses.lane) address += 4;
  }
}

// Lanes' bytes are interleaved there: soffset counts those of all lanes, the rest a lane's own.
void locate_buffer_scratch(Wave& wave, const BufferAccess& access, size_t size,
                           Pointers& pointers) {
  const uint32_t start = access.soffset / wave.lanes;
  if (access.soffset % wave.lanes) fail("soffset divides the scratch of lanes unevenly");
  locate_in_scratch(
      wave, size,
      [&](int lane) { return static_cast<int64_t>(access.offsets.lane[lane]) + start; }, pointers);
}

template <Datum DATUM>
struct Buffer {
  static constexpr const char* NAME = "buffer_";

  static void load(Wave& wave, const Instruction& i) {
    BufferAccess access = access_of(wave, i);
    Pointers from;
    if (access.resource.is_scratch) {
      locate_buffer_scratch(wave, access, DATUM.bytes, from);
      finish_load<DATUM>(wave, i, from);
    } else if (is_all_in_range(wave, access, DATUM.bytes)) {
      locate_buffer(wave, access, DATUM.bytes, wave.exec(), from);
      finish_load<DATUM>(wave, i, from);
    } else {
      load_in_range(wave, i, access);
    }
    start(wave, Counter::load, i);
  }

  static void store(Wave& wave, const Instruction& i) {
    BufferAccess access = access_of(wave, i);
    Pointers to;
    if (access.resource.is_scratch) {
      locate_buffer_scratch(wave, access, DATUM.bytes, to);
      finish_store<DATUM>(wave, i, to);
    } else if (is_all_in_range(wave, access, DATUM.bytes)) {
      locate_buffer(wave, access, DATUM.bytes, wave.exec(), to);
      finish_store<DATUM>(wave, i, to);
    } else {
      store_in_range(wave, i, access);
    }
    start(wave, Counter::store, i);
  }

 private:
  // Out of range, loads give 0.
  static void load_in_range(Wave& wave, const Instruction& i, BufferAccess& access) {
    Lanes* to = registers_of(wave, i.dst);
    each_part<DATUM>(wave, access, [&](int part, uint64_t lanes, Pointers& from) {
      static char zeros[4] = {};
      each_active(wave.exec() & ~lanes, [&](int lane) { from.lane[lane] = zeros; });
      load_lanes<part_of<DATUM>()>(wave, to + part, from, wave.exec());
    });
    swap_lanes(wave, to, DATUM.registers());
  }

  // Out of range, stores do nothing.
  static void store_in_range(Wave& wave, const Instruction& i, BufferAccess& access) {
    const Lanes* from = registers_of(wave, i.src1);
    each_part<DATUM>(wave, access, [&](int part, uint64_t lanes, const Pointers& to) {
      store_lanes<part_of<DATUM>()>(wave, from + part, to, lanes);
    });
  }
};

// Scalar loads

const char* locate_scalar(const Wave& wave, uint64_t base, uint64_t offset, size_t size) {
  const uint64_t address = base + offset;
  const Memory& memory = memory_of(wave);
  const Region* home = memory.region_of(base);
  // Hardware would clear the lowest bits, which no compiler means.
  if (address % std::min<size_t>(size, 4)) {
    fail("a scalar load at " + hex(address) + " is not aligned");
  }
  if (home && !holds(*home, address, size)) {
    fail("a scalar load reaches " + std::to_string(size) + " bytes at " +
         miss_of(*home, address, size));
  }
  const char* from = memory.find(address, size);
  if (!from) {
    fail("a scalar load reaches " + std::to_string(size) + " bytes at " +
         memory.text_of_miss(address, size));
  }
  return from;
}

uint64_t scalar_offset(const Wave& wave, const Instruction& i) {
  const uint32_t soffset = i.soffset.kind == Kind::none ? 0 : read_scalar(wave, i.soffset);
  return static_cast<uint64_t>(static_cast<int64_t>(i.offset)) + soffset;
}

template <Datum DATUM>
void finish_scalar(Wave& wave, const Instruction& i, const char* from) {
  if constexpr (DATUM.bytes < 4) {
    write_scalar(wave, i.dst, narrow_value<DATUM>(from, 0));
  } else {
    for (int k = 0; k < DATUM.registers(); ++k) {
      uint32_t value;
      std::memcpy(&value, from + 4 * k, 4);
      write_scalar(wave, i.dst, value, k);
    }
  }
  start(wave, Counter::scalar, i);
}

template <Datum DATUM>
void scalar_load(Wave& wave, const Instruction& i) {
  const uint64_t base = read_scalar64(wave, i.base);
  finish_scalar<DATUM>(wave, i, locate_scalar(wave, base, scalar_offset(wave, i), DATUM.bytes));
}

template <Datum DATUM>
void scalar_buffer_load(Wave& wave, const Instruction& i) {
  const Resource resource = resource_of(wave, i.base);
  const uint64_t offset = scalar_offset(wave, i);
  if (resource.is_scratch) fail("a scalar load from scratch is not interpreted");
  if (resource.is_bounded && offset + DATUM.bytes > resource.num_records) {
    fail("a scalar load beyond the end of its buffer is not interpreted");
  }
  finish_scalar<DATUM>(wave, i, locate_scalar(wave, resource.base, offset, DATUM.bytes));
}

// Caches

void nothing(Wave&, const Instruction&) {}

// gfx12 counts these like the loads and stores that they order.
template <Counter COUNTER>
void cache_control(Wave& wave, const Instruction&) {
  wave.waits.count(COUNTER);
}

// The table: names of data on CDNA and RDNA

struct Named {
  const char *cdna, *rdna;
  Datum datum;
};

constexpr Named LOADS[] = {
    {"ubyte", "u8", {1}},
    {"sbyte", "i8", {1, true}},
    {"ushort", "u16", {2}},
    {"sshort", "i16", {2, true}},
    {"dword", "b32", {4}},
    {"dwordx2", "b64", {8}},
    {"dwordx3", "b96", {12}},
    {"dwordx4", "b128", {16}},
    {"ubyte_d16", "d16_u8", {1, false, Half::low}},
    {"ubyte_d16_hi", "d16_hi_u8", {1, false, Half::high}},
    {"sbyte_d16", "d16_i8", {1, true, Half::low}},
    {"sbyte_d16_hi", "d16_hi_i8", {1, true, Half::high}},
    {"short_d16", "d16_b16", {2, false, Half::low}},
    {"short_d16_hi", "d16_hi_b16", {2, false, Half::high}},
};

constexpr Named STORES[] = {
    {"byte", "b8", {1}},
    {"byte_d16_hi", "d16_hi_b8", {1, false, Half::high}},
    {"short", "b16", {2}},
    {"short_d16_hi", "d16_hi_b16", {2, false, Half::high}},
    {"dword", "b32", {4}},
    {"dwordx2", "b64", {8}},
    {"dwordx3", "b96", {12}},
    {"dwordx4", "b128", {16}},
};

constexpr Named SCALARS[] = {
    {nullptr, "u8", {1}},          {nullptr, "i8", {1, true}},    {nullptr, "u16", {2}},
    {nullptr, "i16", {2, true}},   {"dword", "b32", {4}},         {"dwordx2", "b64", {8}},
    {nullptr, "b96", {12}},        {"dwordx4", "b128", {16}},     {"dwordx8", "b256", {32}},
    {"dwordx16", "b512", {64}},
};

class Table {
 public:
  Table() {
    add_all(std::make_index_sequence<std::size(LOADS)>(),
            std::make_index_sequence<std::size(STORES)>(),
            std::make_index_sequence<std::size(SCALARS)>());
    for (const char* name :
         {"s_dcache_inv", "s_dcache_wb", "s_dcache_inv_vol", "s_dcache_wb_vol", "s_gl1_inv",
          "s_prefetch_inst", "s_prefetch_inst_pc_rel", "s_prefetch_data", "s_prefetch_data_pc_rel",
          "s_buffer_prefetch_data", "buffer_gl0_inv", "buffer_gl1_inv", "buffer_wbl2", "buffer_inv",
          "buffer_wbinvl1", "buffer_wbinvl1_vol"}) {
      entries_.push_back({name, nothing});
    }
    entries_.push_back({"global_inv", cache_control<Counter::load>});
    entries_.push_back({"global_wb", cache_control<Counter::store>});
    entries_.push_back({"global_wbinv", cache_control<Counter::store>});
  }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  void add(const std::string& prefix, const Named& named, Handler handler) {
    static auto* names = new std::deque<std::string>;
    for (const char* name : {named.cdna, named.rdna}) {
      if (name) entries_.push_back({names->emplace_back(prefix + name).c_str(), handler});
    }
  }

  template <template <Datum> class Space, size_t K>
  void add_load() {
    using Access = Space<LOADS[K].datum>;
    add(Access::NAME + std::string("load_"), LOADS[K], Access::load);
  }

  template <template <Datum> class Space, size_t K>
  void add_store() {
    using Access = Space<STORES[K].datum>;
    add(Access::NAME + std::string("store_"), STORES[K], Access::store);
  }

  template <size_t... LOAD, size_t... STORE, size_t... SCALAR_LOAD>
  void add_all(std::index_sequence<LOAD...>, std::index_sequence<STORE...>,
               std::index_sequence<SCALAR_LOAD...>) {
    (add_load<Global, LOAD>(), ...);
    (add_load<Flat, LOAD>(), ...);
    (add_load<Scratch, LOAD>(), ...);
    (add_load<Buffer, LOAD>(), ...);
    (add_store<Global, STORE>(), ...);
    (add_store<Flat, STORE>(), ...);
    (add_store<Scratch, STORE>(), ...);
    (add_store<Buffer, STORE>(), ...);
    (add("s_load_", SCALARS[SCALAR_LOAD], scalar_load<SCALARS[SCALAR_LOAD].datum>), ...);
    (add("s_buffer_load_", SCALARS[SCALAR_LOAD],
         scalar_buffer_load<SCALARS[SCALAR_LOAD].datum>), ...);
  }

  std::vector<Entry> entries_;
};

}  // namespace

extern const std::vector<Entry> MEMORY = Table().entries();

}  // namespace isa
