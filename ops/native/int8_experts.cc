// Feed-forward experts in int8. Rows are sorted by expert, so that each chosen expert's weights are read once, where they
// are: no copy of an expert is made, and those that nobody chose are not touched.

#include <algorithm>
#include <cstring>

#include "experts.h"
#include "int8.h"

namespace jaxserve::int8 {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using S8 = ffi::Buffer<ffi::S8>;
using S16 = ffi::Buffer<ffi::S16>;

// Rows a block: as in int8_handlers.cc, they stay in the cache beside a block's weights.
constexpr int64_t kRowBlock = 48;

// All experts' matrices, packed as one of [experts * outputs, inputs].
struct Stack {
  const int8_t* packed;
  const float* scale;
  const int16_t* sums;
  const float* bias;  // [experts * outputs] or null
  int64_t outputs, panels, quads, groups;  // outputs and panels of one expert
};

ffi::ErrorOr<Stack> stack_of(const S8& packed, const F32& scale, const S16& sums, const F32& bias, int64_t experts,
                             int64_t outputs, int64_t inputs) {
  const auto dims = packed.dimensions();
  const int64_t groups = ceil_div(inputs, kGroup);
  if (outputs % kPanel != 0 || dims.size() != 4 || dims[0] * kPanel != experts * outputs ||
      dims[1] != ceil_div(inputs, 4) || dims[2] != kPanel || dims[3] != 4 ||
      static_cast<int64_t>(scale.element_count()) != experts * outputs ||
      static_cast<int64_t>(sums.element_count()) != experts * outputs * groups) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("the experts' weights are packed for another shape"));
  }
  if (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != experts * outputs) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("the biases do not fit the experts"));
  }
  return Stack{packed.typed_data(), scale.typed_data(), sums.typed_data(),
               bias.element_count() == 0 ? nullptr : bias.typed_data(),
               outputs, outputs / kPanel, dims[1], groups};
}

// Panel `panel` of an expert as the p-th of a block.
void set_panel(Block& b, int p, const Stack& w, int64_t expert, int64_t panel) {
  const int64_t at = expert * w.panels + panel;
  b.weight[p] = w.packed + at * w.quads * 4 * kPanel;
  b.sums[p] = w.sums + at * kPanel * w.groups;
  b.scale[p] = w.scale + at * kPanel;
  b.bias[p] = w.bias == nullptr ? nullptr : w.bias + at * kPanel;
  b.valid[p] = kPanel;
  b.residual[p] = nullptr;
}

struct Quantized {
  uint8_t* data;
  float* scale;
  int64_t groups;

  Quantized(int slot, int64_t rows, int64_t width) : groups(ceil_div(width, kGroup)) {
    data = static_cast<uint8_t*>(scratch(slot, rows * groups * (kGroup + sizeof(float))));
    scale = reinterpret_cast<float*>(data + rows * groups * kGroup);
  }
  Rows from(int64_t row) const { return {data + row * groups * kGroup, scale + row * groups, groups * kGroup}; }
};

void add_rounding(Phases& phases, const float* x, int64_t rows, int64_t width, bool rotated,
                  const Quantized& q) {
  const Rounding r{x, width, width, nullptr, 0.0f, q.data, q.groups, q.scale, rotated};
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, 16384 / width));
  phases.add(in_rehearsal(ceil_div(rows, step)), [=, &k = kernels()](int64_t chunk, int) {
    const int64_t end = std::min(rows, (chunk + 1) * step);
    for (int64_t row = chunk * step; row < end; ++row) k.round_row(r, row);
  });
}

