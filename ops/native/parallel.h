// Splitting a handler's work over XLA's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls fn(i) for i in [0, count), on this thread and on up to `helpers` of the pool's. Items are taken from a counter
// in order, so put the largest first. Returns when all are done. The caller never waits for an item that nobody has
// started: a handler that itself runs inside the pool cannot deadlock, and a helper that starts late finds nothing.
template <typename Fn>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t helpers, int64_t count, const Fn& fn) {
  struct Job {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count;
    const Fn* fn;
    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        (*fn)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  helpers = std::min(helpers, count - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) fn(i);
    return;
  }
  auto job = std::make_shared<Job>();
  job->count = count;
  job->fn = &fn;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->work(); });
  job->work();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace jaxserve
