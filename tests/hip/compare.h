// What a launch's twin and its machine code wrote, for a test to compare.
//
// SF_HIP_RECORD names a file. For each launch and each allocation in which either changed a byte, it
// gets a line of JSON {"kernel", "launch", "bindings", "offset", "size"} and then three times `size`
// bytes: what was there before from `offset` on, what the twin left there, and what the machine code
// left. Of the launch's bindings, those are named that lie in the allocation: -1 is the last.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

class Comparison {
 public:
  explicit Comparison(const std::vector<void*>& bindings);  // copies what they point to
  void keep_and_restore();  // keeps what the twin left, and puts back what was before
  void record(const std::string& kernel) const;  // nothing where no file is named

 private:
  struct Copy {
    View view;
    std::vector<char> before, twin;
    std::vector<int> bindings;
  };
  std::vector<Copy> copies_;
};
