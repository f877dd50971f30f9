// The products as XLA calls them: rounding of the activations, product, and everything around it in one call.

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks/weight.h"

namespace jaxserve::blocks {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U8 = ffi::Buffer<ffi::U8>;

constexpr int64_t kRowBlock = 48, kMostRows = 256;  // rows of a tile at least, where there are so many, and at most

const float* optional(const F32& buffer) { return buffer.element_count() == 0 ? nullptr : buffer.typed_data(); }

Rounding rounding(const float* x, int64_t rows, int64_t width, const float* gain, float eps, bool rotated, int slot) {
  uint8_t* data = static_cast<uint8_t*>(scratch(slot, Rows::bytes(rows, width)));
  return {x, width, gain, eps, rotated, Rows(data, width)};
}

void add_rounding(Phases& phases, const Rounding& r, int64_t begin, int64_t rows) {
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, 16384 / r.width));
  phases.add(in_rehearsal(ceil_div(rows, step)), [=, &k = kernels()](int64_t chunk, int) {
    const int64_t end = begin + std::min(rows, (chunk + 1) * step);
    for (int64_t row = begin + chunk * step; row < end; ++row) k.round_row(r, row);
  });
}

// A product's tiles: blocks of rows, and of each block tiles that lie one behind the other in memory. Each thread has a part of its
// own, so what it asks for ahead is of use to itself.
struct Deal {
  int64_t tiles, rows, block, together;
  Deal(int64_t tiles_, int64_t rows_, int threads) : tiles(tiles_), rows(rows_) {
    // More rows a block read weights from memory less often; but some tiles are to be left for whoever is done first.
    int64_t pieces = std::max<int64_t>(1, ceil_div(rows, kMostRows));
    while (tiles * pieces < 24 * threads && rows >= kRowBlock * (pieces + 1)) ++pieces;
    block = std::max<int64_t>(1, ceil_div(rows, pieces));
    // A few tiles are taken at once where there are many: to take one costs 0.2 us, and to compute four rows of one 4.
    together = rows <= 4 ? std::clamp<int64_t>(tiles / (32 * threads), 1, 8) : 1;
  }
  // A phase that calls fn(first row of the block, its rows, tile) for all tiles.
  template <typename F>
  void add(Phases& phases, int threads, F fn) const {
    const int64_t all = tiles * ceil_div(rows, block), count = in_rehearsal(ceil_div(all, together));
    phases.add_apart(count, threads, [=, deal = *this](int64_t chunk, int) {
      const int64_t end = rehearsing() ? chunk + 1 : std::min(all, (chunk + 1) * deal.together);
      for (int64_t i = rehearsing() ? chunk : chunk * deal.together; i < end; ++i) {
        const int64_t first = i / deal.tiles * deal.block;
        fn(first, std::min(deal.rows - first, deal.block), i % deal.tiles);
      }
    });
  }
};

// out[rows, outputs] = a W^T + bias + residual. Row 0 of out is row `begin` of a.
void add_product(Phases& phases, const Rows& a, const Weight& w, const float* bias, int64_t begin, int64_t rows, float* out,
                 const float* residual, int threads) {
  const Deal deal(static_cast<int64_t>(w.groups.size()), rows, threads);
  deal.add(phases, threads, [=, &w, &k = kernels()](int64_t first, int64_t count, int64_t tile) {
    const int64_t panel = w.groups[tile];
    Tile t{};
    t.a = a;
    t.first_row = begin + first;
    t.rows = count;
    t.inputs = w.inputs;
    t.out_stride = w.outputs;
    w.place(t, panel, kPanels, bias);
    for (int p = 0; p < t.panels; ++p) {
      const int64_t at = first * w.outputs + (panel + p) * kPanel;
      t.out[p] = out + at;
      t.residual[p] = residual == nullptr ? nullptr : residual + at;
    }
    k.tile(t);
  });
}

