// The log, a JSON object a line, and the faults that are to happen.
#include "record.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

#include "device.h"

thread_local hipError_t failure_when_run = hipSuccess;
thread_local hipError_t last_error = hipSuccess;

namespace {

struct Fault {
  long first;
  bool is_lasting;
  hipError_t error;
  bool is_async;
};

struct Faults {
  std::multimap<std::string, Fault, std::less<>> of;
  std::map<std::string, long, std::less<>> num_calls;
};

std::mutex mutex;
Faults& faults = *new Faults;  // never freed: threads of IREE outlive static objects
std::FILE* log_file = nullptr;  // set once, before any call
std::atomic<bool> has_faults = false;

bool parse_error(const std::string& name, hipError_t* error) {
#define X(known, value) \
  if (name == "hip" #known) return *error = hip##known, true;
  HIP_ERRORS(X)
#undef X
  return false;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool parse_fault(const std::string& text, Faults* faults) {
  const auto parts = split(text, ':');
  if (parts.size() < 3 || parts.size() > 4) return false;
  char* end = nullptr;
  Fault fault{std::strtol(parts[1].c_str(), &end, 10), false, hipSuccess, parts.size() == 4};
  fault.is_lasting = *end == '+';
  if (fault.first < 1 || (*end && end[1]) || (fault.is_async && parts[3] != "async")) return false;
  if (!parse_error(parts[2], &fault.error)) return false;
  faults->of.emplace(parts[0], fault);
  faults->num_calls[parts[0]] = 0;
  return true;
}

// Settings are read when the library is loaded: a mistake shows before anything runs.
const bool is_configured = [] {
  if (!set_faults(std::getenv("SF_HIP_FAIL"))) die("SF_HIP_FAIL is malformed");
  if (const char* path = std::getenv("SF_HIP_LOG")) {
    log_file = std::fopen(path, "a");  // shared with child processes
    if (!log_file) die("SF_HIP_LOG cannot be written");
  }
  return true;
}();

}  // namespace

const char* error_name(hipError_t error) {
  switch (error) {
#define X(name, value) \
  case hip##name:      \
    return "hip" #name;
    HIP_ERRORS(X)
#undef X
  }
  return "hipErrorUnknown";
}

void die(const std::string& message) {
  std::fprintf(stderr, "stand-in for libamdhip64: %s\n", message.c_str());
  std::_Exit(2);
}

bool set_faults(const char* text) {
  Faults parsed;
  for (const auto& part : split(text ? text : "", ',')) {
    if (!parse_fault(part, &parsed)) return false;
  }
  const std::lock_guard lock(mutex);
  has_faults = !parsed.of.empty();
  faults = std::move(parsed);
  return true;
}

hipError_t next_fault(const char* function) {
  if (!has_faults) return hipSuccess;
  const std::lock_guard lock(mutex);
  const auto count = faults.num_calls.find(function);
  if (count == faults.num_calls.end()) return hipSuccess;
  const long number = ++count->second;
  const auto [begin, end] = faults.of.equal_range(function);
  for (auto it = begin; it != end; ++it) {
    const Fault& fault = it->second;
    if (number != fault.first && !(fault.is_lasting && number > fault.first)) continue;
    if (!fault.is_async) return fault.error;
    failure_when_run = fault.error;
  }
  return hipSuccess;
}

void log_mark(const char* name) {
  write_log("mark", {{"name", name}}, hipSuccess, seconds_now());
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void write_log(const char* function, Notes notes, hipError_t result, double started_at) {
  if (!log_file) return;
  const std::lock_guard lock(mutex);
  const int device = devices().empty() ? -1 : current_device().index;
  std::fprintf(log_file, R"({"function": "%s", "result": "%s", "at": %.6f, "device": %d)", function,
               error_name(result), started_at, device);
  for (const auto& [key, value] : notes) {
    if (const auto* number = std::get_if<long long>(&value)) {
      std::fprintf(log_file, R"(, "%s": %lld)", key, *number);
    } else {
      std::fprintf(log_file, R"(, "%s": "%s")", key, std::get<const char*>(value));
    }
  }
  std::fputs("}\n", log_file);
  std::fflush(log_file);  // the process may be terminated at any time
}
