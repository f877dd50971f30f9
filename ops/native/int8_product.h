// What the calls of int8 products are made of: operands as XLA gives them, and phases of rounding and of products. Included by the
// files that have handlers.

#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "int8.h"
#include "lora.h"
#include "norm.h"

namespace jaxserve::int8 {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S16 = ffi::Buffer<ffi::S16>;

// Rows a block of a large product: 48 rows of 1,536 bytes stay in L1 and L2 beside a block's weights.
constexpr int64_t kRowBlock = 48;
static_assert(kRowBlock == lora::kRows);
constexpr int64_t kLasting = 3 << 20;  // floats of a result that caches do not hold

struct Weight {
  const int8_t* packed;   // [panels][quads][16][4]
  const float* scale;     // [panels * 16]
  const int16_t* sums;    // [panels][groups][16]
  const float* bias;      // [outputs] or null
  int64_t outputs, inputs, panels, quads, groups;
};

constexpr char kRagged[] = "a rotated weight's inputs are a multiple of 64";
constexpr char kNorm[] = "a norm's scale or bias is of another width than its rows";

inline const float* optional(const F32& buffer) { return buffer.element_count() == 0 ? nullptr : buffer.typed_data(); }

inline ffi::ErrorOr<Weight> weight_of(const S8& packed, const F32& scale, const S16& sums, const F32& bias, int64_t outputs,
                               int64_t inputs) {
  const auto dims = packed.dimensions();
  if (dims.size() != 4 || dims[0] != ceil_div(outputs, kPanel) || dims[1] != ceil_div(inputs, 4) ||
      dims[2] != kPanel || dims[3] != 4) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("int8 weights are packed for another shape"));
  }
  const int64_t padded = dims[0] * kPanel, groups = ceil_div(inputs, kGroup);
  if (static_cast<int64_t>(scale.element_count()) != padded ||
      static_cast<int64_t>(sums.element_count()) != padded * groups) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("int8 scales or sums do not fit the packed weights"));
  }
  if (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != outputs) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("the bias does not fit the weights"));
  }
  return Weight{packed.typed_data(), scale.typed_data(), sums.typed_data(), optional(bias),
                outputs,             inputs,             dims[0],           dims[1], groups};
}

// The norm of a product's rows as XLA gives it: x / rms(x) * gain, which the rounding does, or a centred one.
struct Normed {
  F32 gains, shifts;
  float eps;
  bool centred;

  bool fits(int64_t width) const {
    const auto fits = [&](const F32& of) { return of.element_count() == 0 || static_cast<int64_t>(of.element_count()) == width; };
    return fits(gains) && (!centred || fits(shifts));
  }
  const float* gain() const { return centred ? nullptr : optional(gains); }
  Norm row(int64_t width) const {
    return {width, optional(gains), centred ? optional(shifts) : nullptr, eps, centred};
  }
};

// Room for rounded rows; the caller's thread owns it.
inline Rounding rounding(const float* x, int64_t rows, int64_t width, const float* gain, float eps, bool rotated, int slot) {
  const int64_t groups = ceil_div(width, kGroup);
  uint8_t* data = static_cast<uint8_t*>(scratch(slot, rows * groups * (kGroup + sizeof(float))));
  return {x, width, width, gain, eps, data, groups, reinterpret_cast<float*>(data + rows * groups * kGroup),
          rotated};
}

inline Rows rows_from(const Rounding& r, int64_t row) {
  return {r.data + row * r.groups * kGroup, r.scale + row * r.groups, r.groups * kGroup};
}

// Whether a rounded row is zeros.
inline bool is_zero(const Rows& a, int64_t row) {
  const int64_t groups = a.stride / kGroup;
  const float* scale = a.scale + row * groups;
  return std::all_of(scale, scale + groups, [](float s) { return s == 0.0f; });
}

// A block's result for `count` rows of zeros: bias and residual are all of it.
inline void fill_zero_rows(const Block& b, int64_t row, int64_t count) {
  const int outputs = b.activation == Activation::kNone ? b.panels : b.panels / 2;
  for (int64_t i = row; i < row + count; ++i) {
    for (int p = 0; p < outputs; ++p) {
      float* const out = b.out[p] + i * b.out_stride;
      for (int c = 0; c < b.valid[p]; ++c) {
        const float bias = b.bias[p] == nullptr ? 0.0f : b.bias[p][c];
        out[c] = b.residual[p] == nullptr ? bias : bias + b.residual[p][i * b.out_stride + c];
      }
    }
  }
}

