// Streams: a thread that works off a queue, some time after the work was given to it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <thread>

#include "device.h"
#include "hip.h"

// Microseconds that a stream waits before each piece of work, from SF_HIP_DELAY_US.
extern std::atomic<int> delay_us;

class Stream {
 public:
  explicit Stream(Device& device);
  ~Stream();  // when all work is done

  Device& device() { return device_; }
  // Work that is not done once the device has failed, and makes it fail with what it returns.
  void push(std::function<hipError_t()> work);
  // Work that is done in any case, and at once.
  void push_marker(std::function<void()> work);
  std::shared_future<double> mark();  // ready, with the time, when all work until now is done
  bool is_idle();

 private:
  struct Work {
    std::function<hipError_t()> run;
    bool is_marker;
  };

  void enqueue(Work work);
  void loop();
  hipError_t run(const Work& work);

  Device& device_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;  // its front is being worked on
  bool is_closing_ = false;
  std::thread thread_;
};

// Holds when the work was done that preceded its last record; not ready before that.
class Event {
 public:
  void record(Stream& stream);
  std::shared_future<double> done();  // invalid before the first record
  hipError_t failure();               // of the device that it was recorded on

 private:
  std::mutex mutex_;
  std::shared_future<double> done_;
  Device* device_ = nullptr;
};

Stream& default_stream(Device& device);
void wait_for(Device& device);  // all its streams
