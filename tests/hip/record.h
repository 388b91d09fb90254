// What was called: every call passes through `call`, which counts it, lets it fail when it was told
// to, and writes it to the log.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <variant>

#include "hip.h"

struct Note {
  const char* key;
  std::variant<long long, const char*> value;

  Note(const char* key, const char* value) : key(key), value(value) {}
  template <class Number>
  Note(const char* key, Number value) : key(key), value(static_cast<long long>(value)) {}
};
using Notes = std::initializer_list<Note>;

// Of the call under way: how the work that it queues shall fail when it runs.
extern thread_local hipError_t failure_when_run;
extern thread_local hipError_t last_error;

const char* error_name(hipError_t error);
[[noreturn]] void die(const std::string& message);

// "function:n:error", where n is the n-th call from now on, or with "n+" all from there on; with
// ":async" the work fails when it runs, not the call. Several between commas. False if malformed.
bool set_faults(const char* text);
void log_mark(const char* name);

// How this call shall fail; hipSuccess if it shall not, or only when its work runs.
hipError_t next_fault(const char* function);
double seconds_now();
void write_log(const char* function, Notes notes, hipError_t result, double started_at);

template <class Body>
hipError_t call(const char* function, Notes notes, Body body) {
  const double started_at = seconds_now();
  hipError_t result = next_fault(function);
  if (result == hipSuccess) result = body();
  failure_when_run = hipSuccess;
  if (result != hipSuccess && result != hipErrorNotReady) last_error = result;
  write_log(function, notes, result, started_at);
  return result;
}
