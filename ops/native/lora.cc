// Low-rank adapters on the CPU: every token's product with the two matrices of its own adapter, added to what the base gave.

#include "lora.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace jaxserve::lora {
namespace {

constexpr int64_t kColumns = 512;  // of an item: its part of B stays in the first cache for all tokens of a block
constexpr int64_t kSerial = 1 << 18;  // multiplications below which another thread costs more than it takes over

template <typename E>
Kernels<E> best_kernels() {
#if JAXSERVE_X86
  if constexpr (std::is_same_v<E, Bits>) {
    if (isa() >= Isa::kBf16) return bf16_kernels();
  }
  if (isa() >= Isa::kAvx512) return avx512_kernels<E>();
  if (isa() >= Isa::kAvx2) return avx2_kernels<E>();
#endif
  return generic_kernels<E>();
}

struct Block {  // tokens of one adapter
  int32_t slot;
  int32_t first, count;  // in the order by slots
};

// What an item adds: [begin, end) cut where another matrix begins, so that each cut is of one.
std::vector<std::vector<Columns>> cut(ffi::Span<const int64_t> ends, int64_t O, int64_t R) {
  std::vector<std::vector<Columns>> items(ceil_div(O, kColumns));
  int64_t begin = 0;
  const auto add = [&](int64_t end, int rank) {
    for (; begin < end; begin = std::min(end, (begin / kColumns + 1) * kColumns))
      items[begin / kColumns].push_back({begin, std::min(end, (begin / kColumns + 1) * kColumns), rank});
  };
  for (size_t i = 0; i + 1 < ends.size(); i += 2) add(ends[i], static_cast<int>(ends[i + 1] * R));
  if (ends.size() == 0) add(O, 0);
  return items;
}

// Operands: x [T, I], slot [T] (0: none), a [N, P R, I], b [N, R, O], y [T, O]. Result: y, aliased. `ends` are pairs of
// the column where a stretch of B ends and the number of the matrix that it is of, below P; none where P is 1.
template <ffi::DataType type, typename E>
ffi::Error lora(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> slot, ffi::Buffer<type> a_buffer,
                ffi::Buffer<type> b_buffer, ffi::Buffer<ffi::F32> old, ffi::Result<ffi::Buffer<ffi::F32>> y,
                ffi::Span<const int64_t> ends) {
  if (old.typed_data() != y->typed_data()) return ffi::Error::Internal("the base's product is not updated in place");
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], N = a_buffer.dimensions()[0];
  const int64_t all = a_buffer.dimensions()[1], R = b_buffer.dimensions()[1], O = y->dimensions()[1];
  for (size_t i = 0; i + 1 < ends.size(); i += 2) {
    if (ends[i] > O || (ends[i + 1] + 1) * R > all) return ffi::Error::InvalidArgument("columns that are not there");
  }
  const E* a = reinterpret_cast<const E*>(a_buffer.untyped_data());
  const E* b = reinterpret_cast<const E*>(b_buffer.untyped_data());
  const Kernels<E> use = best_kernels<E>();

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
  for (size_t i = 0; i < order.size(); ++i) {
    const int32_t s = slot.typed_data()[order[i]];
    in[i] = x.typed_data() + order[i] * I;
    out[i] = y->typed_data() + order[i] * O;
    if (blocks.empty() || blocks.back().slot != s || blocks.back().count == kBlock)
      blocks.push_back({s, static_cast<int32_t>(i), 0});
    ++blocks.back().count;
  }
  std::vector<float> hidden(order.size() * all);
  const auto columns = cut(ends, O, R);
  const int64_t tiles = static_cast<int64_t>(columns.size());
  auto shrink = [&](int64_t item, int) {
    const Block& k = blocks[item];
    use.shrink(&in[k.first], k.count, a + k.slot * all * I, static_cast<int>(all), I, &hidden[k.first * all]);
  };
  auto expand = [&](int64_t item, int) {
    const Block& k = blocks[item / tiles];
    for (const Columns& c : columns[item % tiles])
      use.expand(&hidden[k.first * all + c.rank], static_cast<int>(all), k.count, b + k.slot * R * O,
                 static_cast<int>(R), O, c.begin, c.end, &out[k.first]);
  };
  const int64_t items = static_cast<int64_t>(blocks.size());
  if (static_cast<int64_t>(order.size()) * (all * I + R * O) < kSerial || threads.num_threads() <= 1) {
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

JAXSERVE_HANDLER(jaxserve_lora, (jaxserve::lora::lora<xla::ffi::F32, float>),
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // slot
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // a
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // b
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // y
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Attr<xla::ffi::Span<const int64_t>>("ends"));

JAXSERVE_HANDLER(jaxserve_lora_bf16, (jaxserve::lora::lora<xla::ffi::BF16, jaxserve::lora::Bits>),
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // x
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // slot
                     .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // a
                     .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // b
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // y
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Attr<xla::ffi::Span<const int64_t>>("ends"));
