// An ELF file's symbols, descriptors (64 bytes each, as "AMDGPU usage" of LLVM documents them), and
// the metadata in its note, which is a MessagePack.
#include "code_object.h"

#include <elf.h>

#include <bit>
#include <cstring>
#include <memory>
#include <utility>

namespace isa {

namespace {

template <class T>
T read(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// MessagePack: as much of it as metadata has.

struct Value {
  std::string text;
  uint64_t number = 0;
  std::vector<Value> items;
  std::map<std::string, Value> fields;
};

class Unpacker {
 public:
  explicit Unpacker(const uint8_t* bytes) : next_(bytes) {}

  Value value() {
    const uint8_t kind = *next_++;
    if (kind < 0x80) return number(kind);
    if (kind < 0x90) return map(kind & 15);
    if (kind < 0xa0) return array(kind & 15);
    if (kind < 0xc0) return text(kind & 31);
    switch (kind) {
      case 0xc2:
      case 0xc3:
        return number(kind & 1);
      case 0xcc:
        return number(big<1>());
      case 0xcd:
        return number(big<2>());
      case 0xce:
        return number(big<4>());
      case 0xcf:
        return number(big<8>());
      case 0xd9:
        return text(big<1>());
      case 0xda:
        return text(big<2>());
      case 0xdc:
        return array(big<2>());
      case 0xde:
        return map(big<2>());
    }
    throw Fault("metadata of a code object: kind " + std::to_string(kind) + " is not known");
  }

 private:
  template <int BYTES>
  uint64_t big() {
    uint64_t value = 0;
    for (int k = 0; k < BYTES; ++k) value = value << 8 | *next_++;
    return value;
  }
  static Value number(uint64_t number) {
    Value value;
    value.number = number;
    return value;
  }
  Value text(size_t size) {
    Value value;
    value.text.assign(reinterpret_cast<const char*>(next_), size);
    next_ += size;
    return value;
  }
  Value array(size_t size) {
    Value value;
    for (size_t k = 0; k < size; ++k) value.items.push_back(this->value());
    return value;
  }
  Value map(size_t size) {
    Value value;
    for (size_t k = 0; k < size; ++k) {
      std::string key = this->value().text;
      value.fields[std::move(key)] = this->value();
    }
    return value;
  }

  const uint8_t* next_;
};

constexpr uint32_t METADATA_NOTE = 32;  // NT_AMDGPU_METADATA

// The arguments of each kernel that a note section tells of.
std::map<std::string, std::vector<Argument>> read_arguments(const uint8_t* note) {
  std::map<std::string, std::vector<Argument>> arguments;
  const auto header = read<Elf64_Nhdr>(note);
  if (header.n_type != METADATA_NOTE) return arguments;
  const size_t name_bytes = (header.n_namesz + 3) / 4 * 4;
  Value metadata = Unpacker(note + sizeof header + name_bytes).value();
  for (Value& kernel : metadata.fields["amdhsa.kernels"].items) {
    std::vector<Argument>& list = arguments[kernel.fields[".name"].text];
    for (Value& argument : kernel.fields[".args"].items) {
      list.push_back({argument.fields[".offset"].number, argument.fields[".size"].number,
                      argument.fields[".value_kind"].text});
    }
  }
  return arguments;
}

struct Symbol {
  std::string name;
  uint64_t address, size;
  const uint8_t* data;
};

std::vector<Symbol> read_symbols(const uint8_t* image, const Elf64_Shdr* sections, int table) {
  std::vector<Symbol> symbols;
  const uint8_t* names = image + sections[sections[table].sh_link].sh_offset;
  for (size_t at = 0; at < sections[table].sh_size; at += sizeof(Elf64_Sym)) {
    const auto symbol = read<Elf64_Sym>(image + sections[table].sh_offset + at);
    if (symbol.st_shndx == SHN_UNDEF) continue;
    const Elf64_Shdr& section = sections[symbol.st_shndx];
    symbols.push_back({reinterpret_cast<const char*>(names) + symbol.st_name, symbol.st_value,
                       symbol.st_size,
                       image + section.sh_offset + symbol.st_value - section.sh_addr});
  }
  return symbols;
}

void read_descriptor(const Symbol& symbol, Kernel* kernel) {
  const uint8_t* bytes = symbol.data;
  kernel->lds_bytes = read<uint32_t>(bytes);
  kernel->scratch_bytes = read<uint32_t>(bytes + 4);
  kernel->argument_bytes = read<uint32_t>(bytes + 8);
  kernel->address = symbol.address + read<int64_t>(bytes + 16);
  kernel->rsrc3 = read<uint32_t>(bytes + 44);
  kernel->rsrc1 = read<uint32_t>(bytes + 48);
  kernel->rsrc2 = read<uint32_t>(bytes + 52);
  kernel->properties = read<uint16_t>(bytes + 56);
  kernel->preload = read<uint16_t>(bytes + 58);
}

}  // namespace

std::map<std::string, Kernel> read_code_object(const uint8_t* image) {
  const auto header = read<Elf64_Ehdr>(image);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), image + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
  std::map<std::string, Kernel> kernels;
  std::vector<Symbol> symbols;
  std::map<std::string, std::vector<Argument>> arguments;
  for (int k = 0; k < header.e_shnum; ++k) {
    if (sections[k].sh_type == SHT_DYNSYM) symbols = read_symbols(image, sections.data(), k);
    if (sections[k].sh_type == SHT_NOTE) arguments = read_arguments(image + sections[k].sh_offset);
  }
  for (const Symbol& symbol : symbols) {
    if (!symbol.name.ends_with(".kd")) continue;
    Kernel kernel;
    kernel.name = symbol.name.substr(0, symbol.name.size() - 3);
    read_descriptor(symbol, &kernel);
    kernel.arguments = arguments[kernel.name];
    kernels[kernel.name] = kernel;
  }
  for (const Symbol& symbol : symbols) {
    const auto kernel = kernels.find(symbol.name);
    if (kernel == kernels.end() || symbol.address != kernel->second.address) continue;
    kernel->second.code = symbol.data;
    kernel->second.code_bytes = symbol.size;
  }
  return kernels;
}

}  // namespace isa
