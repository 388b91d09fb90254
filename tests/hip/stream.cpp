// The threads of streams.
#include "stream.h"

#include <chrono>
#include <cstdlib>
#include <memory>

#include "record.h"

std::atomic<int> delay_us = [] {
  const char* text = std::getenv("SF_HIP_DELAY_US");
  return text ? std::atoi(text) : 20;
}();

Stream::Stream(Device& device) : device_(device), thread_([this] { loop(); }) {
  const std::lock_guard lock(device.mutex);
  device.streams.insert(this);
}

Stream::~Stream() {
  {
    const std::lock_guard lock(device_.mutex);
    device_.streams.erase(this);
  }
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Stream::push(std::function<hipError_t()> work) {
  const hipError_t failure = std::exchange(failure_when_run, hipSuccess);
  if (failure != hipSuccess) work = [failure] { return failure; };
  enqueue({std::move(work), false});
}

void Stream::push_marker(std::function<void()> work) {
  enqueue({[work = std::move(work)] { return work(), hipSuccess; }, true});
}

std::shared_future<double> Stream::mark() {
  const auto done = std::make_shared<std::promise<double>>();
  push_marker([done] { done->set_value(seconds_now()); });
  return done->get_future().share();
}

bool Stream::is_idle() {
  const std::lock_guard lock(mutex_);
  return queue_.empty();
}

void Stream::enqueue(Work work) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
  }
  changed_.notify_all();
}

void Stream::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return is_closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const Work& work = queue_.front();  // stays, as only this thread takes work out
    lock.unlock();
    const hipError_t result = run(work);
    hipError_t none = hipSuccess;
    if (result != hipSuccess) device_.failure.compare_exchange_strong(none, result);
    lock.lock();
    queue_.pop_front();
  }
}

hipError_t Stream::run(const Work& work) {
  if (work.is_marker) return work.run();
  if (device_.failure != hipSuccess) return hipSuccess;
  if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
  return work.run();
}

void Event::record(Stream& stream) {
  const std::lock_guard lock(mutex_);
  done_ = stream.mark();
  device_ = &stream.device();
}

std::shared_future<double> Event::done() {
  const std::lock_guard lock(mutex_);
  return done_;
}

hipError_t Event::failure() {
  const std::lock_guard lock(mutex_);
  return device_ ? device_->failure.load() : hipSuccess;
}

Stream& default_stream(Device& device) {
  {
    const std::lock_guard lock(device.mutex);
    if (device.default_stream) return *device.default_stream;
  }
  auto* stream = new Stream(device);
  const std::lock_guard lock(device.mutex);
  return *(device.default_stream = stream);
}

void wait_for(Device& device) {
  std::vector<std::shared_future<double>> marks;
  {
    const std::lock_guard lock(device.mutex);
    for (Stream* stream : device.streams) marks.push_back(stream->mark());
  }
  for (const auto& mark : marks) mark.wait();
}
