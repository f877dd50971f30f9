// What the calls of int8 products are made of: phases of rounding and of products, and how threads share them. Included by the files
// that have handlers.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "int8_operands.h"
#include "lora.h"

namespace jaxserve::int8 {
namespace {

// Rows a block of a large product: 48 rows of 1,536 bytes stay in L1 and L2 beside a block's weights.
constexpr int64_t kRowBlock = 48;
static_assert(kRowBlock == lora::kRows);
constexpr int64_t kLasting = 3 << 20;  // floats of a result that caches do not hold

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
      const float* const residual = b.residual[p] == nullptr ? nullptr : b.residual[p] + i * b.out_stride;
      const float* const bias = b.bias[p];
      if (bias == nullptr && residual == nullptr)
        std::fill_n(out, b.valid[p], 0.0f);
      else if (bias == nullptr)
        std::copy_n(residual, b.valid[p], out);
      else
        for (int c = 0; c < b.valid[p]; ++c) out[c] = residual == nullptr ? bias[c] : bias[c] + residual[c];
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

// Computes a block, but multiplies no rows of zeros, of which `zero(row)` tells. Padding of a step is zeros from the embedding on, so a
// step takes the time of the rows that it has and not of those that its program was compiled for.
template <typename Z>
inline void multiply(const Kernels& k, const Block& b, const Z& zero) {
  const bool gates = b.activation != Activation::kNone;
  const bool known = b.after == Activation::kNone &&
                     (!gates || std::all_of(b.bias, b.bias + b.panels, [](const float* bias) { return bias == nullptr; }));
  for (int64_t row = 0, end; row < b.rows; row = end) {
    const bool none = known && zero(row);
    for (end = row + 1; end < b.rows && (known && zero(end)) == none;) ++end;
    if (none)
      fill_zero_rows(b, row, end - row);
    else if (end - row == b.rows)
      k.block(b);
    else
      k.block(part_of(b, row, end - row));
  }
}

inline void multiply(const Kernels& k, const Block& b) {
  multiply(k, b, [&](int64_t row) { return is_zero(b.a, row); });
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

// A row's first line says nearly always whether it is padding.
inline bool seems_alive(const float* row, int64_t width) {
  return std::any_of(row, row + std::min<int64_t>(width, 16), [](float x) { return x != 0.0f; });
}

// A rounded row of zeros: whatever its data are, they are multiplied by zero, if at all.
inline void round_zeros(const Rounding& r, int64_t row) { std::fill_n(r.scale + r.at(row), r.groups, 0.0f); }

// Where rows are cut: part i of them is [ends[i], ends[i + 1]).
using Cut = std::vector<int64_t>;

// In blocks of as many as adapters' products are made for.
inline Cut in_blocks(int64_t rows) {
  Cut cut{0};
  while (cut.back() < rows) cut.push_back(std::min(rows, cut.back() + kRowBlock));
  return cut;
}

// Rows cut into stretches, of which each thread begins with its own in all phases of a call, so that what it computes with lies in its
// own cache: what another core has written can take as long to fetch as dozens of rows' products take. Two threads that shared 64 rows
// by columns made 450 thousand million operations a second in an hour in which they made 600 with 32 rows each. All stretches have as
// many rows that are not zeros.
class Stretches {
 public:
  Stretches(const float* x, int64_t rows, int64_t width, int workers) : cut_{0} {
    if (rows >= kLeastRows * workers) divide(x, rows, width, workers);
    cut_.push_back(rows);
    many_ = count() >= kMany * workers;
  }
  int64_t count() const { return static_cast<int64_t>(cut_.size()) - 1; }
  int64_t begin(int64_t i) const { return cut_[i]; }
  int64_t rows(int64_t i) const { return cut_[i + 1] - cut_[i]; }
  // Whether a product with these weights, all of which each thread reads then, is to be shared so.
  bool worth(const Weight& w, const Change& change) const {
    return change.beside == nullptr && each_ >= kLeastRows && w.panels * w.quads * 4 * kPanel <= kMostBytes;
  }
  // Whether there are so many that a thread may take each through the whole call, with nothing to wait for in between. Of fewer
  // the last one would be waited for, as a thread that was asleep comes late.
  bool many() const { return many_; }
  const Cut& cut() const { return cut_; }

 private:
  static constexpr int64_t kLeastRows = 16;
  static constexpr int64_t kMany = 4;  // a thread
  static constexpr int64_t kMostBytes = 8 << 20;
  void divide(const float* x, int64_t rows, int64_t width, int workers) {
    std::vector<char> alive(rows);
    int64_t live = 0;
    for (int64_t row = 0; row < rows; ++row) live += alive[row] = seems_alive(x + row * width, width);
    each_ = ceil_div(live, workers * std::max<int64_t>(1, ceil_div(live, workers * kRowBlock)));
    for (int64_t row = 0, have = 0; row < rows; ++row)
      if (alive[row] && have++ == each_) cut_.push_back(row), have = 1;
  }
  Cut cut_;
  int64_t each_ = 0;
  bool many_;
};

// Room for a block's change; the worker's thread owns it.
inline float* cleared_change(int64_t rows) {
  const size_t bytes = rows * kPanels * kPanel * sizeof(float);
  return static_cast<float*>(std::memset(scratch(5, bytes), 0, bytes));
}

// Rounds a row, of which the mean is taken off before where there is a norm that does so.
inline void round_row(const Kernels& k, const Rounding& r, const Norm* centred, int64_t row) {
  if (centred == nullptr) {
    const float* const x = r.x + row * r.stride;
    const bool zero = !seems_alive(x, r.width) && std::all_of(x, x + r.width, [](float value) { return value == 0.0f; });
    return zero ? round_zeros(r, row) : k.round_row(r, row);
  }
  float* const normed = static_cast<float*>(scratch(3, r.width * sizeof(float)));
  norm_row()(*centred, r.x + row * r.stride, normed);
  Rounding one = r;
  one.x = normed;
  one.stride = 0;
  k.round_row(one, row);
}

// Rows rounded by the thread that asks, in its own room.
inline Rounding rounded(const Kernels& k, const float* x, int64_t rows, int64_t width, const float* gain, float eps, bool rotated,
                        int slot, const Norm* centred = nullptr) {
  const Rounding r = rounding(x, rows, width, gain, eps, rotated, slot);
  for (int64_t row = 0; row < rows; ++row) round_row(k, r, centred, row);
  return r;
}

// Rounds rows; adapters take the same rows as they were. `centred`, where there is one, stands in place of r's gain.
inline void add_rounding(Phases& phases, const Rounding& r, int64_t rows, const Change& change, int workers,
                         const Norm* centred = nullptr) {
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(16, 4096 / r.width));  // a few rows are shared, too
  const auto [first, last] =
      change.beside == nullptr ? std::pair<int64_t, int64_t>{0, 0} : change.beside->blocks(change.origin, rows);
  const auto body = [=, &k = kernels()](int64_t chunk, int) {
    if (chunk < last - first) return change.beside->shrink(first + chunk, r.x, change.origin, r.gain, r.eps);
    const int64_t begin = (chunk - (last - first)) * step, end = std::min(rows, begin + step);
    for (int64_t row = begin; row < end; ++row) round_row(k, r, centred, row);
  };
  const int64_t chunks = in_rehearsal(last - first + ceil_div(rows, step));
  if (change.beside == nullptr)
    phases.add_apart(chunks, workers, body);
  else
    phases.add(chunks, body);
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

// Whether a result is too large to be read from a cache.
inline bool is_lasting(int64_t rows, const Weight& w, const float* out) {
  return rows * w.outputs >= kLasting && w.outputs % kPanel == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// out[rows, outputs] = act(a W^T * scales + bias + change) + residual, the rows cut as given.
inline void add_product(Phases& phases, const Rounding& a, const Weight& w, const Cut& cut, float* out, const float* residual,
                        const Change& change, int workers, Activation after = Activation::kNone) {
  const int64_t rows = cut.back(), row_blocks = static_cast<int64_t>(cut.size()) - 1;
  const Columns columns(w.panels, kPanels, rows, change);
  const bool lasting = is_lasting(rows, w, out);
  add_blocks(phases, row_blocks * columns.count(), workers, [=, &k = kernels()](int64_t chunk) {
    const int64_t first = cut[chunk / columns.count()], count = cut[chunk / columns.count() + 1] - first, at = first * w.outputs;
    const int64_t panel = columns.begin(chunk % columns.count()), end = columns.begin(chunk % columns.count() + 1);
    Block b = block_of(rows_from(a, first), count, w, panel, end - panel, out + at, residual == nullptr ? nullptr : residual + at,
                       after);
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
        change.ahead(fetch, cut[next / columns.count()], columns.begin(at) * kPanel, end);
      b.fetch = &fetch;
    }
    multiply(k, b);
  });
}

// Which of some rounded rows are zeros: asked once for all blocks of a product.
class Zeros {
 public:
  Zeros(const Rows& a, int64_t rows) : zero_(rows) {
    for (int64_t row = 0; row < rows; ++row) zero_[row] = is_zero(a, row);
  }
  bool operator()(int64_t row) const { return zero_[row] != 0; }

 private:
  std::vector<char> zero_;
};

// All of a product of a few rows, by one thread.
inline void product_of(const Kernels& k, const Rounding& a, int64_t rows, const Weight& w, float* out, const float* residual,
                       Activation after, bool lasting = false) {
  constexpr int kPair = 2;
  const Rows from = rows_from(a, 0);
  const Zeros zeros(from, rows);
  for (int64_t panel = 0; panel < w.panels; panel += kPair) {
    Block b = block_of(from, rows, w, panel, std::min<int64_t>(kPair, w.panels - panel), out, residual, after);
    b.lasting = lasting;
    for (int p = 0; p < kPair && panel + kPair + p < w.panels; ++p) b.next[p] = b.weight[0] + (kPair + p) * w.quads * 4 * kPanel;
    multiply(k, b, zeros);
  }
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
