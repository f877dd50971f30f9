// Feed-forward experts whose weights are in blocks, as int8_experts.cc has them in int8: rows are sorted by expert, and each chosen
// expert's panels are read where they lie.

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks/weight.h"
#include "experts.h"

namespace jaxserve::blocks {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U8 = ffi::Buffer<ffi::U8>;

constexpr int64_t kRowBlock = 48;  // rows of a tile, which stay in the cache beside its weights

// Neighbouring panels of an expert that lie in one group, for all rows of a task.
struct Part {
  const Routing::Task* task;
  int64_t panel, panels;  // the expert's own
};

// The parts of all tasks, task by task: `count` panels of each expert; with `paired`, those that lie `paired` panels behind each are
// its own too. `each`: panels that an expert has.
std::vector<Part> parts_of(const std::vector<Routing::Task>& tasks, const Weight& w, int64_t each, int64_t count, int64_t paired) {
  std::vector<Part> parts;
  for (const Routing::Task& task : tasks) {
    const int64_t begin = task.expert * each;
    for (int64_t at = 0, now; at < count; at += now) {
      now = std::min<int64_t>(count - at, w.run(begin + at).panels);
      if (paired != 0) now = std::min<int64_t>(now, w.run(begin + paired + at).panels);
      parts.push_back({&task, at, now});
    }
  }
  return parts;
}

// Several parts are taken at once where there are many: they lie one behind the other, and what is fetched ahead is of use then.
template <typename F>
void add_parts(Phases& phases, const std::vector<Part>& parts, int threads, F fn) {
  const int64_t count = static_cast<int64_t>(parts.size()), together = std::clamp<int64_t>(count / (8 * threads), 1, 8);
  phases.add(in_rehearsal(ceil_div(count, together)), [=, &parts](int64_t chunk, int) {
    const int64_t end = rehearsing() ? chunk * together + 1 : std::min(count, (chunk + 1) * together);
    for (int64_t i = chunk * together; i < end; ++i) fn(parts[i]);
  });
}

// Rounds rows of x, each into its place.
void add_rounding(Phases& phases, const Rounding& r, int64_t rows) {
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, 16384 / r.width));
  phases.add(in_rehearsal(ceil_div(rows, step)), [=, &k = kernels()](int64_t chunk, int) {
    for (int64_t row = chunk * step; row < std::min(rows, (chunk + 1) * step); ++row) k.round_row(r, row);
  });
}

Rounding rounding(int slot, const float* x, int64_t rows, int64_t width, bool rotated) {
  return {x, width, nullptr, 0.0f, rotated, Rows(static_cast<uint8_t*>(scratch(slot, Rows::bytes(rows, width))), width)};
}

// Products without gates: y [rows, O] of rows sorted by expert.
void add_products(Phases& phases, const std::vector<Part>& parts, int threads, const Rows& rows, const Weight& w, int64_t I,
                  int64_t O, const float* bias, float* y) {
  add_parts(phases, parts, threads, [=, &w, &kernel = kernels()](const Part& part) {
    Tile t{};
    t.a = rows;
    t.first_row = part.task->first;
    t.rows = part.task->rows;
    t.inputs = I;
    t.out_stride = O;
    w.place(t, part.task->expert * (O / kPanel) + part.panel, part.panels, bias);
    for (int64_t p = 0; p < part.panels; ++p) t.out[p] = y + part.task->first * O + (part.panel + p) * kPanel;
    kernel.tile(t);
  });
}

bool fits(const F32& bias, int64_t outputs) {
  return bias.element_count() == 0 || static_cast<int64_t>(bias.element_count()) == outputs;
}

