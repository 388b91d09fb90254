// The table of vector instructions.
#include "lanes.h"

namespace isa {

namespace {

std::vector<Entry> all() {
  std::vector<Entry> table;
  for (const auto part :
       {integer_instructions, float_instructions, packed_instructions, comparisons}) {
    for (const Entry& entry : part()) table.push_back(entry);
  }
  return table;
}

}  // namespace

extern const std::vector<Entry> VECTOR = all();

}  // namespace isa