// The part of a block that begins `row` rows later and has `rows` rows.
inline Block part_of(const Block& b, int64_t row, int64_t rows) {
  Block part = b;
  part.a.data += row * b.a.stride;
  part.a.scale += row * (b.a.stride / kGroup);
  part.rows = rows;
  if (b.change != nullptr) part.change += row * kPanels * kPanel;
  for (int p = 0; p < b.panels; ++p) {
    if (b.out[p] != nullptr) part.out[p] += row * b.out_stride;
    if (b.residual[p] != nullptr) part.residual[p] += row * b.out_stride;
  }
  return part;
}

// Computes a block, but multiplies no rows of zeros. Padding of a step is zeros from the embedding on, so a step takes the time of
// the rows that it has and not of those that its program was compiled for.
inline void multiply(const Kernels& k, const Block& b) {
  const bool gates = b.activation != Activation::kNone;
  const bool known = b.after == Activation::kNone &&
                     (!gates || std::all_of(b.bias, b.bias + b.panels, [](const float* bias) { return bias == nullptr; }));
  for (int64_t row = 0, end; row < b.rows; row = end) {
    const bool zero = known && is_zero(b.a, row);
    for (end = row + 1; end < b.rows && (known && is_zero(b.a, end)) == zero;) ++end;
    if (zero)
      fill_zero_rows(b, row, end - row);
    else if (end - row == b.rows)
      k.block(b);
    else
      k.block(part_of(b, row, end - row));
  }
}

// What adapters add to a product of some rows: row 0 of what is given to it is row `origin` of the batch.
struct Change {
  lora::Beside* beside = nullptr;  // or null, where nobody has one
  int64_t origin = 0;

  // The change of some columns of a block of rows, which lie from panel `panel` of the block on.
  void expand(float* change, int64_t row, int64_t begin, int64_t end, int panel) const {
    beside->expand(origin + row, begin, end, change + panel * kPanel, kPanels * kPanel);
  }
  void ahead(Fetch& fetch, int64_t row, int64_t begin, int64_t end) const {
    beside->ahead(origin + row, begin, end, fetch);
  }
};

// Room for a block's change; the worker's thread owns it.
inline float* cleared_change(int64_t rows) {
  const size_t bytes = rows * kPanels * kPanel * sizeof(float);
  return static_cast<float*>(std::memset(scratch(5, bytes), 0, bytes));
}

// Rounds a row, of which the mean is taken off before where there is a norm that does so.
inline void round_row(const Kernels& k, const Rounding& r, const Norm* centred, int64_t row) {
  if (centred == nullptr) return k.round_row(r, row);
  float* const normed = static_cast<float*>(scratch(3, r.width * sizeof(float)));
  norm_row()(*centred, r.x + row * r.stride, normed);
  Rounding one = r;
  one.x = normed;
  one.stride = 0;
  k.round_row(one, row);
}

// Rounds rows; adapters take the same rows as they were. `centred`, where there is one, stands in place of r's gain.
inline void add_rounding(Phases& phases, const Rounding& r, int64_t rows, const Change& change, const Norm* centred = nullptr) {
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, 4096 / r.width));  // a few rows are shared, too
  const auto [first, last] =
      change.beside == nullptr ? std::pair<int64_t, int64_t>{0, 0} : change.beside->blocks(change.origin, rows);
  phases.add(in_rehearsal(last - first + ceil_div(rows, step)), [=, &k = kernels()](int64_t chunk, int) {
    if (chunk < last - first) {
      return change.beside->shrink(first + chunk, r.x, change.origin, r.gain, r.eps);
    }
    const int64_t begin = (chunk - (last - first)) * step, end = std::min(rows, begin + step);
    for (int64_t row = begin; row < end; ++row) round_row(k, r, centred, row);
  });
}

// Few rows read four panels at a time, more rows two. Of the wide blocks two narrow ones are at the end: with few blocks a thread
// (576 channels are 9) the last one decides.
struct Columns {
  int64_t units, wide, narrow;
  // `most`: units of a wide block.
  Columns(int64_t total, int64_t most, int64_t rows, const Change& change) : units(total) {
    const bool few = rows <= 3 || change.beside != nullptr;
    const int64_t width = few ? most : most / 2;
    narrow = few && width > 1 && total > width ? 2 : 0;
    wide = ceil_div(total - (narrow ? width : 0), width);
    step = width;
  }
  int64_t count() const { return wide + narrow; }
  int64_t begin(int64_t i) const {
    const int64_t middle = units - (narrow ? step : 0);
    if (i <= wide) return std::min(i * step, middle);
    return i == wide + 1 ? middle + step / 2 : units;
  }
  int64_t step;
};