// hidden[rows, F] = act(gate) * up; gate and up are the two halves of w's outputs, F a multiple of 16. Row 0 of hidden is row
// `begin` of a.
void add_gated(Phases& phases, const Rows& a, const Weight& w, const float* bias, int64_t begin, int64_t rows, float* hidden,
               Activation activation, int threads) {
  const int64_t half = w.panels() / 2, width = half * kPanel;
  // Panels of one group whose ups lie in one group too, which is the rule.
  struct Stretch {
    int64_t first, panels;
  };
  std::vector<Stretch> pairs;
  for (int64_t at = 0, count; at < half; at += count) {
    count = std::min<int64_t>({half - at, w.run(at).panels, w.run(half + at).panels});
    pairs.push_back({at, count});
  }
  const Deal deal(static_cast<int64_t>(pairs.size()), rows, threads);
  deal.add(phases, threads, [=, &w, &k = kernels()](int64_t first, int64_t count, int64_t tile) {
    const auto [panel, panels] = pairs[tile];
    Tile t{};
    t.a = a;
    t.first_row = begin + first;
    t.rows = count;
    t.inputs = w.inputs;
    t.out_stride = width;
    t.activation = activation;
    w.place(t, panel, panels, bias);
    w.place(t, half + panel, panels, bias);
    for (int64_t p = 0; p < panels; ++p) t.out[p] = hidden + first * width + (panel + p) * kPanel;
    k.tile(t);
  });
}

constexpr char kBias[] = "the bias does not fit the weights";

bool fits(const F32& bias, int64_t outputs) {
  return bias.element_count() == 0 || static_cast<int64_t>(bias.element_count()) == outputs;
}

ffi::Error linear(ffi::ThreadPool pool, F32 x, F32 gain, U8 bytes, S32 form, F32 bias, F32 residual,
                  ffi::ResultBuffer<ffi::F32> out, float eps) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = out->dimensions()[1];
  Weight weight;
  if (const char* wrong = weight.read(bytes, form, outputs, inputs)) return ffi::Error::InvalidArgument(wrong);
  if (!fits(bias, outputs)) return ffi::Error::InvalidArgument(kBias);
  if (residual.element_count() != 0 && residual.element_count() != out->element_count()) {
    return ffi::Error::InvalidArgument("the residual does not fit the result");
  }
  const Rounding a = rounding(x.typed_data(), rows, inputs, optional(gain), eps, weight.rotated, 0);
  Phases phases;
  add_rounding(phases, a, 0, rows);
  add_product(phases, a.to, weight, optional(bias), 0, rows, out->typed_data(), optional(residual),
              Phases::max_workers(pool));
  phases.run(pool);
  if (rehearsing()) std::memset(out->typed_data(), 0, out->size_bytes());
  return ffi::Error::Success();
}

ffi::Error gated_mlp(ffi::ThreadPool pool, F32 x, F32 gain, U8 up_bytes, S32 up_form, F32 up_bias, U8 down_bytes,
                     S32 down_form, F32 down_bias, F32 residual, ffi::ResultBuffer<ffi::F32> out, float eps,
                     int64_t activation, int64_t width) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = out->dimensions()[1];
  Weight up, down;
  if (const char* wrong = up.read(up_bytes, up_form, 2 * width, inputs)) return ffi::Error::InvalidArgument(wrong);
  if (const char* wrong = down.read(down_bytes, down_form, outputs, width)) return ffi::Error::InvalidArgument(wrong);
  if (width % kPanel != 0) return ffi::Error::InvalidArgument("the hidden width is not a multiple of 16");
  if (!fits(up_bias, 2 * width) || !fits(down_bias, outputs)) return ffi::Error::InvalidArgument(kBias);
  // A group of rows goes through the whole block before the next: its hidden values stay in the cache.
  const int64_t group = std::min<int64_t>(rows, kMostRows);
  const int threads = Phases::max_workers(pool);
  const Rounding a = rounding(x.typed_data(), rows, inputs, optional(gain), eps, up.rotated, 0);
  float* hidden = static_cast<float*>(scratch(1, group * width * sizeof(float)));
  const Rounding h = rounding(hidden, group, width, nullptr, 0.0f, down.rotated, 2);
  const float* rest = optional(residual);
  Phases phases;
  add_rounding(phases, a, 0, rows);
  for (int64_t begin = 0; begin < rows; begin += group) {
    const int64_t count = std::min(group, rows - begin);
    add_gated(phases, a.to, up, optional(up_bias), begin, count, hidden, static_cast<Activation>(activation), threads);
    add_rounding(phases, h, 0, count);
    add_product(phases, h.to, down, optional(down_bias), 0, count, out->typed_data() + begin * outputs,
                rest == nullptr ? nullptr : rest + begin * outputs, threads);
  }
  phases.run(pool);
  if (rehearsing()) std::memset(out->typed_data(), 0, out->size_bytes());
  return ffi::Error::Success();
}

