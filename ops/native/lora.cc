// Low-rank adapters on the CPU: every token's product with the two matrices of its own adapter, added to what the base gave.

#include "lora.h"

#include <algorithm>
#include <vector>

namespace jaxserve::lora {
namespace {

constexpr int64_t kColumns = 512;  // of an item: its part of B stays in the first cache for all tokens of a block
constexpr int64_t kSerial = 1 << 18;  // multiplications below which another thread costs more than it takes over

Kernels best_kernels() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return avx512_kernels();
  if (isa() >= Isa::kAvx2) return avx2_kernels();
#endif
  return generic_kernels();
}

struct Block {  // tokens of one adapter
  int32_t slot;
  int32_t first, count;  // in the order by slots
};

// Operands: x [T, I], slot [T] (0: none), a [N, R, I], b [N, R, O], y [T, O]. Result: y, aliased.
ffi::Error lora(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slot, ffi::Buffer<ffi::F32> a,
                ffi::Buffer<ffi::F32> b, ffi::Buffer<ffi::F32> old, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  if (old.typed_data() != y->typed_data()) return ffi::Error::Internal("the base's product is not updated in place");
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], N = a.dimensions()[0], R = a.dimensions()[1];
  const int64_t O = y->dimensions()[1];
  const Kernels use = best_kernels();

  std::vector<int32_t> order;
  for (int64_t t = 0; t < T; ++t) {
    const int32_t s = slot.typed_data()[t];
    if (s < 0 || s >= N) return ffi::Error::InvalidArgument("an adapter's slot that is not there");
    if (s > 0) order.push_back(static_cast<int32_t>(t));
  }
  if (order.empty()) return ffi::Error::Success();
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t p, int32_t q) { return slot.typed_data()[p] < slot.typed_data()[q]; });
  std::vector<const float*> in(order.size());
  std::vector<float*> out(order.size());
  std::vector<Block> blocks;
  constexpr int kTokens = 16;  // of a block: its part of A is fetched once for them
  for (size_t i = 0; i < order.size(); ++i) {
    const int32_t s = slot.typed_data()[order[i]];
    in[i] = x.typed_data() + order[i] * I;
    out[i] = y->typed_data() + order[i] * O;
    if (blocks.empty() || blocks.back().slot != s || blocks.back().count == kTokens)
      blocks.push_back({s, static_cast<int32_t>(i), 0});
    ++blocks.back().count;
  }
  std::vector<float> hidden(order.size() * R);
  const int64_t tiles = ceil_div(O, kColumns);
  auto shrink = [&](int64_t item, int) {
    const Block& k = blocks[item];
    use.shrink(&in[k.first], k.count, a.typed_data() + k.slot * R * I, static_cast<int>(R), I, &hidden[k.first * R]);
  };
  auto expand = [&](int64_t item, int) {
    const Block& k = blocks[item / tiles];
    const int64_t begin = item % tiles * kColumns;
    use.expand(&hidden[k.first * R], k.count, b.typed_data() + k.slot * R * O, static_cast<int>(R), O, begin,
               std::min(begin + kColumns, O), &out[k.first]);
  };
  const int64_t items = static_cast<int64_t>(blocks.size());
  if (static_cast<int64_t>(order.size()) * R * (I + O) < kSerial || threads.num_threads() <= 1) {
    for (int64_t i = 0; i < items; ++i) shrink(i, 0);
    for (int64_t i = 0; i < items * tiles; ++i) expand(i, 0);
    return ffi::Error::Success();
  }
  Phases phases;
  phases.add(items, shrink);
  phases.add(items * tiles, expand);
  phases.run(threads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::lora

JAXSERVE_HANDLER(jaxserve_lora, jaxserve::lora::lora,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // slot
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // a
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // b
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // y
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
