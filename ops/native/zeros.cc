// Large arrays of zeros that take memory when it is written to: what nobody has used yet is neither touched nor resident. Where the
// system has huge pages they are asked for, as one page fault then serves 2 MB.

#include <cstring>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jaxserve {
namespace {

constexpr size_t kLeast = size_t{1} << 20;  // below this a page fault for each page costs more than the zeros
constexpr uintptr_t kPage = 4096;

ffi::Error zeros(ffi::Result<ffi::AnyBuffer> out) {
  uint8_t* data = static_cast<uint8_t*>(out->untyped_data());
  const size_t size = out->size_bytes();
#if defined(__linux__)
  const uintptr_t from = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (from + kPage - 1) / kPage * kPage, end = (from + size) / kPage * kPage;
  // Anonymous memory of this process that is let go reads as zeros.
  if (size >= kLeast && madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED) == 0) {
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
    std::memset(data, 0, first - from);
    std::memset(reinterpret_cast<void*>(end), 0, from + size - end);
    return ffi::Error::Success();
  }
#endif
  std::memset(data, 0, size);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

JAXSERVE_HANDLER(jaxserve_zeros, jaxserve::zeros, xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());