ffi::Error experts(ffi::ThreadPool pool, F32 x, S32 ids, F32 weights, S8 up_packed, F32 up_scale, S16 up_sums,
                   F32 up_bias, S8 down_packed, F32 down_scale, S16 down_sums, F32 down_bias,
                   ffi::ResultBuffer<ffi::F32> out, int64_t num_experts, int64_t activation, int64_t up_rotated,
                   int64_t down_rotated) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], k = ids.dimensions()[1], E = num_experts;
  const int64_t F = up_packed.dimensions()[0] * kPanel / (2 * E);
  auto up_or = stack_of(up_packed, up_scale, up_sums, up_bias, E, 2 * F, D);
  if (up_or.has_error()) return up_or.error();
  auto down_or = stack_of(down_packed, down_scale, down_sums, down_bias, E, D, F);
  if (down_or.has_error()) return down_or.error();
  if (F % kPanel != 0) return ffi::Error::InvalidArgument("the experts' width is not a multiple of 16");
  if ((up_rotated && D % kGroup != 0) || (down_rotated && F % kGroup != 0)) {
    return ffi::Error::InvalidArgument("a rotated weight's inputs are a multiple of 64");
  }
  const Stack up = *up_or, down = *down_or;

  const Routing routing(ids.typed_data(), T, k, E, kRowBlock);
  const int64_t M = routing.rows;

  const Quantized rounded(0, T, D), sorted(1, M, D), narrow(2, M, F);
  float* hidden = static_cast<float*>(scratch(3, M * F * sizeof(float)));
  float* y = static_cast<float*>(scratch(4, M * D * sizeof(float)));
  Phases phases;
  add_rounding(phases, x.typed_data(), T, D, up_rotated, rounded);
  const int64_t gather = 16;
  phases.add(ceil_div(M, gather), [=, &token = routing.token](int64_t chunk, int) {
    for (int64_t m = chunk * gather; m < std::min(M, (chunk + 1) * gather); ++m) {
      const Rows from = rounded.from(token[m]), to = sorted.from(m);
      std::memcpy(const_cast<uint8_t*>(to.data), from.data, from.stride);
      std::memcpy(const_cast<float*>(to.scale), from.scale, rounded.groups * sizeof(float));
    }
  });
  // hidden = act(gate) * up: the first half of an expert's panels are gates.
  const int64_t half = up.panels / 2, pairs = kPanels / 2, up_columns = ceil_div(half, pairs);
  const int64_t num_tasks = static_cast<int64_t>(routing.tasks.size());
  phases.add(in_rehearsal(num_tasks * up_columns), [=, &routing, &kernel = kernels()](int64_t chunk, int) {
    const Routing::Task& task = routing.tasks[chunk / up_columns];
    const int64_t panel = chunk % up_columns * pairs;
    const int count = static_cast<int>(std::min(pairs, half - panel));
    Block b{};
    b.a = sorted.from(task.first);
    b.rows = task.rows;
    b.quads = up.quads;
    b.panels = 2 * count;
    b.out_stride = F;
    b.activation = static_cast<Activation>(activation);
    for (int p = 0; p < b.panels; ++p) {
      set_panel(b, p, up, task.expert, p < count ? panel + p : half + panel + p - count);
      b.out[p] = p < count ? hidden + task.first * F + (panel + p) * kPanel : nullptr;
    }
    kernel.block(b);
  });
  add_rounding(phases, hidden, M, F, down_rotated, narrow);
  const int64_t down_columns = ceil_div(down.panels, kPanels);
  phases.add(in_rehearsal(num_tasks * down_columns), [=, &routing, &kernel = kernels()](int64_t chunk, int) {
    const Routing::Task& task = routing.tasks[chunk / down_columns];
    const int64_t panel = chunk % down_columns * kPanels;
    Block b{};
    b.a = narrow.from(task.first);
    b.rows = task.rows;
    b.quads = down.quads;
    b.panels = static_cast<int>(std::min<int64_t>(kPanels, down.panels - panel));
    b.out_stride = D;
    for (int p = 0; p < b.panels; ++p) {
      set_panel(b, p, down, task.expert, panel + p);
      b.out[p] = y + task.first * D + (panel + p) * kPanel;
    }
    kernel.block(b);
  });
  routing.add_sums(phases, y, D, weights.typed_data(), out->typed_data());
  phases.run(pool);
  if (rehearsing()) std::memset(out->typed_data(), 0, out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::int8

JAXSERVE_HANDLER(jaxserve_int8_experts, jaxserve::int8::experts,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::int8::F32>()  // x [T, D]
                     .Arg<jaxserve::int8::S32>()  // ids [T, k]
                     .Arg<jaxserve::int8::F32>()  // weights [T, k]
                     .Arg<jaxserve::int8::S8>()   // gate and up: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S8>()   // down: packed, scale, sums, bias
                     .Arg<jaxserve::int8::F32>()
                     .Arg<jaxserve::int8::S16>()
                     .Arg<jaxserve::int8::F32>()
                     .Ret<jaxserve::int8::F32>()  // [T, D]
                     .Attr<int64_t>("num_experts")
                     .Attr<int64_t>("activation")
                     .Attr<int64_t>("up_rotated")
                     .Attr<int64_t>("down_rotated"));
