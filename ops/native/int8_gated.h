// A gated block's first half: act(gate) * up of rounded rows, rounded again. Included by the file that has its handler.

#pragma once

#include "int8_product.h"

namespace jaxserve::int8 {
namespace {

constexpr int64_t kGroupPanels = kGroup / kPanel;

// act(gate) * up of the 64 channels that are rounded together, for some rows: gate and up are the two halves of w's outputs, F a
// multiple of 16. The first row's go to `out`, the next ones' `stride` floats on. `ahead` is called with each block before it is
// computed and with its first panel.
template <typename Z, typename A>
inline void gate_group(const Kernels& k, const Rows& a, int64_t rows, const Weight& w, int64_t group, float* out, int64_t stride,
                       Activation activation, const Z& zero, const A& ahead) {
  const int64_t half = w.panels / 2, end = std::min(half, (group + 1) * kGroupPanels);
  constexpr int kPairs = kPanels / 2;
  for (int64_t panel = group * kGroupPanels; panel < end; panel += kPairs) {
    const int pairs = static_cast<int>(std::min<int64_t>(kPairs, end - panel));
    Block b{};
    b.a = a;
    b.rows = rows;
    b.quads = w.quads;
    b.panels = 2 * pairs;
    b.out_stride = stride;
    b.activation = activation;
    for (int p = 0; p < b.panels; ++p) {
      const int64_t at = p < pairs ? panel + p : half + panel + p - pairs;
      b.weight[p] = w.packed + at * w.quads * 4 * kPanel;
      b.sums[p] = w.sums + at * kPanel * w.groups;
      b.scale[p] = w.scale + at * kPanel;
      b.bias[p] = w.bias == nullptr ? nullptr : w.bias + at * kPanel;
      b.valid[p] = kPanel;
      b.out[p] = p < pairs ? out + (at - group * kGroupPanels) * kPanel : nullptr;
      if (at + pairs < (p < pairs ? half : w.panels)) b.next[p] = b.weight[p] + pairs * w.quads * 4 * kPanel;
    }
    ahead(b, panel);
    multiply(k, b, zero);
  }
}

// Rounds the 64 channels of `group` of some rows, which lie in `x` a group a row, to `h`, whose first row is theirs.
template <typename Z>
inline void round_group(const Kernels& k, const float* x, int64_t rows, const Rounding& h, int64_t group, const Z& zero) {
  Rounding one = h;
  one.x = x;
  one.stride = kGroup;
  one.width = std::min<int64_t>(kGroup, h.width - group * kGroup);
  one.data += group * kGroup;
  one.scale += group;
  one.apart = h.groups;
  one.groups = 1;
  for (int64_t row = 0; row < rows; ++row) zero(row) ? round_zeros(one, row) : k.round_row(one, row);
}

inline void nothing_ahead(Block&, int64_t) {}

// All of it for a few rows, by one thread.
inline void gate_of(const Kernels& k, const Rounding& a, int64_t rows, const Weight& w, const Rounding& h, Activation activation) {
  const Rows from = rows_from(a, 0);
  const Zeros zeros(from, rows);
  const auto nothing = [&](int64_t row) { return w.bias == nullptr && zeros(row); };
  float* const out = static_cast<float*>(scratch(7, rows * kGroup * sizeof(float)));
  for (int64_t group = 0; group < h.groups; ++group) {
    gate_group(k, from, rows, w, group, out, kGroup, activation, zeros, nothing_ahead);
    round_group(k, out, rows, h, group, nothing);
  }
}

// A phase that does so for rows that are cut as given and shared by columns, too: row 0 of h is row `begin` of a.
inline void add_gate(Phases& phases, const Rounding& a, const Weight& w, int64_t begin, const Cut& cut, const Rounding& h,
                     Activation activation, int workers) {
  const int64_t blocks = static_cast<int64_t>(cut.size()) - 1;
  phases.add_apart(in_rehearsal(blocks * h.groups), workers, [=, &k = kernels()](int64_t chunk, int) {
    const int64_t first = cut[chunk / h.groups], count = cut[chunk / h.groups + 1] - first, group = chunk % h.groups;
    const Rows from = rows_from(a, begin + first);
    float* const out = static_cast<float*>(scratch(7, count * kGroup * sizeof(float)));
    const auto zero = [&](int64_t row) { return is_zero(from, row); };
    gate_group(k, from, count, w, group, out, kGroup, activation, zero, nothing_ahead);
    Rounding some = h;
    some.data += h.at(first) * kGroup;
    some.scale += h.at(first);
    round_group(k, out, count, some, group, [&](int64_t row) { return w.bias == nullptr && zero(row); });
  });
}

// The same beside adapters, of this product or of the next one, which takes hidden[rows, F] as it is: rounding is another phase.
inline void add_gate_beside(Phases& phases, const Rounding& a, const Weight& w, int64_t begin, int64_t rows, float* hidden,
                            Activation activation, const Change& change, int workers) {
  const int64_t half = w.panels / 2, width = half * kPanel, groups = ceil_div(width, kGroup), blocks = ceil_div(rows, kRowBlock);
  phases.add_apart(in_rehearsal(blocks * groups), workers, [=, &k = kernels()](int64_t chunk, int) {
    const int64_t first = chunk / groups * kRowBlock, count = std::min(rows - first, kRowBlock), group = chunk % groups;
    const Rows from = rows_from(a, begin + first);
    Fetch fetch;
    const auto expand = [&](Block& b, int64_t panel) {
      if (change.beside == nullptr) return;
      const int pairs = b.panels / 2;
      float* const sums = cleared_change(count);
      const int64_t gate = panel * kPanel, up = gate + width, columns = pairs * kPanel;
      change.expand(sums, begin + first, gate, gate + columns, 0);
      change.expand(sums, begin + first, up, up + columns, pairs);
      b.change = sums;
      const int64_t to = std::min(gate + 2 * columns, width);
      fetch = Fetch();
      if (gate + columns < to) {
        change.ahead(fetch, begin + first, gate + columns, to);
        change.ahead(fetch, begin + first, up + columns, to + width);
      }
      b.fetch = &fetch;
    };
    float* const out = hidden + first * width + group * kGroup;
    gate_group(k, from, count, w, group, out, width, activation, [&](int64_t row) { return is_zero(from, row); }, expand);
  });
}

}  // namespace
}  // namespace jaxserve::int8
