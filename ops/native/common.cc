#include "common.h"

#include <algorithm>

#if JAXSERVE_X86
#include <cpuid.h>
#endif

namespace jaxserve {
namespace {

Isa detect() {
#if JAXSERVE_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kGeneric;
  const bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
  if (!osxsave || !fma || !f16c) return Isa::kGeneric;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // The operating system saves ymm (bits 1, 2) and zmm (bits 5, 6, 7) registers.
  if ((low & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kGeneric;
  if (!(b & (1u << 5))) return Isa::kGeneric;
  const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  if ((low & 0xe6) != 0xe6 || (b & avx512) != avx512) return Isa::kAvx2;
  if (!(c & (1u << 11))) return Isa::kAvx512;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Isa::kVnni;
  return Isa::kBf16;
#else
  return Isa::kGeneric;
#endif
}

const Isa kDetected = detect();
std::atomic<bool> rehearsal{false};
std::atomic<int> level{static_cast<int>(kDetected)};

inline void relax() {
#if JAXSERVE_X86
  _mm_pause();
#endif
}

}  // namespace

Isa isa() { return static_cast<Isa>(level.load(std::memory_order_relaxed)); }

bool rehearsing() { return rehearsal.load(std::memory_order_relaxed); }

namespace {

uint64_t stretch(uint64_t begin, uint64_t end) { return begin | end << 32; }
uint64_t begin_of(uint64_t stretch) { return stretch & 0xffffffffu; }
uint64_t end_of(uint64_t stretch) { return stretch >> 32; }

}  // namespace

Phases::Parts::Parts(int64_t chunks, int workers) : parts_(workers) {
  for (int w = 0; w < workers; ++w) parts_[w].left = stretch(chunks * w / workers, chunks * (w + 1) / workers);
}

int64_t Phases::Parts::claim(int worker) {
  std::atomic<uint64_t>& own = parts_[worker].left;
  for (;;) {
    uint64_t left = own.load(std::memory_order_relaxed);
    while (begin_of(left) < end_of(left))
      if (own.compare_exchange_weak(left, left + 1, std::memory_order_relaxed)) return static_cast<int64_t>(begin_of(left));
    while (!help(worker)) relax();  // a chunk for this ticket is on its way from one part to another
  }
}

bool Phases::Parts::help(int worker) {
  for (;;) {
    std::atomic<uint64_t>* most = nullptr;
    uint64_t of_most = 0, longest = 0;
    for (Part& part : parts_) {
      const uint64_t left = part.left.load(std::memory_order_relaxed), length = end_of(left) - begin_of(left);
      if (length > longest) most = &part.left, of_most = left, longest = length;
    }
    if (most == nullptr) return false;
    const uint64_t middle = begin_of(of_most) + longest / 2;
    if (!most->compare_exchange_strong(of_most, stretch(begin_of(of_most), middle), std::memory_order_relaxed)) continue;
    // A part that is empty is nobody's but its worker's, and no stretch that was begun comes back.
    parts_[worker].left.store(stretch(middle, end_of(of_most)), std::memory_order_relaxed);
    return true;
  }
}

void Phases::work(Shared& shared, int worker) {
  size_t phase = 0;
  for (;;) {
    const int64_t ticket = shared.ticket.fetch_add(1, std::memory_order_relaxed);
    if (ticket >= shared.total) return;  // `loop` may be gone already
    const auto& phases = shared.loop->phases_;
    while (ticket >= phases[phase].begin + phases[phase].chunks) ++phase;
    const int64_t before = phases[phase].begin;
    // A few microseconds at most between phases; beyond that the other thread has lost its core, so give up ours.
    for (int spins = 0; shared.done.load(std::memory_order_acquire) < before; ++spins) {
      spins < 4096 ? relax() : std::this_thread::yield();
    }
    const auto& parts = phases[phase].parts;
    phases[phase].body->call(parts == nullptr ? ticket - before : parts->claim(worker), worker);
    shared.done.fetch_add(1, std::memory_order_acq_rel);
  }
}

void Phases::run(ffi::ThreadPool& pool) {
  if (total_ == 0) return;
  auto shared = std::make_shared<Shared>();
  shared->loop = this;
  shared->total = total_;
  int64_t widest = 0;
  for (const auto& phase : phases_) widest = std::max(widest, phase.chunks);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), widest) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([shared] { work(*shared, shared->workers.fetch_add(1, std::memory_order_relaxed)); });
  }
  work(*shared, 0);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < total_; ++spins) {
    spins < 4096 ? relax() : std::this_thread::yield();
  }
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, size);
    if (buffer.data == nullptr) std::abort();
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace jaxserve

// Begins or ends a rehearsal; see `rehearsing`.
JAXSERVE_EXPORT void jaxserve_rehearse(int on) { jaxserve::rehearsal.store(on != 0, std::memory_order_relaxed); }

// Takes the given level or, where the CPU has less, the highest it has; a negative one takes the highest. Returns the
// level in use.
JAXSERVE_EXPORT int jaxserve_set_isa(int wanted) {
  const int best = static_cast<int>(jaxserve::kDetected);
  const int chosen = wanted < 0 ? best : std::min(wanted, best);
  jaxserve::level.store(chosen, std::memory_order_relaxed);
  return chosen;
}