ffi::Error experts(ffi::ThreadPool pool, F32 x, S32 ids, F32 weights, U8 up_bytes, S32 up_form, F32 up_bias, U8 down_bytes,
                   S32 down_form, F32 down_bias, ffi::ResultBuffer<ffi::F32> out, int64_t num_experts, int64_t width,
                   int64_t activation) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], k = ids.dimensions()[1], E = num_experts, F = width;
  if (F % kPanel != 0 || D % kPanel != 0) return ffi::Error::InvalidArgument("an expert's channels are no whole panels");
  Weight up, down;
  if (const char* wrong = up.read(up_bytes, up_form, E * 2 * F, D)) return ffi::Error::InvalidArgument(wrong);
  if (const char* wrong = down.read(down_bytes, down_form, E * D, F)) return ffi::Error::InvalidArgument(wrong);
  if (!fits(up_bias, E * 2 * F) || !fits(down_bias, E * D)) {
    return ffi::Error::InvalidArgument("the biases do not fit the experts");
  }
  const float* ups_bias = up_bias.element_count() == 0 ? nullptr : up_bias.typed_data();
  const float* downs_bias = down_bias.element_count() == 0 ? nullptr : down_bias.typed_data();
  const Routing routing(ids.typed_data(), T, k, E, kRowBlock);
  const int64_t M = routing.rows, half = F / kPanel, downs = D / kPanel;
  const std::vector<Part> gates = parts_of(routing.tasks, up, 2 * half, half, half);
  const std::vector<Part> last = parts_of(routing.tasks, down, downs, downs, 0);

  const Rounding given = rounding(0, x.typed_data(), T, D, up.rotated);
  const Rows sorted(static_cast<uint8_t*>(scratch(1, Rows::bytes(M, D))), D);
  float* hidden = static_cast<float*>(scratch(3, M * F * sizeof(float)));
  const Rounding narrow = rounding(2, hidden, M, F, down.rotated);
  float* y = static_cast<float*>(scratch(4, M * D * sizeof(float)));
  Phases phases;
  add_rounding(phases, given, T);
  phases.add(M, [=, &token = routing.token](int64_t m, int) {
    std::memcpy(sorted.row(m), given.to.row(token[m]), sorted.stride);
  });
  const int threads = Phases::max_workers(pool);
  add_parts(phases, gates, threads, [=, &up, &kernel = kernels()](const Part& part) {
    const int64_t panel = part.task->expert * 2 * half + part.panel;
    Tile t{};
    t.a = sorted;
    t.first_row = part.task->first;
    t.rows = part.task->rows;
    t.inputs = D;
    t.out_stride = F;
    t.activation = static_cast<Activation>(activation);
    up.place(t, panel, part.panels, ups_bias);
    up.place(t, panel + half, part.panels, ups_bias);
    for (int64_t p = 0; p < part.panels; ++p) t.out[p] = hidden + part.task->first * F + (part.panel + p) * kPanel;
    kernel.tile(t);
  });
  add_rounding(phases, narrow, M);
  add_products(phases, last, threads, narrow.to, down, F, D, downs_bias, y);
  routing.add_sums(phases, y, D, weights.typed_data(), out->typed_data());
  phases.run(pool);
  if (rehearsing()) std::memset(out->typed_data(), 0, out->size_bytes());
  return ffi::Error::Success();
}

// One product of rows that are sorted by expert already, for experts whose hidden values something else computes.
ffi::Error grouped(ffi::ThreadPool pool, F32 x, S32 sizes, U8 bytes, S32 form, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t M = x.dimensions()[0], I = x.dimensions()[1], O = out->dimensions()[1];
  const int64_t E = static_cast<int64_t>(sizes.element_count());
  if (O % kPanel != 0) return ffi::Error::InvalidArgument("an expert's channels are no whole panels");
  Weight w;
  if (const char* wrong = w.read(bytes, form, E * O, I)) return ffi::Error::InvalidArgument(wrong);
  std::vector<Routing::Task> tasks;
  int64_t first = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t count = std::clamp<int64_t>(sizes.typed_data()[e], 0, M - first);
    for (int64_t row = 0; row < count; row += kRowBlock) tasks.push_back({e, first + row, std::min(kRowBlock, count - row)});
    first += count;
  }
  float* y = out->typed_data();
  std::fill(y + first * O, y + M * O, 0.0f);  // nobody's rows
  const std::vector<Part> parts = parts_of(tasks, w, O / kPanel, O / kPanel, 0);
  const Rounding given = rounding(0, x.typed_data(), first, I, w.rotated);
  Phases phases;
  add_rounding(phases, given, first);
  add_products(phases, parts, Phases::max_workers(pool), given.to, w, I, O, nullptr, y);
  phases.run(pool);
  if (rehearsing()) std::memset(y, 0, out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve::blocks

JAXSERVE_HANDLER(jaxserve_blocks_grouped, jaxserve::blocks::grouped,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::blocks::F32>()  // x [M, I], sorted by expert
                     .Arg<jaxserve::blocks::S32>()  // rows of each expert [E]
                     .Arg<jaxserve::blocks::U8>()   // bytes and forms of all experts' matrices
                     .Arg<jaxserve::blocks::S32>()
                     .Ret<jaxserve::blocks::F32>());  // [M, O], zeros behind the last expert's rows

JAXSERVE_HANDLER(jaxserve_blocks_experts, jaxserve::blocks::experts,
                 xla::ffi::Ffi::Bind()
                     .Ctx<xla::ffi::ThreadPool>()
                     .Arg<jaxserve::blocks::F32>()  // x [T, D]
                     .Arg<jaxserve::blocks::S32>()  // ids [T, k]
                     .Arg<jaxserve::blocks::F32>()  // weights [T, k]
                     .Arg<jaxserve::blocks::U8>()   // gates and ups of all experts: bytes, forms, bias
                     .Arg<jaxserve::blocks::S32>()
                     .Arg<jaxserve::blocks::F32>()
                     .Arg<jaxserve::blocks::U8>()   // downs: bytes, forms, bias
                     .Arg<jaxserve::blocks::S32>()
                     .Arg<jaxserve::blocks::F32>()
                     .Ret<jaxserve::blocks::F32>()  // [T, D]
                     .Attr<int64_t>("num_experts")
                     .Attr<int64_t>("width")
                     .Attr<int64_t>("activation"));
