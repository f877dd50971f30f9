// What every handler shares: CPU features, a parallel loop on XLA's own thread pool, scratch memory.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#define JAXSERVE_X86 1
#include <immintrin.h>
// Each function that uses an instruction set says so itself; nothing is compiled for more than the baseline. FMA and
// F16C come with every AVX2 machine.
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")))
#else
#define JAXSERVE_X86 0
#endif

// In front of a loop over registers: they only stay registers when the loop is gone before scalars are replaced.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif
#define FORCE_INLINE inline __attribute__((always_inline))

// The library hides everything that is not marked so.
#define JAXSERVE_EXPORT extern "C" __attribute__((visibility("default")))

// Defines and exports a handler; build.py finds its name here, at the beginning of a line.
#define JAXSERVE_HANDLER(name, impl, ...)                 \
  JAXSERVE_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, impl, __VA_ARGS__)

namespace jaxserve {

namespace ffi = xla::ffi;

// Each level includes those before it.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kVnni = 3, kBf16 = 4 };

// The level in use: what the CPU and the operating system support, or less where the caller asked for less.
Isa isa();

// Chunks in order, over one or more phases: no chunk of a phase starts before every chunk of the phase before is done.
//
// The calling thread works too and never waits for a thread that has not come: tickets are handed out in order, so an
// unfinished earlier chunk is always on a running thread. A pool whose threads are all busy, or are all inside such
// loops, costs speed but cannot deadlock.
class Phases {
 public:
  // fn(chunk, worker): worker is unique among the threads in this loop and below `max_workers(pool)`.
  template <typename F>
  void add(int64_t chunks, F fn) {
    phases_.push_back({total_, chunks, std::make_unique<Model<F>>(std::move(fn)), nullptr});
    total_ += chunks;
  }

  // The same, but each of `workers` threads begins with a part of its own and takes the chunks of it in order; whose part is done
  // helps with the rest of another's. So a thread reads memory as one stream that the hardware runs ahead of, and what it asked for
  // early lies in its own cache when its turn comes: at 16 rows products from memory make 780 GOP/s so, dealt out in turns 540.
  template <typename F>
  void add_apart(int64_t chunks, int workers, F fn) {
    add(chunks, std::move(fn));
    phases_.back().parts = std::make_unique<Parts>(chunks, workers);
  }

  // Runs everything; returns when all chunks are done.
  void run(ffi::ThreadPool& pool);

  static int max_workers(const ffi::ThreadPool& pool) {
    return static_cast<int>(pool.num_threads() > 0 ? pool.num_threads() : 1);
  }

 private:
  struct Concept {
    virtual ~Concept() = default;
    virtual void call(int64_t chunk, int worker) = 0;
  };
  template <typename F>
  struct Model final : Concept {
    explicit Model(F f) : fn(std::move(f)) {}
    void call(int64_t chunk, int worker) override { fn(chunk, worker); }
    F fn;
  };
  // What is left of each thread's part.
  class Parts {
   public:
    Parts(int64_t chunks, int workers);
    // A chunk that nobody has had yet, for who has a ticket for one.
    int64_t claim(int worker);

   private:
    struct alignas(64) Part {
      std::atomic<uint64_t> left;  // the first chunk, and in the upper half where they end
    };
    bool help(int worker);  // takes the later half of what most is left of
    std::vector<Part> parts_;
  };
  struct Phase {
    int64_t begin, chunks;
    std::unique_ptr<Concept> body;
    std::unique_ptr<Parts> parts;  // or null
  };
  // Outlives the loop: a helper that comes late looks at it, finds no ticket left, and goes.
  struct Shared {
    std::atomic<int64_t> ticket{0};
    std::atomic<int> workers{1};
    alignas(64) std::atomic<int64_t> done{0};
    Phases* loop = nullptr;
    int64_t total = 0;
  };
  static void work(Shared& shared, int worker);

  std::vector<Phase> phases_;
  int64_t total_ = 0;
};

// One phase.
template <typename F>
void parallel_for(ffi::ThreadPool& pool, int64_t chunks, F fn) {
  if (chunks <= 1 || pool.num_threads() <= 1) {
    for (int64_t i = 0; i < chunks; ++i) fn(i, 0);
    return;
  }
  Phases phases;
  phases.add(chunks, std::move(fn));
  phases.run(pool);
}

// Memory of the calling thread that stays allocated between calls, 64-byte aligned. Valid until the same thread asks
// again with the same slot; slots 0..7.
void* scratch(int slot, size_t bytes);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for memory that will be written: stores leave a core in order, so one that misses the caches holds up all behind it.
FORCE_INLINE void will_write(const void* at) {
#if JAXSERVE_X86
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at, 1, 3);
#endif
}
inline void will_write(const void* from, int64_t bytes) {
  for (const char* at = static_cast<const char*>(from), *end = at + bytes; at < end; at += 64) will_write(at);
}

// What will be read soon, asked for a few lines at a time between other work: all at once they would be waited for.
class Fetch {
 public:
  void add(const void* from, int64_t bytes) {
    if (ranges_ == kRanges) return;
    list_[ranges_++] = {static_cast<const char*>(from), bytes};
    lines_ += ceil_div(bytes, kLine);
  }
  int64_t lines() const { return lines_; }
  void some(int64_t lines) {
    for (; lines > 0 && next_ < ranges_; --lines) {
      __builtin_prefetch(list_[next_].from + at_, 0, 2);
      if ((at_ += kLine) < list_[next_].bytes) continue;
      ++next_, at_ = 0;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kRanges = 32;
  struct Range {
    const char* from;
    int64_t bytes;
  };
  Range list_[kRanges];
  int ranges_ = 0, next_ = 0;
  int64_t lines_ = 0, at_ = 0;
};

// Whether a start runs its programs once for what only a first run pays: products then do a little of each phase and give zeros.
bool rehearsing();

// How many of a product's chunks are done: all of them, or in a rehearsal enough for every thread to have met the code.
inline int64_t in_rehearsal(int64_t chunks) { return rehearsing() && chunks > 4 ? 4 : chunks; }

}  // namespace jaxserve
