// Low-rank adapters beside a product: which rows share what, and the product of both matrices added to what the base gave.

#include "lora.h"

#include <algorithm>

namespace jaxserve::lora {
namespace {

constexpr int64_t kTile = 512;        // columns of an item: its part of B stays in the first cache for all its rows
constexpr char kShape[] = "adapters of another shape than their weight";
constexpr int64_t kSerial = 1 << 18;  // multiplications below which another thread costs more than it takes over

template <typename E>
Kernels best() {
#if JAXSERVE_X86
  if (isa() >= Isa::kAvx512) return avx512_kernels<E>();
  if (isa() >= Isa::kAvx2) return avx2_kernels<E>();
#endif
  return generic_kernels<E>();
}

Kernels best_kernels(bool half) {
#if JAXSERVE_X86
  if (half && isa() >= Isa::kBf16) return bf16_kernels();
#endif
  return half ? best<Bits>() : best<float>();
}

}  // namespace

const char* Beside::read(const ffi::Buffer<ffi::S32>& slot, const ffi::AnyBuffer& a, const ffi::AnyBuffer& b,
                         ffi::Span<const int64_t> ends, int64_t rows, int64_t inputs, int64_t outputs) {
  const auto of_a = a.dimensions(), of_b = b.dimensions();
  const bool half = a.element_type() == ffi::BF16;
  if (a.element_type() != b.element_type() || (!half && a.element_type() != ffi::F32)) {
    return "adapters are float32 or bfloat16";
  }
  int64_t parts = 1, begin = 0;
  for (size_t i = 0; i + 1 < ends.size(); i += 2) parts = std::max(parts, ends[i + 1] + 1);
  if (of_a.size() != 3 || of_a[1] % parts != 0) return kShape;
  all_ = of_a[1], ranks_ = all_ / parts, half_ = half;
  const bool fits = half ? of_b.size() == 5 && of_b[1] == ceil_div(outputs, kPanel) && of_b[2] == ceil_div(ranks_, 2) &&
                               of_b[3] == kPanel && of_b[4] == 2
                         : of_b.size() == 3 && of_b[1] == ranks_ && of_b[2] == outputs;
  if (!fits || of_a[0] != of_b[0] || of_a[2] != inputs || static_cast<int64_t>(slot.element_count()) != rows) return kShape;
  kernels_ = best_kernels(half);
  a_ = static_cast<const char*>(a.untyped_data());
  b_ = static_cast<const char*>(b.untyped_data());
  inputs_ = inputs, outputs_ = outputs, stride_ = all_ + all_ % 2;
  bytes_of_a_ = a.size_bytes() / of_a[0], bytes_of_b_ = b.size_bytes() / of_a[0];
  for (size_t i = 0; i + 1 < ends.size(); i += 2) {
    if (ends[i] < begin || ends[i] > outputs || ends[i + 1] < 0) return "columns that are not there";
    columns_.push_back({begin, ends[i], ends[i + 1] * ranks_});
    begin = ends[i];
  }
  if (ends.size() == 0) columns_.push_back({0, outputs, 0});
  const int32_t* of = slot.typed_data();
  for (int64_t t = 0; t < rows; ++t) {
    if (of[t] < 0 || of[t] >= of_a[0]) return "an adapter's slot that is not there";
  }
  groups_.resize(ceil_div(rows, kRows));
  for (int64_t t = 0; t < rows; t += kSpan) deal(of, t, std::min(rows, t + kSpan));
  spans_.push_back(static_cast<int64_t>(blocks_.size()));
  hidden_.reset(new char[order_.size() * stride_ * kernels_.hidden_bytes]);
  return nullptr;
}

void Beside::deal(const int32_t* slot, int64_t begin, int64_t end) {
  spans_.push_back(static_cast<int64_t>(blocks_.size()));
  const size_t before = order_.size();
  for (int64_t t = begin; t < end; ++t) {
    if (slot[t] > 0) order_.push_back(static_cast<int32_t>(t));
  }
  std::stable_sort(order_.begin() + before, order_.end(), [=](int32_t p, int32_t q) { return slot[p] < slot[q]; });
  // A slot's rows are in the batch's order: those of a block of rows are neighbours.
  for (size_t i = before; i < order_.size(); ++i) {
    const int32_t s = slot[order_[i]], at = static_cast<int32_t>(i);
    const bool first = i == before;
    if (first || blocks_.back().slot != s || blocks_.back().count == kBlock) blocks_.push_back({s, at, 0});
    ++blocks_.back().count;
    auto& group = groups_[order_[i] / kRows];
    if (group.empty() || group.back().slot != s) group.push_back({s, at, 0});
    ++group.back().count;
  }
}

std::pair<int64_t, int64_t> Beside::blocks(int64_t begin, int64_t rows) const {
  return {spans_[begin / kSpan], spans_[ceil_div(begin + rows, kSpan)]};
}

void Beside::shrink(int64_t block, const float* x, int64_t origin, const float* gain, float eps) {
  const Rows& k = blocks_[block];
  const float* in[kBlock];
  for (int i = 0; i < k.count; ++i) in[i] = x + (order_[k.first + i] - origin) * inputs_;
  kernels_.shrink(in, k.count, gain, eps, a_ + k.slot * bytes_of_a_, static_cast<int>(all_), inputs_,
                  hidden_.get() + k.first * stride_ * kernels_.hidden_bytes, stride_);
}

void Beside::ahead(int64_t row, int64_t begin, int64_t end, Fetch& fetch) const {
  if (!half_ || row >= static_cast<int64_t>(groups_.size()) * kRows) return;
  const int64_t panel = ceil_div(ranks_, 2) * kPanel * 2 * static_cast<int64_t>(sizeof(Bits));
  for (const Rows& k : groups_[row / kRows]) {
    fetch.add(b_ + k.slot * bytes_of_b_ + begin / kPanel * panel, (ceil_div(end, kPanel) - begin / kPanel) * panel);
  }
}

void Beside::expand(int64_t row, int64_t begin, int64_t end, float* y, int64_t stride) const {
  for (const Rows& k : groups_[row / kRows]) {
    for (const Columns& c : columns_) {
      const int64_t from = std::max(begin, c.begin), to = std::min(end, c.end);
      if (from >= to) continue;
      float* out[kRows];
      for (int t = 0; t < k.count; ++t) out[t] = y + (order_[k.first + t] - row) * stride + from - begin;
      kernels_.expand(hidden_.get() + (k.first * stride_ + c.rank) * kernels_.hidden_bytes, stride_, k.count,
                      b_ + k.slot * bytes_of_b_, static_cast<int>(ranks_), outputs_, from, to, out);
    }
  }
}

namespace {

// Operands: x [T, I], gain [I] or [0], then those of `Beside`, y [T, O]. Result: y, aliased.
ffi::Error lora(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::S32> slot,
                ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Buffer<ffi::F32> old, ffi::Result<ffi::Buffer<ffi::F32>> y,
                ffi::Span<const int64_t> ends, float eps) {
  if (old.typed_data() != y->typed_data()) return ffi::Error::Internal("the base's product is not updated in place");
  const int64_t T = x.dimensions()[0], I = x.dimensions()[1], O = y->dimensions()[1];
  Beside beside;
  if (const char* wrong = beside.read(slot, a, b, ends, T, I, O)) return ffi::Error::InvalidArgument(wrong);
  if (beside.idle()) return ffi::Error::Success();
  const float* scale = gain.element_count() == 0 ? nullptr : gain.typed_data();
  const float* in = x.typed_data();
  float* out = y->typed_data();
  const int64_t tiles = ceil_div(O, kTile), blocks = beside.blocks(0, T).second;
  auto shrink = [&](int64_t block, int) { beside.shrink(block, in, 0, scale, eps); };
  auto expand = [&](int64_t item, int) {
    const int64_t row = item / tiles * kRows, begin = item % tiles * kTile;
    beside.expand(row, begin, std::min(O, begin + kTile), out + row * O + begin, O);
  };
  const int64_t items = ceil_div(T, kRows) * tiles;
  if (beside.multiplications() < kSerial || threads.num_threads() <= 1) {
    for (int64_t i = 0; i < blocks; ++i) shrink(i, 0);
    for (int64_t i = 0; i < items; ++i) expand(i, 0);
    return ffi::Error::Success();
  }
  Phases phases;
  phases.add(blocks, shrink);
  phases.add(items, expand);
  phases.run(threads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::lora

JAXSERVE_HANDLER(jaxserve_lora, jaxserve::lora::lora,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // gain
                     .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // slot
                     .Arg<xla::ffi::AnyBuffer>()              // a
                     .Arg<xla::ffi::AnyBuffer>()              // b
                     .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // y
                     .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                     .Attr<xla::ffi::Span<const int64_t>>("ends")
                     .Attr<float>("eps"));
