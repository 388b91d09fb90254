#include "compare.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "record.h"

namespace {

std::mutex mutex;
long num_launches = 0;

std::FILE* record_file() {
  static std::FILE* const file = [] {
    const char* path = std::getenv("SF_HIP_RECORD");
    std::FILE* opened = path && *path ? std::fopen(path, "ab") : nullptr;
    if (path && *path && !opened) die("SF_HIP_RECORD cannot be written");
    return opened;
  }();
  return file;
}

}  // namespace

Comparison::Comparison(const std::vector<void*>& bindings) {
  int number = -static_cast<int>(bindings.size());
  for (const void* binding : bindings) {
    const View view = allocation_of(binding);
    const auto known = std::find_if(copies_.begin(), copies_.end(), [&](const Copy& copy) {
      return copy.view.data == view.data;
    });
    if (known != copies_.end()) {
      known->bindings.push_back(number);
    } else if (view.data) {
      copies_.push_back({view, {view.data, view.data + view.size}, {}, {number}});
    }
    ++number;
  }
}

void Comparison::keep_and_restore() {
  for (Copy& copy : copies_) {
    copy.twin.assign(copy.view.data, copy.view.data + copy.view.size);
    std::copy(copy.before.begin(), copy.before.end(), copy.view.data);
  }
}

void Comparison::record(const std::string& kernel) const {
  std::FILE* file = record_file();
  if (!file) return;
  const std::lock_guard lock(mutex);
  ++num_launches;
  for (const Copy& copy : copies_) {
    const char* machine = copy.view.data;
    const auto is_changed = [&](size_t k) {
      return copy.twin[k] != copy.before[k] || machine[k] != copy.before[k];
    };
    size_t begin = 0, end = copy.view.size;
    while (begin < end && !is_changed(begin)) ++begin;
    while (end > begin && !is_changed(end - 1)) --end;
    if (begin == end) continue;
    begin = begin / 8 * 8;
    end = std::min((end + 7) / 8 * 8, copy.view.size);
    std::string numbers;
    for (const int number : copy.bindings) {
      numbers += (numbers.empty() ? "" : ", ") + std::to_string(number);
    }
    std::fprintf(file, R"({"kernel": "%s", "launch": %ld, "bindings": [%s], "offset": %zu, )"
                       R"("size": %zu})" "\n",
                 kernel.c_str(), num_launches, numbers.c_str(), begin, end - begin);
    for (const char* data : {copy.before.data(), copy.twin.data(), machine}) {
      std::fwrite(data + begin, 1, end - begin, file);
    }
  }
  std::fflush(file);
}