// A phase of blocks that lie side by side: `fn(block)`. Where there are many, a few are taken at once: to take one costs 0.2 us, and
// two panels of 16 rows 2.5.
template <typename F>
void add_blocks(Phases& phases, int64_t blocks, int workers, F fn) {
  const int64_t count = in_rehearsal(blocks), together = std::clamp<int64_t>(count / (32 * workers), 1, 8);
  phases.add_apart(ceil_div(count, together), workers, [=](int64_t chunk, int) {
    for (int64_t i = chunk * together; i < std::min(count, (chunk + 1) * together); ++i) fn(i);
  });
}

// Some panels of a product, w's from `panel` on: a's rows and those of `out` and `residual` begin with the block's.
inline Block block_of(const Rows& a, int64_t rows, const Weight& w, int64_t panel, int64_t panels, float* out,
                      const float* residual, Activation after) {
  Block b{};
  b.a = a;
  b.rows = rows;
  b.quads = w.quads;
  b.panels = static_cast<int>(panels);
  b.out_stride = w.outputs;
  b.after = after;
  for (int p = 0; p < b.panels; ++p) {
    const int64_t column = (panel + p) * kPanel;
    b.weight[p] = w.packed + (panel + p) * w.quads * 4 * kPanel;
    b.sums[p] = w.sums + column * w.groups;
    b.scale[p] = w.scale + column;
    b.bias[p] = w.bias == nullptr ? nullptr : w.bias + column;
    b.valid[p] = static_cast<int>(std::min<int64_t>(kPanel, w.outputs - column));
    b.out[p] = out + column;
    b.residual[p] = residual == nullptr ? nullptr : residual + column;
  }
  return b;
}

// out[rows, outputs] = act(a W^T * scales + bias + change) + residual
inline void add_product(Phases& phases, const Rounding& a, const Weight& w, int64_t rows, float* out, const float* residual,
                        const Change& change, int workers, Activation after = Activation::kNone) {
  const Columns columns(w.panels, kPanels, rows, change);
  const int64_t row_blocks = ceil_div(rows, kRowBlock);
  const bool lasting = rows * w.outputs >= kLasting && w.outputs % kPanel == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  add_blocks(phases, row_blocks * columns.count(), workers, [=, &k = kernels()](int64_t chunk) {
    const int64_t first = chunk / columns.count() * kRowBlock, at = first * w.outputs;
    const int64_t panel = columns.begin(chunk % columns.count()), end = columns.begin(chunk % columns.count() + 1);
    Block b = block_of(rows_from(a, first), std::min(rows - first, kRowBlock), w, panel, end - panel, out + at,
                       residual == nullptr ? nullptr : residual + at, after);
    b.lasting = lasting;
    const int64_t later = (chunk + 1) % columns.count();  // what the thread most likely does next
    if (chunk + 1 < row_blocks * columns.count()) {
      const int64_t at = columns.begin(later), end = columns.begin(later + 1);
      for (int p = 0; at + p < end; ++p) b.next[p] = w.packed + (at + p) * w.quads * 4 * kPanel;
    }
    Fetch fetch;
    if (change.beside != nullptr) {
      float* const sums = cleared_change(b.rows);
      change.expand(sums, first, panel * kPanel, std::min(w.outputs, (panel + b.panels) * kPanel), 0);
      b.change = sums;
      const int64_t next = chunk + 1, at = next % columns.count();
      const int64_t end = std::min(w.outputs, columns.begin(at + 1) * kPanel);
      if (next < row_blocks * columns.count())
        change.ahead(fetch, next / columns.count() * kRowBlock, columns.begin(at) * kPanel, end);
      b.fetch = &fetch;
    }
    multiply(k, b);
  });
}