// Rows of a table by their ids, [T, inputs]; zeros for ids outside it.
ffi::Error rows_of(ffi::ThreadPool pool, S32 ids, U8 bytes, S32 form, ffi::ResultBuffer<ffi::F32> out, int64_t outputs) {
  const int64_t count = static_cast<int64_t>(ids.element_count()), inputs = out->dimensions()[1];
  Weight weight;
  if (const char* wrong = weight.read(bytes, form, outputs, inputs)) return ffi::Error::InvalidArgument(wrong);
  parallel_for(pool, count, [&, &k = kernels()](int64_t i, int) {
    float* to = out->typed_data() + i * inputs;
    const int64_t id = ids.typed_data()[i];
    if (id < 0 || id >= outputs) {
      std::fill(to, to + inputs, 0.0f);
      return;
    }
    float* whole = static_cast<float*>(scratch(5, padded(inputs) * sizeof(float)));
    k.channel(weight.run(id / kPanel, 1), inputs, static_cast<int>(id % kPanel), whole);
    if (weight.rotated) {
      for (int64_t at = 0; at < inputs; at += int8::kGroup) int8::rotate_group(whole + at);
      for (int64_t at = 0; at < inputs; ++at) whole[at] *= int8::kRotation;
    }
    std::copy(whole, whole + inputs, to);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::blocks

JAXSERVE_HANDLER(jaxserve_blocks_linear, jaxserve::blocks::linear,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::blocks::F32>()  // x [T, I]
                     .Arg<jaxserve::blocks::F32>()  // gain [I] or [0]
                     .Arg<jaxserve::blocks::U8>()   // weight: bytes, forms, bias [O] or [0]
                     .Arg<jaxserve::blocks::S32>()
                     .Arg<jaxserve::blocks::F32>()
                     .Arg<jaxserve::blocks::F32>()  // residual [T, O] or [0]
                     .Ret<jaxserve::blocks::F32>()  // [T, O]
                     .Attr<float>("eps"));

JAXSERVE_HANDLER(jaxserve_blocks_gated_mlp, jaxserve::blocks::gated_mlp,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::blocks::F32>()  // x [T, D]
                     .Arg<jaxserve::blocks::F32>()  // gain [D] or [0]
                     .Arg<jaxserve::blocks::U8>()   // gate and up: bytes, forms, bias
                     .Arg<jaxserve::blocks::S32>()
                     .Arg<jaxserve::blocks::F32>()
                     .Arg<jaxserve::blocks::U8>()   // down: bytes, forms, bias
                     .Arg<jaxserve::blocks::S32>()
                     .Arg<jaxserve::blocks::F32>()
                     .Arg<jaxserve::blocks::F32>()  // residual [T, D] or [0]
                     .Ret<jaxserve::blocks::F32>()  // [T, D]
                     .Attr<float>("eps")
                     .Attr<int64_t>("activation")
                     .Attr<int64_t>("width"));

JAXSERVE_HANDLER(jaxserve_blocks_rows, jaxserve::blocks::rows_of,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::blocks::S32>()  // ids [T]
                     .Arg<jaxserve::blocks::U8>()
                     .Arg<jaxserve::blocks::S32>()
                     .Ret<jaxserve::blocks::F32>()  // [T, I]
                     .Attr<int64_t>("outputs"));
