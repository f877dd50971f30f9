// A weight as handlers are given it: its bytes, and an int32 array that says what they are.

#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "blocks/blocks.h"
#include "int8.h"

namespace jaxserve::blocks {

struct Weight {
  // Neighbouring panels of one form, their records one behind the other.
  struct Stretch {
    int32_t form, first, panels, at;  // `at`: where the first record begins, in 64 bytes
  };

  const uint8_t* bytes = nullptr;
  int64_t outputs = 0, inputs = 0;
  bool rotated = false;
  std::vector<Form> forms;
  std::vector<int64_t> record;  // bytes, of each form
  std::vector<Stretch> stretches;

  int64_t panels() const { return ceil_div(outputs, kPanel); }

  // Takes a description: rotated, number of forms, number of stretches, the forms, the stretches. Returns what is wrong with it,
  // or null.
  const char* read(const ffi::Buffer<ffi::U8>& data, const ffi::Buffer<ffi::S32>& description, int64_t O, int64_t I) {
    const int32_t* from = description.typed_data();
    const int64_t length = static_cast<int64_t>(description.element_count());
    bytes = data.typed_data();
    outputs = O;
    inputs = I;
    constexpr int64_t kForm = sizeof(Form) / 4, kStretch = sizeof(Stretch) / 4;
    if (length < 3 || length != 3 + from[1] * kForm + from[2] * kStretch) return "a weight's description has a wrong length";
    rotated = from[0] != 0;
    if (rotated && I % int8::kGroup != 0) return "a rotated weight's inputs are a multiple of 64";
    forms.resize(from[1]);
    std::memcpy(forms.data(), from + 3, forms.size() * sizeof(Form));
    stretches.resize(from[2]);
    std::memcpy(stretches.data(), from + 3 + from[1] * kForm, stretches.size() * sizeof(Stretch));
    for (const Form& form : forms) record.push_back(record_bytes(form, I));
    int64_t next = 0;
    for (const Stretch& s : stretches) {
      if (s.form < 0 || s.form >= from[1] || s.first != next || s.panels <= 0) return "a weight's stretches do not follow";
      const int64_t end = int64_t{s.at} * 64 + s.panels * record[s.form];
      if (s.at < 0 || end > static_cast<int64_t>(data.element_count())) return "a weight's bytes are packed for another shape";
      next += s.panels;
    }
    return next == panels() ? nullptr : "a weight's bytes are packed for another shape";
  }

  // Where a panel's record is, and its form.
  std::pair<const uint8_t*, const Form*> panel(int64_t index) const {
    const auto after = [](int64_t i, const Stretch& s) { return i < s.first; };
    const Stretch& s = *(std::upper_bound(stretches.begin(), stretches.end(), index, after) - 1);
    return {bytes + int64_t{s.at} * 64 + (index - s.first) * record[s.form], &forms[s.form]};
  }

  // The same, or null behind the last.
  const uint8_t* record_of(int64_t index) const { return index < panels() ? panel(index).first : nullptr; }

  // Panel `index` as the p-th of a tile.
  void place(Tile& t, int p, int64_t index, const float* bias) const {
    const auto [from, form] = panel(index);
    t.record[p] = from;
    t.next[p] = nullptr;
    t.form[p] = form;
    t.bias[p] = bias == nullptr ? nullptr : bias + index * kPanel;
    t.valid[p] = static_cast<int>(std::min<int64_t>(kPanel, outputs - index * kPanel));
    t.residual[p] = nullptr;
  }
};

}  // namespace jaxserve::blocks