// All of a product of a few rows, by one thread.
inline void product_of(const Kernels& k, const Rounding& a, int64_t rows, const Weight& w, float* out, const float* residual,
                       Activation after) {
  constexpr int kPair = 2;
  for (int64_t panel = 0; panel < w.panels; panel += kPair) {
    Block b = block_of({a.data, a.scale, a.groups * kGroup}, rows, w, panel, std::min<int64_t>(kPair, w.panels - panel), out,
                       residual, after);
    for (int p = 0; p < kPair && panel + kPair + p < w.panels; ++p) b.next[p] = b.weight[0] + (kPair + p) * w.quads * 4 * kPanel;
    multiply(k, b);
  }
}

// hidden[rows, F] = act(gate) * up; gate and up are the two halves of w's outputs, F a multiple of 16. Row 0 of hidden
// is row `begin` of a.
inline void add_gated(Phases& phases, const Rounding& a, const Weight& w, int64_t begin, int64_t rows, float* hidden,
               Activation activation, const Change& change, int workers) {
  const int64_t half = w.panels / 2, width = half * kPanel;
  const Columns columns(half, kPanels / 2, rows, change);
  const int64_t row_blocks = ceil_div(rows, kRowBlock);
  add_blocks(phases, row_blocks * columns.count(), workers, [=, &k = kernels()](int64_t chunk) {
    const int64_t first = chunk / columns.count() * kRowBlock;
    const int64_t panel = columns.begin(chunk % columns.count());
    const int pairs = static_cast<int>(columns.begin(chunk % columns.count() + 1) - panel);
    Block b{};
    b.a = rows_from(a, begin + first);
    b.rows = std::min(rows - first, kRowBlock);
    b.quads = w.quads;
    b.panels = 2 * pairs;
    b.out_stride = width;
    b.activation = activation;
    for (int p = 0; p < b.panels; ++p) {
      const int64_t at = p < pairs ? panel + p : half + panel + p - pairs;
      b.weight[p] = w.packed + at * w.quads * 4 * kPanel;
      b.sums[p] = w.sums + at * kPanel * w.groups;
      b.scale[p] = w.scale + at * kPanel;
      b.bias[p] = w.bias == nullptr ? nullptr : w.bias + at * kPanel;
      b.valid[p] = kPanel;
      b.out[p] = p < pairs ? hidden + first * width + at * kPanel : nullptr;
      b.residual[p] = nullptr;
    }
    const int64_t later = (chunk + 1) % columns.count();
    if (chunk + 1 < row_blocks * columns.count()) {
      const int64_t from = columns.begin(later);
      const int count = static_cast<int>(std::min<int64_t>(columns.begin(later + 1) - from, pairs));
      for (int p = 0; p < count; ++p) {
        b.next[p] = w.packed + (from + p) * w.quads * 4 * kPanel;
        b.next[pairs + p] = w.packed + (half + from + p) * w.quads * 4 * kPanel;
      }
    }
    Fetch fetch;
    if (change.beside != nullptr) {
      float* const sums = cleared_change(b.rows);
      const int64_t gate = panel * kPanel, up = (half + panel) * kPanel;
      change.expand(sums, begin + first, gate, gate + pairs * kPanel, 0);
      change.expand(sums, begin + first, up, up + pairs * kPanel, pairs);
      b.change = sums;
      const int64_t next = chunk + 1, at = next % columns.count(), row = begin + next / columns.count() * kRowBlock;
      const int64_t from = columns.begin(at) * kPanel, to = columns.begin(at + 1) * kPanel;
      if (next < row_blocks * columns.count()) {
        change.ahead(fetch, row, from, to);
        change.ahead(fetch, row, width + from, width + to);
      }
      b.fetch = &fetch;
    }
    multiply(k, b);
  });
}

using lora::Beside;

// What adapters are given as: slot, a, b, and where B's stretches end.
struct Adapters {
  ffi::Buffer<ffi::S32> slot;
  ffi::AnyBuffer a, b;
  ffi::Span<const int64_t> ends;
};

// Reads a product's adapters, where it has some; `change` is left as it is where nobody has one. Null, or what is wrong.
inline const char* read(const Adapters* adapters, int64_t rows, int64_t inputs, int64_t outputs, Beside& beside, Change& change) {
  if (adapters == nullptr) return nullptr;
  const auto& [slot, a, b, ends] = *adapters;
  if (const char* wrong = beside.read(slot, a, b, ends, rows, inputs, outputs)) return wrong;
  if (!beside.idle()) change.beside = &beside;
  return nullptr;
}

}  // namespace
}  // namespace jaxserve::int8
